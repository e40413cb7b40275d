"""What a refit may do to a layer: the floor of its damping, and what held-out samples say of it."""

import pytest
import torch
from torch import nn

import osscar
import solvers
from osscar.consumers.linear_maps import linear_maps
from osscar.preparation.prepare import prepare
from osscar.run.prune_page import layers_table
from osscar.walk.gram import GramAccumulator, damped_by_input, pulls
from osscar.walk.layer_step import GROWN, LayerStep
from solvers.linalg.symmetric import Symmetric

# ---- the floor ---------------------------------------------------------------------------


def test_an_input_is_pulled_by_its_energy_and_no_less_than_by_a_tenth_of_a_position():
    energies = torch.tensor([4.0, 1.0, 1e-9, 0.0, 1e-3], dtype=torch.float64)
    mean = float(energies.sum()) / 4  # of those that vary at all
    expected = [4.0, 1.0, 0.1 * mean / 50, 0.0, 0.1 * mean / 50]
    torch.testing.assert_close(pulls(energies, 50), torch.tensor(expected, dtype=torch.float64))
    plenty = 10**6
    assert torch.equal(pulls(energies, plenty)[[0, 1, 4]], energies[[0, 1, 4]])
    torch.testing.assert_close(pulls(7 * energies, 50), 7 * pulls(energies, 50))
    assert torch.equal(pulls(torch.zeros(3), 50), torch.zeros(3))


@pytest.mark.parametrize("size", [1e-3, 1e-100])
def test_an_input_that_is_nearly_zero_keeps_its_weights(size):
    """The refit of the others and of this one are two problems, and the closed form is theirs."""
    torch.manual_seed(0)
    n, damp = 40, 0.01
    X = torch.randn(n, 6, dtype=torch.float64)
    X[:, 5] = size * X[:, 4]  # all but a copy, of which weights without end would make use
    W0 = torch.randn(6, 3, dtype=torch.float64)
    H = X.T @ X / n
    consumer = damped_by_input(
        Symmetric.of(H), W0.clone(), units=torch.arange(6)[:, None], damp=damp, positions=n
    )
    problem = solvers.SubsetProblem((consumer,), 5)
    support = torch.tensor([0, 1, 2, 3, 5])
    (W,), loss = solvers.refit(problem, support)
    floor = 0.1 * float(H.diagonal().mean()) / n
    added = damp * H.diagonal().clamp(min=floor)
    part = (H + torch.diag(added))[support][:, support]
    exact = torch.linalg.solve(part, (H @ W0 + added[:, None] * W0)[support])
    torch.testing.assert_close(W[support], exact)
    # What pulls an input away is at most the root of its energy times that of the loss.
    furthest = (float(H[5, 5]) * loss) ** 0.5 / (damp * floor)
    assert float((W[5] - W0[5]).norm()) <= furthest * (1 + 1e-9)
    solvers.solve(problem, "local_search", bound=True).verify()


# ---- what held-out samples say -----------------------------------------------------------


def measured(bias, positions, noisy, seed):
    """A step with one consumer, and what was held out: inputs and targets."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4, bias=bias)).double()
    with prepare(model, torch.randn(8, 5).double()) as prepared:
        (group,) = [g for g in prepared.groups if g.prunable and g.units == 12]
        (consumer,) = linear_maps(prepared.model, group)
    gram = GramAccumulator(consumer, held_out=True, corrections=True)
    mixed = torch.randn(12, 12).double()
    M = 0.3 * torch.randn(12, 4).double()
    parts = []
    for held, count in ((False, positions), (True, 60)):
        X = (0.2 + torch.randn(count, 12).double()) @ mixed
        D = 0.1 + X @ M + noisy * torch.randn(count, 4).double()
        gram.add(X, D, held_out=held)
        parts.append((X, D))
    return LayerStep(group, (gram,)), parts


def error(W, bias, X, D, W0):
    """Of new weights on what was held out, from its definition."""
    change = X @ (W - W0) - D
    return float((change if bias is None else change + bias).square().sum())


@pytest.mark.parametrize("bias", [False, True])
def test_no_layer_does_worse_on_held_out_samples_than_without_its_refit(bias):
    fates = set()
    for seed in range(12):
        step, [_, (X, D)] = measured(bias, (4, 8, 60)[seed % 3], (0.1, 20.0)[seed % 2], seed)
        (gram,) = step.grams
        W0 = gram.linear_map.read_weight()
        step.correction_weight = seed % 5 / 4
        solution = solvers.solve(step.problem(7, 0.01), "greedy")
        kept = solution.support.tolist()
        refits = step.refits(solution.weights, kept)
        plain = torch.zeros_like(W0)
        plain[kept] = W0[kept]
        found, refit, none = (
            error(W, gram.bias(W), X, D, W0)
            for W in (refits.weights[0], solution.weights[0], plain)
        )
        assert found <= none * (1 + 1e-9)
        assert found == pytest.approx(min(refit, none), rel=1e-9)
        assert refits.unrefitted == (("2",) if none < refit else ())
        assert refits.growth == float(refits.weights[0].abs().max() / W0.abs().max())
        assert refits.held_out == 60
        fates.add(bool(refits.unrefitted))
    assert fates == {False, True}


# ---- weights beyond reason ---------------------------------------------------------------


class Faint(nn.Module):
    """Reads six neurons, and six more that hold nearly the same, a thousandth as large."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.up, self.down, self.head = nn.Linear(12, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(12))
            self.up.weight[6:, :6] += torch.eye(6)
            self.up.weight[6:] *= 1e-3
            self.up.bias.zero_()

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.down(self.up(x)))))


def test_weights_beyond_reason_are_named_with_their_factor_and_a_remedy():
    """Without damping, and without a look at what it costs."""
    torch.manual_seed(0)
    model, x = Faint().double().eval(), torch.randn(64, 12).double()
    free = {"damp": 0.0, "target": "weights", "backend": "random"}
    remedy = (
        r"times\); give more calibration data, raise damp \(`--set damp=1`\), .* skip \(`--skip`\)"
    )
    with pytest.warns(UserWarning, match=rf"refitted weights are very large.*{remedy}") as warned:
        result = osscar.prune(model, x, neurons=0.5, **free)
    (layer,) = [one for one in result.layers if one.growth > GROWN]
    assert f"{layer.name} ({layer.growth:.3g} times)" in str(warned[-1].message)
    largest = (float(one.down.weight.abs().max()) for one in (result.model, model))
    assert layer.growth == pytest.approx(next(largest) / next(largest), rel=1e-5)
    columns = layers_table([vars(layer) for layer in result.layers]).columns
    assert "growth >" in columns
    assert "unrefitted" not in columns
