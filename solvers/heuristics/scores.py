"""Backends that rank the units once, by a score, and keep the best: the baselines of the field."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from solvers.problem import NO_ROW, SubsetProblem
from solvers.protocol import Backend, BackendKind, Seed, Selection, Status


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
        total += torch.where(consumer.rows == NO_ROW, 0.0, scores[consumer.rows]).sum(1)
    return total
