"""The baselines of the field: scores, greedy elimination, and the paper's stages."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.pivot import PivotState
from solvers.closed_forms.refit import Incumbent, refit_loss
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, BackendKind, Natural, Positive, Seed, Selection, Status


class Scored(Backend):
    """Keep the units, or experts, with the highest score; the first of equals stays."""

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC

    @abstractmethod
    def scores(self, problem: Any) -> Tensor:
        """Return one score a unit, (n,) float64."""

    def select(self, problem: Any) -> Selection:
        """Rank the units and keep the best."""
        best = problem.highest(self.scores(problem))
        return Selection(best, Status.FEASIBLE, iterations=1)


@dataclass(frozen=True)
class Random(Scored):
    """Keep a random subset: the floor that every other backend has to clear."""

    summary: ClassVar[str] = "a random choice; the floor for comparisons"
    seed: Seed = 0

    def scores(self, problem: Any) -> Tensor:
        """Draw from a generator seeded with `seed`, on the CPU, so that devices agree."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(problem.units, generator=generator, dtype=torch.float64)
        return draws.to(problem.device)


@dataclass(frozen=True)
class Magnitude(Scored):
    """Keep the units whose dense weights have the largest Euclidean norm."""

    summary: ClassVar[str] = "largest norm of the dense weights that read the unit"

    def scores(self, problem: SubsetProblem) -> Tensor:
        """Return the squared norm of the rows of each unit, summed over the consumers."""
        return unit_sums(problem, [c.W0.square().sum(1) for c in problem.consumers])


@dataclass(frozen=True)
class Wanda(Scored):
    """Keep the units with the largest weight norm times input norm.

    The structured form of Sun et al., "A simple and effective pruning approach for large language
    models" (Wanda), ICLR 2024: rows of a unit are combined by their sum of squares.
    """

    summary: ClassVar[str] = "largest norm of dense weights times norm of their inputs"

    def scores(self, problem: SubsetProblem) -> Tensor:
        """Return ``sum over rows of |W0_r|^2 mean(x_r^2)`` for each unit."""
        scores = [
            c.W0.square().sum(1) * (c.hessian.diagonal() - c.damping) for c in problem.consumers
        ]
        return unit_sums(problem, scores)


def unit_sums(problem: SubsetProblem, row_scores: list[Tensor]) -> Tensor:
    """Add up the scores of the rows of each unit over the consumers, (n,)."""
    total = torch.zeros(problem.units, dtype=torch.float64, device=problem.device)
    for consumer, scores in zip(problem.consumers, row_scores, strict=True):
        total += scores[consumer.rows].sum(1)
    return total


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
        most, stages = self.stage_size or (10 if scalar else 2), 0
        while (surplus := len(state.support) - problem.keep) > 0:
            state.sweep(_smallest(state.removal_losses(), min(most, surplus)))
            stages += 1
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


def _smallest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the smallest values; the first of equals first."""
    return torch.argsort(values, stable=True)[:count]
