"""Runs that ranks share: ``python -m tests.osscar.ranks_cases DIRECTORY`` is one of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from osscar.base.ranks import ALONE, Ranks, together
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from osscar.run.result import PruningResult
from tests.osscar.families import tiny, tokens
from tests.osscar.mixtures import mixture
from tests.osscar.networks import images, small_net


@dataclass(frozen=True)
class Case:
    """A run whose result must not depend on how many ranks there are."""

    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    asked: Mapping[str, Any]

    def run(self, ranks: Ranks = ALONE) -> PruningResult:
        request = PruningRequest(device="cpu", **self.asked)
        return prune_as_asked(self.model(), self.data(), request, ranks=ranks)


CASES = {
    "heads and neurons": Case(
        lambda: tiny("opt"), lambda: tokens(16, 48), {"heads": "1/2", "neurons": "1/2"}
    ),
    "a budget": Case(
        lambda: tiny("llama-gqa").double(),
        lambda: tokens(16, 48),
        {"sparsity": 0.4, "batch_size": 3, "certify": True, "bound_rounds": 0},
    ),
    "a budget without gradients": Case(
        lambda: tiny("llama-gqa").double(),
        lambda: tokens(16, 48),
        {"sparsity": 0.4, "flops": 0.7, "batch_size": 3, "allocation": "measured"},
    ),
    "images": Case(small_net, images, {"sparsity": 0.4, "residual": 0.75, "batch_size": 12}),
    "experts": Case(
        lambda: mixture("mixtral"), lambda: tokens(16, 24), {"neurons": 0.5, "batch_size": 3}
    ),
}
TWO_BATCHES = Case(lambda: tiny("llama-gqa"), tokens, {"sparsity": 0.5, "damp": None})
"""Of seven samples, and of one that is held out."""


ALL = {**CASES, "two batches": TWO_BATCHES}


def cases(directory: Path, names: Sequence[str]) -> None:
    """Prune in some cases on these ranks, and write down what each comes to."""
    with together() as ranks:
        for name in names:
            result = ALL[name].run(ranks)
            place = directory / f"{name}.{ranks.rank}"
            safetensors.torch.save_file(dict(weights(result.model)), f"{place}.safetensors")
            Path(f"{place}.json").write_text(json.dumps(summary(result)))


def weights(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def summary(result: PruningResult) -> dict[str, Any]:
    return {
        "support": {layer.name: list(layer.support) for layer in result.layers},
        "loss": {layer.name: layer.loss for layer in result.layers},
        "damp": [layer.damp for layer in result.layers],
        "curves": {} if result.budget is None else result.budget.curves,
        "divergence": result.divergence,
        "batch_norms": result.batch_norms,
        "skipped": [group.name for group in result.skipped],
    }


if __name__ == "__main__":
    cases(Path(sys.argv[1]), sys.argv[2:])
