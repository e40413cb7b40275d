"""Convolutions as linear maps: unfolding, Gram matrices and refits against brute force."""

import pytest
import torch
from torch import nn

import graph
import osscar.consumers.layers
import solvers
from osscar.consumers.layers import _windows
from osscar.consumers.linear_maps import linear_maps
from osscar.walk.gram import GramAccumulator

C = 6
"""Channels between producer and consumer."""

CONSUMERS = {
    "strided 1x1": lambda: nn.Conv2d(C, 5, 1, stride=2, bias=False),
    "uneven": lambda: nn.Conv2d(C, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(C, 5, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(C, 5, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(C, 5, 3, padding=(1, 2), padding_mode="circular"),
    "1d": lambda: nn.Conv1d(C, 5, 3, padding=2, stride=2),
    "3d": lambda: nn.Conv3d(C, 5, (2, 1, 3), padding=(1, 0, 1)),
    "transposed": lambda: nn.ConvTranspose2d(C, 5, 3, stride=2, padding=1, output_padding=1),
    "transposed 1d": lambda: nn.ConvTranspose1d(C, 5, 4, stride=3, dilation=2),
    "cropping": lambda: nn.ConvTranspose2d(C, 5, 2, padding=2),
}


class Pair(nn.Module):
    """A producer and the consumer under test."""

    def __init__(self, consumer):
        super().__init__()
        space = consumer.weight.ndim - 2
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space]
        self.shape = (3, 2, *(9, 8, 7)[:space])
        self.first = kind(2, C, 1)
        self.second = consumer

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def measured(model, shape):
    """Trace a model, and measure the consumers of its one prunable group."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    (group,) = graph.trace(model, (x,)).prunable
    accumulators = [GramAccumulator(consumer) for consumer in linear_maps(model, group)]

    def add(_, args):
        for accumulator in accumulators:
            for X in accumulator.linear_map.read_inputs(args[0]):
                accumulator.add(X)

    hook = accumulators[0].linear_map.module.register_forward_pre_hook(add)
    with torch.no_grad():
        for part in x.split(2):
            model(part)
    hook.remove()
    return group, accumulators, x


@pytest.fixture(params=CONSUMERS)
def pair(request):
    torch.manual_seed(1)
    model = Pair(CONSUMERS[request.param]()).double().eval()
    return model, *measured(model, model.shape)


def test_windows_times_weights_are_what_the_convolution_computes(pair, monkeypatch):
    model, _, (accumulator,), x = pair
    one, hidden = accumulator.linear_map, torch.relu(model.first(x)).detach()
    X = torch.cat(list(one.read_inputs(hidden)))
    expected = model.second(hidden).detach()
    if model.second.bias is not None:
        expected -= model.second.bias.detach().view(-1, *[1] * (hidden.ndim - 2))
    Y = (X @ one.read_weight()).view(len(x), -1, expected.shape[1])
    torch.testing.assert_close(Y.mT.reshape(expected.shape), expected)
    assert accumulator.fitted.positions == len(X)
    torch.testing.assert_close(accumulator.fitted.gram.dense(), X.T @ X)
    # Memory is bounded, and the Gram matrix stays the same.
    row = _windows(one.module, hidden)[0, 0].numel() * 8
    for limit in (1, 2000, 10**6):
        monkeypatch.setattr(osscar.consumers.layers, "UNFOLDED_BYTES", limit)
        pieces = list(one.read_inputs(hidden))
        assert max(piece.numel() * 8 for piece in pieces) <= max(limit, row)
        assert len(pieces) == 1 if limit == 10**6 else len(pieces) > 1
        assert torch.equal(torch.cat(pieces), X)
    # Writing what was read changes nothing.
    before = model.second.weight.clone()
    one.write_weight(one.read_weight())
    assert torch.equal(model.second.weight, before)


def write(accumulators, weights):
    """Write new weights, and biases that take up what changes in the means."""
    for accumulator, W in zip(accumulators, weights, strict=True):
        change, consumer = accumulator.bias(W), accumulator.linear_map
        consumer.write_weight(W)
        if change is not None:
            consumer.write_bias(consumer.read_bias() + change)


def test_the_refit_is_the_least_squares_solution(pair):
    model, group, (accumulator,), x = pair
    problem = solvers.SubsetProblem((accumulator.consumer(damp=1e-12),), 4, group.name)
    solution = solvers.solve(problem)
    hidden = torch.relu(model.first(x)).detach()
    dense = model.second(hidden).detach()
    write([accumulator], solution.weights)
    removed = solution.removed
    masked = hidden.index_fill(1, removed, 0.0)
    assert torch.equal(model.second(masked), model.second(hidden))
    X = torch.cat(list(accumulator.linear_map.read_inputs(masked)))
    error = (model.second(hidden) - dense).square().sum().item() / len(X)
    # About their means, windows may be so nearly dependent that more is damped than was asked for.
    close = 1e-6 if model.second.bias is None else 5e-3
    assert error == pytest.approx(solution.loss, rel=close)
    Y = dense.movedim(1, -1).flatten(0, -2)
    if model.second.bias is not None:
        X = torch.cat([X, torch.ones(len(X), 1).to(X)], 1)
    best = Y - X @ torch.linalg.lstsq(X, Y, driver="gelsd").solution
    assert error == pytest.approx(best.square().sum().item() / len(X), rel=close)


class Grouped(nn.Module):
    """Both groups of a convolution read the same channels: a unit owns rows in each."""

    def __init__(self, consumer):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.second = consumer

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(torch.cat([hidden, hidden], 1))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_group_of_a_convolution_is_a_consumer_of_its_own(kind):
    torch.manual_seed(0)
    model = Grouped(kind(8, 6, 3, padding=1, groups=2)).double().eval()
    group, accumulators, x = measured(model, (3, 2, 6, 6))
    assert group.units == 4
    assert [a.linear_map.part for a in accumulators] == [0, 1]
    hidden = torch.relu(model.first(x)).detach()
    hidden = torch.cat([hidden, hidden], 1)
    outputs = [
        torch.cat(list(a.linear_map.read_inputs(hidden))) @ a.linear_map.read_weight()
        for a in accumulators
    ]
    expected = (model.second(hidden) - model.second.bias.view(-1, 1, 1)).detach()
    Y = torch.cat(outputs, 1).view(3, 36, 6).mT.reshape(expected.shape)
    torch.testing.assert_close(Y, expected)
    problem = solvers.SubsetProblem(tuple(a.consumer(0.0) for a in accumulators), 3)
    solution = solvers.solve(problem, "enumerate")
    dense = model.second(hidden).detach()
    write(accumulators, solution.weights)
    gone = solution.removed.tolist()
    dim = 1 if kind is nn.Conv2d else 0
    indices = gone if dim else [i + o for o in (0, 4) for i in gone]
    assert not model.second.weight.index_select(dim, torch.tensor(indices)).any()
    error = (model.second(hidden) - dense).square().sum()
    assert error.item() / (3 * 36) == pytest.approx(solution.loss, rel=1e-6)


def test_a_linear_layer_after_flatten_reads_all_positions_of_a_channel():
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))
    group, (accumulator,), _ = measured(nn.Sequential(*layers).double(), (3, 2, 5, 5))
    assert group.units == 4
    assert accumulator.linear_map.unit_rows.tolist() == [
        list(range(9 * u, 9 * u + 9)) for u in range(4)
    ]
