"""What a model keeps beside its tensors is out of the way while it is traced."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import graph
from graph.tracing.preserve import caching, without_cache


class Caching(nn.Module):
    """Puts out a thing of no known type unless its own config says no, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        cache = object() if self.config.use_cache else None
        return self.down(torch.relu(self.up(x))), cache


class OfTwoModalities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=None)
        self.language = Caching()

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        found: tuple[Tensor, object] = self.language(x)
        return found


@dataclass(frozen=True)
class Frozen:
    """A config that cannot be changed."""

    use_cache: bool = True


class Refusing(nn.Linear):
    """May not be moved, and keeps something."""

    kept = None

    def _apply(self, *args: object, **kwargs: object) -> nn.Module:
        raise RuntimeError("may not be moved")


class Converting(nn.Linear):
    """Is in half precision whatever it is asked to be."""

    def _apply(self, fn: object, recurse: bool = True) -> nn.Module:
        return super()._apply(lambda t: t.to(torch.bfloat16))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", [Refusing, Converting])
def test_what_modules_do_when_they_are_converted_changes_no_model(kind: type[nn.Linear]) -> None:
    layer = kind(4, 8)
    layer.kept = torch.ones(8)  # type: ignore[assignment]
    before = [parameter.clone() for parameter in layer.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind is Converting else "default")
        graph.trace(nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 4)), (torch.randn(3, 4),))
    for parameter, kept in zip(layer.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, kept)


def test_caches_are_off_while_a_model_is_traced_and_on_again() -> None:
    model = OfTwoModalities()
    model.frozen = nn.Linear(2, 2)
    model.frozen.config = Frozen()  # type: ignore[assignment]
    (group,) = graph.trace(model, (torch.randn(3, 4),)).prunable
    assert group.units == 8
    assert list(caching(model)) == ["language", "frozen"]
    with without_cache(model):
        assert not model.language.config.use_cache
    with pytest.raises(ZeroDivisionError), without_cache(model):
        raise ZeroDivisionError
    assert model.language.config.use_cache is True
    assert model.config.use_cache is None


class CastingItself(nn.Module):
    """Casts its own layers on the way, as routers of mixtures do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.up = self.up.to(torch.float32)
        self.down.to(x.device, torch.float32)
        hidden: Tensor = self.down(torch.relu(self.up(x)))
        return hidden


def test_modules_may_cast_others_in_their_forward_where_that_changes_nothing() -> None:
    model, to = CastingItself(), nn.Module.to
    before = [parameter.data_ptr() for parameter in model.parameters()]
    assert graph.trace(model, (torch.randn(3, 4),)).prunable
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert nn.Module.to is to
    with pytest.raises(graph.TraceError):
        graph.trace(model.double(), (torch.randn(3, 4, dtype=torch.float64),))
