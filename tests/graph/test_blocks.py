"""Coupling groups of the blocks that public models are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graph

from .blocks import BLOCKS
from .masking import assert_sound
from .topologies import randomized

_ALWAYS = (
    *("multi-query", "enable-gqa", "rms-norm", "addmm", "stack", "recurrent", "channel-shuffle"),
    *("pixel-shuffle", "messages", "fourier", "patches", "experts"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in _ALWAYS else pytest.mark.slow) for n in BLOCKS]
)
def test_groups_are_found_and_sound(name: str) -> None:
    network, example, expected = BLOCKS[name]
    torch.manual_seed(0)
    model = randomized(network())
    groups = graph.trace(model, (example,)).prunable
    assert {group.name: group.units for group in groups} == expected
    for group in groups:
        assert_sound(model, group, (example,))


class Numbered(nn.Module):
    """Neurons that meet numbers made and listed by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).tanh() * torch.arange(6)
        return self.leave(x + torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0]))


def test_numbers_of_the_code_hold_modules_and_not_programs() -> None:
    model, example = randomized(Numbered()), (torch.randn(2, 4),)
    (group,) = (g for g in graph.trace(model, example).groups if g.units == 6)
    reasons = [freeze.reason for freeze in group.frozen]
    assert any("numbers that the code makes" in reason for reason in reasons)
    assert any("constant of the code" in reason for reason in reasons)
    (group,) = graph.trace(model, example, rules=graph.PROGRAM_RULES).prunable
    assert group.name == "neurons"
    assert_sound(model, group, example)
