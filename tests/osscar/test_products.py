"""Weights that code multiplies by, wherever it does: measured, refitted, or left as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import osscar
from osscar.consumers.layers import LAYERS, Layer, features, reads
from osscar.consumers.layers import ROWS as ROWS_OF_LINEAR
from osscar.preparation.prepare import prepare
from tests.graph.topologies import randomized


class Bare(nn.Module):
    """A layer without a module: eight units that it is given, and a weight of some shape."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], weight: tuple[int, ...], space: int = 0
    ) -> None:
        super().__init__()
        kind = (nn.Linear, nn.Conv1d, nn.Conv2d)[space]
        self.enter = kind(3, 8, *(1,) * bool(space))
        self.weight, self.function = nn.Parameter(torch.randn(weight)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(torch.relu(self.enter(x)), self.weight)


class Causal(nn.Conv1d):
    """A convolution that pads its inputs itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


class ScaledLinear(nn.Linear):
    """A layer of one's own, whose weight is multiplied by a constant."""

    scale = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.weight, self.bias)


def scaled(layer: ScaledLinear, x: Tensor, inputs: Tensor | None) -> Iterator[Tensor]:
    return features(layer, layer.scale * x, inputs)


@pytest.fixture(autouse=True)
def known_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, ScaledLinear.forward, Layer(lambda _: ROWS_OF_LINEAR, scaled))


class Twice(nn.Module):
    """A layer that other code reads as well, in the same way."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.enter, self.leave, self.again = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.shared = shared
        if shared:
            self.again.weight = self.leave.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        also = self.again(x * 2) if self.shared else F.linear(x * 2, self.leave.weight)
        return self.leave(x) + also


ROWS, SERIES, IMAGE = (40, 3), (12, 3, 7), (6, 3, 5, 5)

MULTIPLIED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "einsum of lists": (
        lambda: Bare(lambda x, w: torch.einsum("io,...i->...o", [w, x]), (8, 5)),
        ROWS,
    ),
    "einsum from heads": (
        lambda: Bare(
            lambda x, w: torch.einsum("bhk,hko->bo", x.unflatten(1, (4, 2)), w), (4, 2, 5)
        ),
        ROWS,
    ),
    "behind it": (lambda: Bare(lambda x, w: x @ w, (8, 5)), ROWS),
    "before it": (lambda: Bare(lambda x, w: torch.matmul(w, x), (5, 8), space=1), SERIES),
    "turned by name": (
        lambda: Bare(lambda x, w: x @ torch.transpose(input=w, dim0=0, dim1=1), (5, 8)),
        ROWS,
    ),
    "convolution": (
        lambda: Bare(lambda x, w: F.conv2d(x, w, stride=2, padding=1), (4, 8, 3, 2), space=2),
        IMAGE,
    ),
    "groups": (lambda: Bare(lambda x, w: F.conv2d(x, w, groups=2), (4, 4, 2, 2), space=2), IMAGE),
    "padding of its own": (lambda: nn.Sequential(nn.Conv1d(3, 8, 1), Causal(8, 5, 3)), SERIES),
    "a row of the table": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), ScaledLinear(8, 5)),
        ROWS,
    ),
    "shared": (lambda: Twice(shared=True), ROWS),
    "read elsewhere": (lambda: Twice(shared=False), ROWS),
}
"""Networks whose first prunable group is read by such a weight, and the shape of their inputs."""


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = MULTIPLIED[name]
    torch.manual_seed(0)
    return randomized(build()).double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", MULTIPLIED)
def test_what_is_read_times_the_weight_is_what_is_put_out(name: str) -> None:
    model, x = made(name)
    with prepare(model, x) as prepared:
        group = next(group for group in prepared.groups if group.prunable)
        maps = prepared.linear_maps(group)
        seen = dict.fromkeys((one.name for one in maps), 0)

        def see(station: str, read: object, y: Tensor) -> None:
            seen[station] += 1
            for one in (one for one in maps if one.name == station):
                X, W = torch.cat([*one.read_inputs(read)]), one.read_weight()
                Y = one.read_corrections(y, read)
                bias = Y[0] - X[0] @ W if one.bias is None else one.read_bias()
                torch.testing.assert_close(X @ W + bias, Y)
                assert X.shape == (len(X), one.rows)

        with reads(prepared.model, seen, after=see):
            prepared.model(**prepared.batches()[0])
        assert set(seen.values()) == {2 if name in ("shared", "read elsewhere") else 1}
        for one in maps:
            W = torch.randn(one.rows, one.outputs, dtype=torch.float64)
            one.write_weight(W)
            assert torch.equal(one.read_weight(), W)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MULTIPLIED)
def test_it_is_refitted_and_the_smaller_model_is_the_masked_one(name: str) -> None:
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    with prepare(model, x) as prepared:
        group = next(group for group in prepared.groups if group.prunable)
    keep, asked = {group.name: group.units // 2}, {"target": "weights", "damp": 0.01}
    result = osscar.prune(model, x, groups=keep, device="cpu", **asked)
    assert result.certificate.error < 1e-10
    (layer,), (plan,) = result.layers, result.plan.groups
    assert (layer.kept, layer.unrefitted) == (group.units // 2, ())
    slot = group.consumers[-1]
    stays = torch.tensor(slot.indices(plan.kept))
    left = before[slot.tensor].index_select(slot.dim, stays)
    found = result.model.get_parameter(slot.tensor)
    assert found.shape[slot.dim] == len(stays)
    assert not torch.allclose(found, left.narrow(0, 0, len(found)))
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert "forward" not in vars(model)


OTHERWISE: dict[str, Callable[[], Bare]] = {
    "scaled": lambda: Bare(lambda x, w: x @ (w * 2), (8, 5)),
    "read besides": lambda: Bare(lambda x, w: x @ w + w.norm(), (8, 5)),
    "in parts": lambda: Bare(lambda x, w: x[:, :4] @ w[:4], (8, 5)),
    "by experts": lambda: Bare(
        lambda x, w: torch.einsum("beh,eho->beo", x.unflatten(1, (2, 4)), w), (2, 4, 5)
    ),
    "in place": lambda: Bare(lambda x, w: (x @ w).addmm_(x, w), (8, 5)),
    "as inputs": lambda: Bare(lambda x, w: F.linear(w, x).t(), (5, 8)),
    "in two ways": lambda: Bare(lambda x, w: x @ w @ w.t(), (8, 5)),
    "no view": lambda: Bare(lambda x, w: torch.einsum("bi,hik->bhk", x, w), (2, 8, 3)),
}
"""Code that does with a weight what is no product, or none that could be written back."""


@pytest.mark.parametrize("way", OTHERWISE)
def test_what_is_done_besides_freezes(way: str) -> None:
    torch.manual_seed(0)
    with prepare(OTHERWISE[way](), torch.randn(40, 3)) as prepared:
        assert not prepared.products
        reasons = [g.frozen for g in prepared.groups if any(s.tensor == "weight" for s in g.slots)]
    assert all(reasons)


def test_a_layer_with_code_of_its_own_says_where_its_row_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(LAYERS, ScaledLinear.forward)
    with prepare(made("a row of the table")[0], torch.randn(40, 3).double()) as prepared:
        (freeze,) = (f for g in prepared.groups for f in g.frozen if f.module == "2")
    assert "needs a row in osscar.consumers.layers.LAYERS" in freeze.reason
