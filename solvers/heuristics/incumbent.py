"""The best support that a search knows."""

from __future__ import annotations

from torch import Tensor

from solvers.closed_forms.refit import refit_loss
from solvers.problem import SubsetProblem


class Incumbent:
    """The best support that was offered, (k,) int64, and how its loss fell."""

    def __init__(self, problem: SubsetProblem, support: Tensor) -> None:
        self.problem = problem
        self.support = support
        self.history = [refit_loss(problem, support)]

    @property
    def loss(self) -> float:
        """Loss of the best support."""
        return self.history[-1]

    def offer(self, support: Tensor) -> bool:
        """Take a support if its refit is better; return whether it is."""
        loss = refit_loss(self.problem, support)
        if not loss < self.loss:
            return False
        self.support = support
        self.history.append(loss)
        return True
