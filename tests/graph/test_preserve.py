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


def test_a_cache_of_an_inner_model_is_off_while_it_is_traced() -> None:
    model = OfTwoModalities()
    (group,) = graph.trace(model, (torch.randn(3, 4),)).prunable
    assert group.units == 8
    assert model.language.config.use_cache is True
    assert model.config.use_cache is None


@dataclass(frozen=True)
class Frozen:
    use_cache: bool = True


def test_a_config_that_cannot_be_changed_does_not_keep_a_model_from_being_traced() -> None:
    model = OfTwoModalities()
    model.config = SimpleNamespace(use_cache=True)
    model.frozen = nn.Linear(2, 2)
    model.frozen.config = Frozen()  # type: ignore[assignment]
    assert len(graph.trace(model, (torch.randn(3, 4),)).prunable) == 1
    assert model.config.use_cache is True


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


def test_caches_are_on_again_after_a_failure() -> None:
    model = OfTwoModalities()
    assert list(caching(model)) == ["language"]
    seen = []

    def fail(module: nn.Module, args: object) -> None:
        seen.append(model.language.config.use_cache)
        raise ZeroDivisionError

    model.language.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), without_cache(model):
        model(torch.randn(3, 4))
    assert seen == [False]
    assert model.language.config.use_cache is True


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


def test_modules_that_cast_others_in_their_forward_are_traced() -> None:
    model, to = CastingItself(), nn.Module.to
    before = [parameter.data_ptr() for parameter in model.parameters()]
    groups = graph.trace(model, (torch.randn(3, 4),)).groups
    assert any(group.prunable for group in groups)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert nn.Module.to is to


def test_a_cast_that_changes_something_is_still_an_error() -> None:
    model = CastingItself().double()
    with pytest.raises(graph.TraceError):
        graph.trace(model, (torch.randn(3, 4, dtype=torch.float64),))
