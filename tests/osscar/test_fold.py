"""Weights that are computed at every call: folded where they are cut, left alone elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import osscar
from osscar.shrinking.fold import fold, unfold
from tests.osscar.programs import without_units

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

Normalization = Callable[[nn.Module], nn.Module]


class Standardized(nn.Module):
    """A parametrization of one's own: each filter has mean zero, and a length that it learns."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(filters, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight - weight.mean((1, 2), keepdim=True)
        return self.scale * weight / weight.norm(dim=(1, 2), keepdim=True)


def standardized(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Standardized(len(module.weight)))
    return module


NORMALIZATIONS: dict[str, Normalization] = {
    "weight_norm": weight_norm,
    "weight_norm as a parametrization": parametrizations.weight_norm,
    "weight_norm over the last dimension": lambda m: parametrizations.weight_norm(m, dim=2),
    "weight_norm of the whole": lambda m: weight_norm(m, dim=None),
    "spectral_norm": spectral_norm,
    "spectral_norm as a parametrization": parametrizations.spectral_norm,
    "a parametrization of one's own": standardized,
}


class TCN(nn.Module):
    """Causal, dilated convolutions beside a residual connection (arXiv 1803.01271)."""

    def __init__(self, normalized: Normalization) -> None:
        super().__init__()
        self.enter = normalized(nn.Conv1d(3, 8, 3))
        self.one = normalized(nn.Conv1d(8, 8, 3, padding=4, dilation=2))
        self.two = normalized(nn.Conv1d(8, 8, 3, padding=4, dilation=2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        y = torch.relu(self.one(x)[..., :-4])
        return self.head(torch.relu(x + self.two(y)[..., :-4])[..., -1])


FOLDED = ("enter.weight", "one.weight", "two.weight")


def tcn(name: str = "weight_norm", seed: int = 0) -> TCN:
    """Return a network whose weights are not as long as at the start."""
    torch.manual_seed(seed)
    model = TCN(NORMALIZATIONS[name])
    for weight in model.parameters():
        weight.data *= 1 + 0.3 * torch.rand_like(weight)
    with torch.no_grad():
        model.train()(series())  # spectral normalization learns its directions
    return model.eval()


def series() -> Tensor:
    return torch.randn(64, 3, 20, generator=torch.Generator().manual_seed(4))


def plain(model: TCN) -> TCN:
    """Return a network that has never been normalized, with the weights that a model computes."""
    found = TCN(lambda module: module)
    with torch.no_grad():
        model(series())  # old forms compute a weight when they are called
        for name, tensor in found.named_parameters():
            path, _, attribute = name.rpartition(".")
            tensor.copy_(getattr(model.get_submodule(path), attribute))
    return found.eval()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NORMALIZATIONS)
@torch.no_grad()
def test_all_channels_are_pruned_saved_and_read_and_the_model_keeps_its_normalization(
    name: str, tmp_path: Path
) -> None:
    model, x = tcn(name), series()
    before, dense = copy.deepcopy(model.state_dict()), model(x)
    keep = {"channels": 0.5, "residual": 0.5, "backend": "magnitude", "device": "cpu"}
    result = osscar.prune(model, x, **keep)
    assert [layer.units for layer in result.layers] == [8, 8]  # one inside, and the stream
    small = result.model.state_dict()
    assert small["one.weight"].shape == (4, 4, 3)
    assert result.model.one.out_channels == result.model.two.in_channels == 4
    assert {key.rpartition(".")[2] for key in small} == {"weight", "bias"}
    assert result.folded == FOLDED
    assert "3 weights that the dense model computes at every call" in result.summary()
    # What came in is what it was, its class included.
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(map(torch.equal, after.values(), before.values()))
    assert torch.equal(model(x), dense)
    # A plan for plain weights shrinks another such model, as masking it does.
    other = tcn(name, seed=3)
    expected = without_units(plain(other), result.plan)(x)
    osscar.shrink(other, result.plan, [(x,)])
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
    assert type(other.one) is nn.Conv1d
    # And what was read is as any other model.
    result.save(tmp_path / "small")
    again = osscar.load(tmp_path / "small", dense=tcn(name, seed=5))
    torch.testing.assert_close(again(x), result.model(x))


class Reader(nn.Module):
    """Code that reads what a weight is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = weight_norm(nn.Linear(4, 6)), weight_norm(nn.Linear(6, 6))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.leave(torch.relu(self.enter(x))) * self.leave.weight_g.mT
        return self.down(torch.relu(self.up(y)))


def test_code_that_reads_the_parts_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    result = osscar.prune(model, torch.randn(32, 4), neurons=0.5, device="cpu")
    assert result.model.down.in_features == 4
    assert result.folded == ()
    assert "leave.weight_g" in result.model.state_dict()


def test_shared_parts_and_other_tensors_stay() -> None:
    one, two = (weight_norm(nn.Linear(4, 4)) for _ in range(2))
    two._parameters["weight_v"] = one.weight_v
    three = parametrizations.weight_norm(nn.Linear(4, 4), "bias", 0)
    four = parametrizations.weight_norm(parametrizations.weight_norm(nn.Linear(4, 4)), "bias", 0)
    five = weight_norm(nn.Linear(4, 4), "bias")
    model = nn.Sequential(one, two, three, four, five)
    before = list(model.state_dict())
    assert fold(model) == {}
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("name", NORMALIZATIONS)
@torch.no_grad()
def test_folding_is_undone_without_a_trace(name: str) -> None:
    model, x = tcn(name), series()
    kinds, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    model.enter.requires_grad_(False)
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    dense = model(x)
    folded = fold(model)
    assert tuple(folded) == FOLDED
    torch.testing.assert_close(model(x), dense)
    assert {key.rpartition(".")[2] for key in model.state_dict()} == {"weight", "bias"}
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 6
    model.load_state_dict(plain(model).state_dict())  # no hook asks for the parts
    unfold(folded)
    assert [type(module) for module in model.modules()] == kinds
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    model.load_state_dict(before)
    assert torch.equal(model(x), dense)
