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
from osscar.network.modules import count_parameters
from osscar.request import PruningRequest
from osscar.run.feasibility import feasible_groups
from osscar.run.prune import prepare_for
from tests.graph.test_training import Auxiliary


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


@pytest.mark.parametrize("form", ["eager", "exported"])
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
    if form == "exported":  # which is the program of evaluation
        return
    for model in (result.model, back):
        assert isinstance(model, Auxiliary)
        assert torch.equal(model.side.weight, dense.side.weight[:, list(plan.kept)])
        output, aside = model.train()(images())
        assert output.shape == aside.shape == (32, 4)


class Attending(nn.Module):
    """Its auxiliary head is an attention, which reads what is pruned."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.side = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        units = self.first(x).relu()
        output = self.second(units)
        if not self.training:
            return output
        return output, self.side(self.attention(units, units, units)[0])


def test_an_auxiliary_attention_trains_after_loading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = osscar.prune(Attending().eval(), torch.randn(16, 5, 6), neurons=0.5)
    assert isinstance(result.model, Attending)
    assert result.model.attention.in_proj_weight.shape == (24, 4)
    result.save(tmp_path / "saved")
    back = osscar.load(tmp_path / "saved", dense=Attending())
    found = []
    for model in (result.model.train(), back.train()):
        output, aside = model(torch.ones(3, 5, 6))
        (output.sum() + aside.square().sum()).backward()
        found.append((aside, model.get_parameter("attention.in_proj_weight").grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


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


class Literal(Auxiliary):
    """Its code for training has the width written in it."""

    def aside(self, units: Tensor) -> Tensor:
        return self.side(units.mean((2, 3)).view(-1, 6))  # type: ignore[no-any-return]


class Skipping(Auxiliary):
    """In training it adds up what evaluation keeps apart; there is no weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.also = nn.Conv2d(3, 6, 3, padding=1)
        self.read = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Any:
        one, other = self.stem(x).relu(), self.also(x).relu()
        if self.training:
            one = one + other
        return self.head((self.body(one) + self.read(other)).mean((2, 3)))


class Moving(Auxiliary):
    """In training a weight follows another one."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            with torch.no_grad():
                self.teacher.weight.mul_(0.9).add_(self.stem.weight, alpha=0.1)
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


def test_what_an_optional_input_leads_to_is_named() -> None:
    (said,) = told(12, sparsity=0.5)
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
