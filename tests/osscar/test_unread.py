"""Weights that the calibration data do not reach are named, as nothing tells what they read."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osscar.request import PruningRequest
from osscar.run.feasibility import feasible_groups
from osscar.run.prune import prepare_for


class Optional(nn.Module):
    """A network with a layer that an optional input alone leads to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 4)
        self.side = nn.Linear(width, 4)
        self.skip = nn.Linear(5, 4)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
        units = self.first(x).relu()
        output = self.second(units) + self.skip(x)
        return output if more is None else output + self.side(units) * more


class Auxiliary(Optional):
    """A network whose second output is there in training alone."""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
        return super().forward(x, torch.ones(()) if self.training else None)


def tried(model: nn.Module, data: Tensor, **asked: Any) -> None:
    """Find what can follow, before anything is solved."""
    request = PruningRequest(**asked)
    with prepare_for(model, data, request) as prepared:
        feasible_groups(prepared, request)


def told(width: int, kind: type[Optional] = Optional, **asked: Any) -> list[str]:
    torch.manual_seed(0)
    data = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tried(kind(width), data, **asked)
    return [str(one.message) for one in caught if "do not reach" in str(one.message)]


@pytest.mark.parametrize("kind", [Optional, Auxiliary])
def test_what_an_optional_input_or_training_leads_to_is_named(kind: type[Optional]) -> None:
    (said,) = told(12, kind, sparsity=0.5)
    assert "'side.weight'" in said
    assert "skip=" in said


class Tower(Optional):
    """Its other way has layers of the same width that read and make their own units."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.side = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 4))  # type: ignore[assignment]

    def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
        output = self.second(self.first(x).relu())
        return output if more is None else output + self.side(more)


def test_a_tower_of_its_own_and_a_width_that_other_layers_have_are_no_sign() -> None:
    assert not told(12, Tower, sparsity=0.5)
    assert not told(4, sparsity=0.5)
