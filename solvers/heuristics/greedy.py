"""Exact one-at-a-time backward elimination."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch

from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.refit import refit_loss
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, BackendKind, Selection, Status


@dataclass(frozen=True)
class Greedy(Backend):
    """Remove the unit that raises the loss least, refit exactly, repeat.

    The order of ZipLM (Kurtic et al., NeurIPS 2023).  Its history has the loss with n, n - 1, ...
    units kept: with ``keep=1`` that of every number of units.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "exact one-at-a-time backward elimination (ZipLM order)"

    def select(self, problem: SubsetProblem) -> Selection:
        """Eliminate down to `keep` units."""
        removals = eliminate(problem, problem.units - problem.keep)
        everything = torch.arange(problem.units, device=problem.device)
        rises = (risen for _, risen in removals)
        return Selection(
            support_after(removals, problem),
            Status.FEASIBLE,
            iterations=len(removals),
            history=tuple(accumulate(rises, initial=refit_loss(problem, everything))),
        )
