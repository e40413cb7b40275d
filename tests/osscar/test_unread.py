"""Weights that the calibration data do not reach: they follow where code for training reads them,
and are named where nothing tells what does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import osscar
from graph import Role
from osscar.core.modules import count_parameters
from tests.graph.test_training import Auxiliary, Regrouped


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


def images() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_auxiliary_heads_work_after_pruning(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = Auxiliary().eval()
    result = osscar.prune(dense, images(), sparsity=0.5, form=form)
    (plan,) = (group for group in result.plan.groups if group.name == "stem.channels")
    assert Role.ASIDE in {slot.role for slot in plan.slots}
    assert result.budget is not None
    assert count_parameters(result.model) == result.budget.reached
    result.save(tmp_path / "saved")
    back = osscar.load(tmp_path / "saved", dense=Auxiliary())
    assert count_parameters(back) == result.budget.reached
    if form == "graph":  # which is the program of evaluation
        return
    for model in (result.model, back):
        assert isinstance(model, Auxiliary)
        assert torch.equal(model.side.weight, dense.side.weight[:, list(plan.kept)])
        output, aside = model.train()(images())
        assert output.shape == aside.shape == (32, 4)


def told(width: int, kind: type[Optional] = Optional, **asked: Any) -> list[str]:
    torch.manual_seed(0)
    data = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        osscar.prune(kind(width), data, **asked)
    return [str(one.message) for one in caught if "do not reach" in str(one.message)]


def test_what_is_stuck_is_named_whatever_its_width() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"do not reach 'side\.weight'"):
        osscar.prune(Regrouped().eval(), images(), sparsity=0.5)


def test_what_an_optional_input_leads_to_is_named() -> None:
    (said,) = told(12, sparsity=0.5)
    assert "'side.weight'" in said
    assert "--skip" in said


class Tower(Optional):
    """Its other way has layers of the same width that read and make their own units."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.side = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 4))  # type: ignore[assignment]

    def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
        output = self.second(self.first(x).relu())
        return output if more is None else output + self.side(more)


def test_a_tower_of_its_own_is_not_named() -> None:
    assert not told(12, Tower, sparsity=0.5)


def test_a_width_that_other_layers_have_too_is_no_sign() -> None:
    assert not told(4, sparsity=0.5)
