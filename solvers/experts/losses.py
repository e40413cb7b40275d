"""Losses of sets of experts, of all removals and of all exchanges, as the searches ask for them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from solvers.experts.problem import ExpertProblem
from solvers.experts.ranked import RankedLosses
from solvers.experts.rerouted import ReroutedLosses


class Losses(Protocol):
    """Losses of sets of experts, given as masks, (experts,) bool."""

    def loss(self, kept: Tensor) -> float:
        """Return the loss of a set of at least `keep` experts, in groups of any size."""

    def removals(self, kept: Tensor) -> Tensor:
        """Return the losses of a set less each of its experts, (experts,); inf for the others."""

    def exchanges(self, kept: Tensor) -> Tensor:
        """Return the losses with a in place of r, (experts r, experts a).

        They are infinite where r does not stay, a does, or they are of different groups.
        """


def losses_of(problem: ExpertProblem) -> Losses:
    """Return the losses of a problem's choices."""
    fixed = problem.rule.groups == 1 and not problem.rule.reorders(problem.choice_bias)
    return RankedLosses(problem) if fixed else ReroutedLosses(problem)
