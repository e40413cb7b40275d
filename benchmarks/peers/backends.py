"""Run this toolkit, the methods that it implements, and the paper's public code within its walk."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import osscar
import solvers
from benchmarks import official, quality
from benchmarks.peers.case import Case, Form, Smaller
from benchmarks.peers.page import OURS

FLAP = "FLAP, equal shares"
METHODS: dict[str, dict[str, Any]] = {
    OURS: quality.METHODS["default"],
    "multistage (the paper's)": quality.METHODS["multistage (the paper's)"],
    "wanda, biases alone": {**quality.UNIFORM, "backend": "wanda", "damp": 1e9},
    FLAP: quality.METHODS["flap's compensation"],
}
"""Fields of the request.  Sun et al., "A simple and effective pruning approach for large language
models" (Wanda), ICLR 2024, arXiv 2306.11695, in its structured form; An et al.,
"Fluctuation-based adaptive structured pruning" (FLAP), AAAI 2024, arXiv 2312.11983: neither refits
weights.  FLAP's mean output of what leaves is added to the bias of what reads it, where it has
one, and batch-norm statistics are corrected."""


def prune(case: Case, name: str) -> Smaller:
    """Prune with this toolkit."""
    return _pruned(case, quality.request_of(case.setting, METHODS[name], lambda: case.size))


def public_code(case: Case) -> Smaller:
    """Prune as the paper does, with the functions of its public code choosing the units."""
    if case.options.official is None:
        raise FileNotFoundError("needs --official, a checkout of github.com/mazumder-lab/OSSCAR")
    method = {**quality.UNIFORM, "backend": PublicCode(str(case.options.official))}
    return _pruned(case, quality.request_of(case.setting, method, lambda: case.size))


def with_counts(case: Case, counts: dict[str, int]) -> Smaller:
    """Prune to so many units of each group, by FLAP's score, with biases alone."""
    return _pruned(case, {**METHODS[FLAP], "allocation": "measured", "groups": counts})


def _pruned(case: Case, asked: dict[str, Any]) -> Smaller:
    device = case.options.device
    result = osscar.prune(case.model, case.data, device=device, seed=case.seed, **asked)
    return Smaller(result.model, Form.OSSCAR, result)


@dataclass(frozen=True)
class PublicCode(solvers.Backend):
    """Choose units by `OSSCAR_fastprune` and `OSSCAR_local_search`.

    Neurons leave 10 at a time, and 10 are exchanged, as its command line does by default; heads
    leave 2 at a time and 5 are exchanged; channels, which it does not know, leave one at a time.
    """

    kind: ClassVar[Any] = solvers.BackendKind.HEURISTIC
    summary: ClassVar[str] = "the paper's public code"
    capabilities: ClassVar[Any] = solvers.Capabilities(several_consumers=False)
    checkout: str

    def select(self, problem: solvers.SubsetProblem) -> solvers.Selection:
        """Return the support that comes back."""
        if self.checkout not in sys.path:
            sys.path.insert(0, self.checkout)
        code = importlib.import_module("prune_algo")
        (one,) = problem.consumers
        rows = one.rows.shape[1]
        batch, swaps = (official.BATCH, official.SWAPS) if rows == 1 else (1, 1)
        if rows > 9:
            batch, swaps = official.HEADS_BATCH, official.HEADS_SWAPS
        swaps = min(swaps, problem.keep - 1, problem.units - problem.keep)
        found = official.official(code, batch, swaps, problem, *official.in_blocks(problem))
        return solvers.Selection(torch.as_tensor(found), solvers.Status.FEASIBLE)
