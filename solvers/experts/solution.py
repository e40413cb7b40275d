"""Solve a problem of experts, and check what a backend says of its answer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from solvers.errors import BackendError, ProblemError, VerificationError
from solvers.experts.backends import MOST_SETS, ROUNDING, best_of_all, set_count
from solvers.experts.losses import losses_of
from solvers.experts.problem import ExpertProblem
from solvers.protocol import Backend, Status
from solvers.registry import EXPERT_BACKENDS
from solvers.solution import Solution
from solvers.solve import answer_of, checked_selection, chosen_backend
from solvers.verification import Verification, check_fields, check_support, require

_FIELDS = (
    *("support", "loss", "status", "lower_bound", "history", "iterations", "seconds"),
    *("backend", "bound_from"),
)
_STATUSES = (Status.FEASIBLE, Status.ITERATION_LIMIT, Status.SWAP_OPTIMAL, Status.OPTIMAL)
"""What can be said of a choice of experts."""

_EXCHANGE_TOLERANCE = 1e-6
"""An exchange refutes a swap optimum if it gains more than this share of the loss."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertSolution(Solution):
    """The experts that stay, and what is claimed of them: a `Solution` without weights."""

    problem: ExpertProblem = field(repr=False)  # type: ignore[assignment]

    def verify(self) -> Verification:
        """Recompute, from the problem alone, what this solution claims.

        The loss is computed by routing all tokens.  Where no exchange is said to help, all are
        tried; where none is said to be better, all sets are.

        Raises
        ------
        VerificationError
            If a claim is false, or not well formed.
        """
        check_fields(self, _FIELDS)
        require(self.status in _STATUSES, f"status {self.status.name} is none of experts")
        problem, support = self.problem, self.support
        check_support(problem, support)
        try:
            loss = problem.loss(support)
        except ProblemError as error:
            raise VerificationError(f"support is not valid: {error}") from error
        slack = ROUNDING * (problem.scale + loss)
        require(
            abs(loss - self.loss) <= slack,
            f"loss is {loss:.9g} when recomputed, claimed {self.loss:.9g}",
        )
        require(
            self.lower_bound <= loss + slack, f"bound {self.lower_bound} lies above the loss {loss}"
        )
        gain = least = math.nan
        if self.status is Status.SWAP_OPTIMAL:
            kept = torch.zeros(problem.experts, dtype=torch.bool, device=support.device)
            kept[support] = True
            gain = loss - float(losses_of(problem).exchanges(kept).min())
            require(
                gain <= _EXCHANGE_TOLERANCE * loss + slack,
                f"not a swap optimum: an exchange lowers the loss {loss:.9g} by {gain:.3g}",
            )
        if self.status is Status.OPTIMAL:
            sets = set_count(problem)
            require(
                sets <= MOST_SETS, f"an optimum of {sets} sets cannot be recomputed: say FEASIBLE"
            )
            _, least = best_of_all(problem)
            require(loss <= least + 2 * slack, f"loss is {loss:.9g}, and {least:.9g} is possible")
            require(self.lower_bound <= least + slack, f"bound {self.lower_bound} exceeds {least}")
        said = self.lower_bound > -math.inf and not math.isfinite(least)
        scale = problem.scale or 1.0
        return Verification(
            loss,
            abs(loss - self.loss) / scale,
            swap_gain=gain / scale,
            lower_bound=least,
            tolerance=slack,
            not_recomputed=("lower_bound",) if said else (),
        )


def solve_experts(
    problem: ExpertProblem, backend: str | Backend = "local_search", **options: Any
) -> ExpertSolution:
    """Choose which experts stay, with the named backend.

    Parameters
    ----------
    problem
        What to solve.
    backend
        The name of one of ``solvers.backends(solvers.EXPERT_BACKENDS)``, or a backend object with
        its options set.
    **options
        Options of the named backend.

    Raises
    ------
    BackendError
        If the backend is unknown, fails, or answers with what is no choice.
    """
    name, chosen = chosen_backend(backend, options, {}, EXPERT_BACKENDS)
    start = time.perf_counter()
    with torch.no_grad():
        selection = checked_selection(name, answer_of(name, chosen, problem), problem)
        try:
            loss = problem.loss(selection.support)
        except ProblemError as error:
            raise BackendError(
                f"backend {name!r} did not return a valid selection: {error}"
            ) from error
    seconds = time.perf_counter() - start
    return ExpertSolution(
        problem=problem, backend=name, loss=loss, seconds=seconds, **vars(selection)
    )
