"""Pruned models, each made once in a process: tests read these instead of pruning anew.

No test writes to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

import osscar
from tests.osscar.families import tiny, tokens
from tests.osscar.mixtures import mixture
from tests.osscar.networks import images, small_net
from tests.osscar.programs import CASES
from tests.zoo import transformers_case


@dataclass(frozen=True, eq=False)
class Run:
    """A dense model, what it was pruned on, and what came of it."""

    dense: nn.Module
    data: Any
    result: osscar.PruningResult


class OwnCode(nn.Module):
    """Products of bare weights, by `F.linear` and by an equation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Parameter(torch.randn(3, 16))
        self.shift = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.up.weight, self.shift).relu()
        return torch.einsum("...h,oh->...o", hidden, self.down)


def _resnet() -> nn.Module:
    config = ResNetConfig(
        num_channels=3, num_labels=5, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1]
    )
    return ResNetForImageClassification(config)


_RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "convolutions": (small_net, images, {"sparsity": 0.5}),
    "resnet": (_resnet, lambda: torch.randn(8, 3, 24, 24), {"channels": 0.75}),
    "vit": (
        lambda: transformers_case("vit").build(),
        lambda: torch.randn(8, 3, 32, 32),
        {"heads": "1/2", "neurons": "1/2"},
    ),
    # Its layers differ, so that no stock config can say its widths.
    "opt": (lambda: tiny("opt"), tokens, {"sparsity": 0.6, "certify": True, "backend": "greedy"}),
    "llama": (lambda: tiny("llama-gqa"), tokens, {"neurons": "1/2"}),
    "mixture": (lambda: mixture("mixtral"), tokens, {"neurons": "1/2"}),
    "own code": (OwnCode, lambda: torch.rand(32, 6), {"neurons": 4}),
    "program": (CASES["generator"][0], lambda: torch.randn(24, 8), {"sparsity": 0.4}),
}


class Runs(dict[str, Run]):
    """Runs by name, which are made when somebody asks for them."""

    def __missing__(self, name: str) -> Run:
        build, make, keep = _RUNS[name]
        torch.manual_seed(0)
        dense, data = build().eval(), make()
        asked = {"backend": "magnitude", "device": "cpu", **keep}
        self[name] = Run(dense, data, osscar.prune(dense, data, **asked))
        return self[name]
