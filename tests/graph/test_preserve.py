"""What a model keeps beside its tensors is out of the way while it is traced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import graph
from graph.preserve import caching, without_cache


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
