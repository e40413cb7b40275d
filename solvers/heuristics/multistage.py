"""The multi-stage procedure of the OSSCAR paper, with its batched local search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.closed_forms.pivot import PivotState
from solvers.closed_forms.refit import Incumbent
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, BackendKind, Natural, Positive, Selection, Status


@dataclass(frozen=True)
class Multistage(Backend):
    """Remove t units a stage, then exchange batches of units while that lowers the loss.

    Meng et al., OSSCAR, ICML 2024: in each stage all units are scored exactly as if they left
    alone, the t cheapest leave together, and the refit is updated by a low-rank term.  The local
    search removes a batch of the cheapest kept units, scores the removed ones exactly as if they
    entered alone, and lets the best enter together; it ends with the first batch that fails.

    Parameters
    ----------
    stage_size
        t; by default 10 for units of one row and 2 for wider ones, as in the paper's experiments.
    batch_size
        Units exchanged at once; by default 10 for units of one row and 5 for wider ones.
    max_batches
        The most batches of the local search; 0 turns it off.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "the paper's: t units removed a stage, then batches of swaps"
    stage_size: Positive | None = None
    batch_size: Positive | None = None
    max_batches: Natural = 20

    def select(self, problem: SubsetProblem) -> Selection:
        """Remove in stages, then exchange in batches."""
        scalar = problem.width == 1
        state = PivotState.full(problem)
        stages = self._remove(state, self.stage_size or (10 if scalar else 2))
        best = Incumbent(problem, state.support)
        batch = min(self.batch_size or (10 if scalar else 5), problem.keep, len(state.removed))
        for _ in range(self.max_batches if batch else 0):
            state.sweep(_smallest(state.removal_losses(), batch))  # the cheapest leave
            state.sweep(_smallest(-state.addition_gains(), batch))  # the most useful enter
            if not best.offer(state.support):
                break
        return Selection(
            best.support,
            Status.FEASIBLE,
            iterations=stages + len(best.history) - 1,
            history=tuple(best.history),
        )

    @staticmethod
    def _remove(state: PivotState, stage_size: int) -> int:
        """Remove down to `keep` units, `stage_size` at a time; return the number of stages."""
        surplus = state.problem.units - state.problem.keep
        sizes = [min(stage_size, surplus - done) for done in range(0, surplus, stage_size)]
        for size in sizes:
            state.sweep(_smallest(state.removal_losses(), size))
        return len(sizes)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the smallest values; the first of equals first."""
    return torch.argsort(values, stable=True)[:count]
