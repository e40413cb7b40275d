"""What a consumer reads beside the units of a group is refitted with what stays of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import osscar
import solvers
from osscar.consumers import consumer as consumers
from osscar.preparation.prepare import prepare
from osscar.walk.targets import Target
from osscar.walk.walk import Walk
from solvers.linalg import symmetric

SAMPLES = 40


class Joined(nn.Module):
    """Its head reads the input, a constant, and two hidden layers, side by side."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(5, 8)
        self.head = nn.Linear(5 + 6 + 1 + 8, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.read(x), 1))

    def read(self, x: Tensor) -> list[Tensor]:
        return [x, torch.relu(self.one(x)), torch.ones_like(x[:, :1]), torch.relu(self.two(x))]


class Stacked(nn.Module):
    """A convolution reads its stem and what another convolution makes of that."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.head = kind(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.tanh(self.stem(x))
        return self.head(torch.cat([stem, torch.relu(self.grow(stem))], 1))


def inputs(seed: int = 0, samples: int = SAMPLES) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(samples, 5, dtype=torch.float64)


def joined(**options) -> Joined:
    torch.manual_seed(1)
    return Joined(**options).double().eval()


def reading(prepared, module: str):
    """The group that a module produces."""
    (found,) = (g for g in prepared.groups if g.prunable and g.slots[0].module == module)
    return found


def least_squares(X: Tensor, Y: Tensor, pulled: Tensor, W0: Tensor) -> tuple[Tensor, float]:
    """The weights that reproduce Y, pulled towards dense ones, from their definition; the loss."""
    root = (len(X) * pulled).sqrt()
    A, B = torch.cat([X, torch.diag(root)]), torch.cat([Y, root[:, None] * W0])
    W = torch.linalg.lstsq(A, B, driver="gelsd").solution
    return W, float((A @ W - B).square().sum()) / len(X)


@pytest.mark.parametrize(("bias", "rows"), [(False, 4), (True, 256), (True, 5)])
def test_fixed_rows_are_refitted_with_the_units_that_stay(bias, rows, monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL_ROWS", rows)
    model, x, damp, kept = joined(bias=bias), inputs(), 0.03, [0, 2, 5]
    with torch.no_grad():
        X = torch.cat(model.read(x), 1)
    W0, middle = model.head.weight.detach().T.clone(), X.mean(0)
    centred = X - middle if bias else X
    varies = centred.square().mean(0) > 1e-20
    order = [*range(5), *range(11, 20), *range(5, 11)]  # what stays, and then the units
    with prepare(model, x) as prepared:
        (step,) = Walk(prepared, [reading(prepared, "one")])
        (one,) = step.consumers
        assert one.inputs.tolist() == order
        assert one.fixed_inputs == (14, 0)
        problem = step.problem(3, damp)
        weights, loss = solvers.refit(problem, torch.tensor(kept))
        refits = step.refits(weights, kept)
        step.commit(refits.weights, kept)
        found = prepared.model.head.weight.detach().T.clone()
        energies = centred.square().mean(0) * varies
        pulled = damp * energies.clamp(min=float(energies[varies].mean()) * 0.1 / SAMPLES)
        fixed = [*range(5), *range(11, 20)]
        pulled[fixed] *= 10
        gone = [5 + unit for unit in range(6) if unit not in kept]
        used = [row for row in range(20) if row not in gone and varies[row]]
        exact, least = least_squares(centred[:, used], centred @ W0, pulled[used], W0[used])
        least += float((pulled[gone] * W0[gone].square().sum(1)).sum())
        torch.testing.assert_close(found[used], exact, rtol=1e-8, atol=1e-9)
        assert loss == pytest.approx(least, rel=1e-8)
        # It is relative to what is lost without the units where nothing else is refitted.
        units = list(range(5, 11))
        bare = (centred[:, units] @ W0[units]).square().sum() / SAMPLES
        bare += (pulled[units] * W0[units].square().sum(1)).sum()
        assert problem.scale == pytest.approx(float(bare), rel=1e-8)
        assert not found[gone].any()
        if bias:  # a constant says nothing then, and keeps its weight
            assert torch.equal(found[11], W0[11])
            change = prepared.model.head.bias - model.head.bias
            torch.testing.assert_close(change, (W0 - found).T @ middle)


@pytest.mark.parametrize("target", list(Target))
def test_groups_that_share_a_consumer_come_to_their_joint_refit(target):
    """The second refit starts from the first, whose error nothing that stays explains."""
    model, x = joined(), inputs()
    kept = {"one": [0, 2, 5], "two": [1, 3, 4, 7]}
    with prepare(model, x) as prepared:
        groups = [reading(prepared, name) for name in kept]
        for step in Walk(prepared, groups, target=target):
            step.correction_weight = 1.0
            units = kept[step.group.slots[0].module]
            weights, _ = solvers.refit(step.problem(len(units), 0.0), torch.tensor(units))
            step.commit(step.all_rows(weights), units)
        found = prepared.model.head.weight.detach().T
    with torch.no_grad():
        X = torch.cat(model.read(x), 1)
    used = [*range(5), *(5 + u for u in kept["one"]), 11, *(12 + u for u in kept["two"])]
    exact = torch.linalg.lstsq(X[:, used], X @ model.head.weight.detach().T).solution
    torch.testing.assert_close(found[used], exact, rtol=0, atol=1e-3)
    assert not found[[row for row in range(20) if row not in used]].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_are_refitted_on_all_channels_that_they_read(transposed, monkeypatch):
    torch.manual_seed(0)
    model = Stacked(transposed=transposed).double().eval()
    x, kept = torch.randn(6, 2, 7, 6, dtype=torch.float64), [0, 3]
    losses, scales = [], []
    for most in (0, consumers.MOST_ROWS):
        monkeypatch.setattr(consumers, "MOST_ROWS", most)
        with prepare(model, x) as prepared:
            (step,) = Walk(prepared, [reading(prepared, "grow")])
            (one,) = step.consumers
            before = one.read_weight()
            one.write_weight(before)  # what was read is what is written
            assert torch.equal(one.read_weight(), before)
            assert (one.fixed, one.rows) == ((36, 72) if most else (0, 36))
            problem = step.problem(2, 1e-4)
            weights, loss = solvers.refit(problem, torch.tensor(kept))
            step.commit(step.all_rows(weights), kept)
            with torch.no_grad():
                change = (prepared.model(x) - model(x)).movedim(1, -1).flatten(0, 2)
            assert float(change.square().sum(1).mean()) == pytest.approx(loss, rel=0.02)
            losses.append(loss)
            scales.append(problem.scale)
    assert losses[1] < 0.9 * losses[0]
    assert scales[1] == pytest.approx(scales[0])


@pytest.mark.parametrize("most", [consumers.MOST_ROWS, 19])
def test_the_report_counts_fixed_rows_and_those_too_many_to_refit(most, monkeypatch):
    model, x, rows = joined(), inputs(samples=64), ([14, 12], [0, 0])
    monkeypatch.setattr(consumers, "MOST_ROWS", most)
    result = osscar.prune(model, x, sparsity=0.5, allocation="uniform")
    found = [layer.fixed for layer in result.layers], [layer.fixed_dense for layer in result.layers]
    assert found == (rows if most > 19 else rows[::-1])
    head, before = result.model.head.weight[:, :5], model.head.weight[:, :5]
    assert torch.equal(head, before) == (most == 19)


def test_what_fixed_rows_explain_but_for_rounding_is_no_error():
    """Hidden layers of four samples are linear in what the head reads, too."""
    with prepare(joined().float(), inputs(samples=4).float()) as prepared:
        for step in Walk(prepared, [reading(prepared, name) for name in ("one", "two")]):
            problem = step.problem(3, 0.0)
            weights, loss = solvers.refit(problem, torch.arange(3))
            assert 0 <= loss < 1e-3 * problem.scale
            step.commit(step.all_rows(weights), range(3))


def test_a_refit_that_does_worse_on_held_out_samples_leaves_fixed_rows_dense():
    model, x = joined(), inputs()
    with prepare(model, x) as prepared:
        (step,) = Walk(prepared, [reading(prepared, "one")], held_out=20)
        dense, kept = step.consumers[0].read_weight(), [0, 1, 2]
        problem = step.problem(3, 0.01)
        weights, _ = solvers.refit(problem, torch.tensor(kept))
        refits = step.refits([1e3 * weights[0]], kept)
        plain = dense.clone()
        plain[14 + 3 :] = 0
        assert refits.unrefitted == ("head",)
        assert torch.equal(refits.weights[0], plain)
