"""Which channels are residual streams: what shortcuts add up, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graph


class Joined(nn.Module):
    """Two convolutions of one input, joined, and read by a third."""

    def __init__(self, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 4, 1)
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.join(self.left(x), self.right(x)))


def residual(network: nn.Module) -> frozenset[str]:
    return graph.residual_groups(graph.trace(network, (torch.zeros(2, 3, 5, 5),)))


@pytest.mark.parametrize(
    ("join", "names"),
    [
        (lambda a, b: a + b, {"left.channels"}),
        (lambda a, b: torch.relu(a).add(b), {"left.channels"}),
        (lambda a, b: a * torch.sigmoid(b), set()),
        (lambda a, b: a * b + a, set()),
        (lambda a, b: a * b + b * a, set()),
        (lambda a, b: torch.cat([a, b]), set()),
    ],
)
def test_sums_of_two_producers_are_residual(
    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], names: set[str]
) -> None:
    assert residual(Joined(join)) == names


class Blocks(nn.Module):
    """Shortcuts around blocks whose inner channels are summed nowhere."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.up = nn.ModuleList(nn.Conv2d(8, 12, 1) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Conv2d(12, 8, 1) for _ in range(blocks))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def test_what_a_consumer_computes_is_not_its_input() -> None:
    assert residual(Blocks(3)) == {"stem.channels"}
    assert residual(Blocks(0)) == frozenset()
