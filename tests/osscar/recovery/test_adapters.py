"""Adapters: beside which matrices they stand, and that nothing of them is left but values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import osscar
from osscar.recovery.recover import Recovery
from osscar.recovery.weights import adaptable
from tests.osscar.recovery.perturbed import needs_peft

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration positions:UserWarning")


@pytest.fixture(scope="module")
def smaller(dense: nn.Module, windows: torch.Tensor) -> nn.Module:
    """Return a pruned model with something to learn again."""
    model = osscar.prune(dense, windows, neurons=0.5, backend="magnitude").model
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight.mul_(0.3)
    return model


def recovered(smaller: nn.Module, dense: nn.Module, data: torch.Tensor, **asked: Any) -> Recovery:
    default = {"steps": 8, "learning_rate": 1e-2, "device": "cpu", "mixed_precision": "no"}
    return osscar.recover(smaller, dense, data, **{**default, **asked})


@needs_peft
def test_adapters_leave_nothing_but_other_values(dense, smaller, windows):
    before, theirs = copy.deepcopy(smaller.state_dict()), copy.deepcopy(dense.state_dict())
    result = recovered(smaller, dense, windows, lora=2)
    assert result.after < result.before
    assert result.trained == sum(
        2 * sum(one.weight.shape) for one in map(smaller.get_submodule, adaptable(smaller))
    )
    assert [(n, type(m), set(vars(m))) for n, m in result.model.named_modules()] == [
        (n, type(m), set(vars(m))) for n, m in smaller.named_modules()
    ]
    after = result.model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].shape == one.shape for name, one in before.items())
    changed = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert changed == {f"{name}.weight" for name in adaptable(smaller)}
    # Weights that were shared are the result's own.
    for model, was in ((smaller, before), (dense, theirs)):
        assert all(torch.equal(one, was[name]) for name, one in model.state_dict().items())
        own = {x.data_ptr() for x in result.model.parameters()}
        assert not own & {x.data_ptr() for x in model.parameters()}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.dilated = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.around = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.again = self.tied = nn.Linear(4, 4)
        self.alike = nn.Linear(4, 4)
        self.alike.weight = self.head_of_two = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.around(self.dilated(self.grouped(self.plain(x)))).mean((2, 3))
        x = self.head(x)[:, None]
        return self.tied(self.alike(self.attention(x, x, x)[0]))


def test_only_matrices_that_a_module_has_alone_and_multiplies_by_are_adapted():
    assert adaptable(Convolutions()) == ["plain", "head"]
