"""The methods of others that this toolkit implements, and the paper's public code in its walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import solvers
from benchmarks import official
from benchmarks.case import Case, Smaller
from benchmarks.page import OURS
from benchmarks.quality import BASELINES, NO_REFIT, PAPER, UNIFORM, prune, run
from osscar.preparation.prepare import prepare
from osscar.walk.gram import GramAccumulator
from osscar.walk.walk import Walk
from solvers.heuristics.baselines import Scored


@dataclass(frozen=True)
class Flap(Scored):
    """Keep the units whose inputs fluctuate most, weighted by the norm of what reads them.

    The metric WIFV of An et al. (`benchmarks.peers.decoders.flap`): a constant input costs nothing,
    since a bias makes up for it.  (Their public code squares the scores of the inputs of heads
    before it adds them up.)
    """

    summary: ClassVar[str] = "largest norm of dense weights times deviation of their inputs"
    fluctuations: Mapping[str, Tensor]
    """By the name of the group."""

    def scores(self, problem: solvers.SubsetProblem) -> Tensor:
        """Return what was measured of the group."""
        return self.fluctuations[problem.name]


def fluctuations(model: nn.Module, data: Any, seed: int) -> dict[str, Tensor]:
    """Return ``sum over rows of |W0_r|^2 var(x_r)`` for each unit of each group, dense."""
    with prepare(model, data, seed=seed) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        steps = Walk(prepared, groups, in_turn=False)
        return {step.group.name: sum(map(_fluctuation, step.grams)) for step in steps}


def _fluctuation(gram: GramAccumulator) -> Tensor:
    sums, own = gram.fitted, gram.linear_map
    variance = sums.gram.diagonal() / sums.positions - sums.means()[0].square()
    rows = own.read_unit_weight().square().sum(1) * variance[own.fixed :]
    return rows[own.unit_rows].sum(1)


METHODS: dict[str, dict[str, Any]] = {
    OURS: BASELINES[OURS],
    PAPER: BASELINES[PAPER],
    "wanda, biases alone": {**UNIFORM, "backend": "wanda", "damp": NO_REFIT},
}
"""Fields of the request.  Sun et al., "A simple and effective pruning approach for large language
models" (Wanda), ICLR 2024, arXiv 2306.11695, in its structured form, which refits no weights."""


def with_counts(case: Case, counts: dict[str, int]) -> Smaller:
    """Prune to so many units of each group, by FLAP's score, with biases alone."""
    backend = Flap(fluctuations(case.model, case.data, case.seed))
    fields = {**UNIFORM, "backend": backend, "damp": NO_REFIT}
    return run(case, {**fields, "allocation": "measured", "groups": counts})


def public_code(case: Case) -> Smaller:
    """Prune as the paper does, with the functions of its public code choosing the units."""
    if case.options.official is None:
        raise FileNotFoundError("needs --official, a checkout of github.com/mazumder-lab/OSSCAR")
    return prune(case, {**UNIFORM, "backend": PublicCode(str(case.options.official))})


@dataclass(frozen=True)
class PublicCode(solvers.Backend):
    """Choose units by `OSSCAR_fastprune` and `OSSCAR_local_search`.

    As many leave and are exchanged at a time as by its command line; but channels, which it does
    not know, leave one at a time.
    """

    kind: ClassVar[Any] = solvers.BackendKind.HEURISTIC
    summary: ClassVar[str] = "the paper's public code"
    capabilities: ClassVar[Any] = solvers.Capabilities(several_consumers=False)
    checkout: str

    def select(self, problem: solvers.SubsetProblem) -> solvers.Selection:
        """Return the support that comes back."""
        code = official.public_code(Path(self.checkout))
        batch, swaps = official.at_a_time(problem)
        if 1 < problem.consumers[0].rows.shape[1] <= 9:
            batch, swaps = 1, min(1, swaps)
        found = official.official(code, batch, swaps, problem, *official.in_blocks(problem))
        return solvers.Selection(torch.as_tensor(found), solvers.Status.FEASIBLE)
