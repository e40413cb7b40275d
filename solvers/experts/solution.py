"""Solve a problem of experts, and check what a backend says of its answer."""

from __future__ import annotations

import math
import reprlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from solvers.errors import BackendError, ProblemError, VerificationError
from solvers.experts.backends import MOST_SETS, ROUNDING, ExpertBackend, best_of_all, set_count
from solvers.experts.losses import losses_of
from solvers.experts.problem import ExpertProblem
from solvers.protocol import DEFAULT_GAP_TOLERANCE, Status
from solvers.registry import EXPERT_BACKENDS
from solvers.solution import Choice, SolutionRecord
from solvers.solve import answer_of, checked_selection, chosen_backend
from solvers.verification import check_fields, check_support

_FIELDS = (
    *("support", "loss", "status", "lower_bound", "history", "iterations", "seconds"),
    *("backend", "bound_from"),
)
_STATUSES = (Status.FEASIBLE, Status.ITERATION_LIMIT, Status.SWAP_OPTIMAL, Status.OPTIMAL)
"""What can be said of a choice of experts."""

_EXCHANGE_TOLERANCE = 1e-6
"""An exchange refutes a swap optimum if it gains more than this share of the loss."""


@dataclass(frozen=True)
class ExpertVerification:
    """Numbers recomputed from the problem alone.

    Parameters
    ----------
    loss
        Loss of the experts that stay, by the router's own rule.
    loss_error
        Its distance from the claimed loss, relative to `ExpertProblem.scale`.
    exchange_gain
        By how much the best exchange lowers the loss, relative to that; NaN unless claimed that
        none does.
    not_recomputed
        ``("lower_bound",)`` where a bound is the backend's word.
    """

    loss: float
    loss_error: float
    exchange_gain: float = math.nan
    not_recomputed: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertSolution(Choice):
    """The experts that stay, and what is claimed of them: a `Choice` for an `ExpertProblem`."""

    problem: ExpertProblem = field(repr=False)

    def verify(self) -> ExpertVerification:
        """Recompute, from the problem alone, what this solution claims.

        The loss is computed by routing all tokens.  Where no exchange is said to help, all are
        tried; where none is said to be better, all sets are.

        Raises
        ------
        VerificationError
            If a claim is false, or not well formed.
        """
        check_fields(self, _FIELDS)
        _require(self.status in _STATUSES, f"status {self.status.name} is none of experts")
        problem, support = self.problem, self.support
        check_support(problem, support)
        try:
            loss = problem.loss(support)
        except ProblemError as error:
            raise VerificationError(f"support is none: {error}") from error
        slack = ROUNDING * (problem.scale + loss)
        _require(
            abs(loss - self.loss) <= slack,
            f"loss is {loss:.9g} when recomputed, claimed {self.loss:.9g}",
        )
        _require(
            self.lower_bound <= loss + slack, f"bound {self.lower_bound} lies above the loss {loss}"
        )
        gain = math.nan
        if self.status is Status.SWAP_OPTIMAL:
            gain = self._exchange_gain(loss)
            _require(
                gain <= _EXCHANGE_TOLERANCE * loss + slack,
                f"not a swap optimum: an exchange lowers the loss {loss:.9g} by {gain:.3g}",
            )
        bounded = self.lower_bound > -math.inf
        if self.status is Status.OPTIMAL:
            sets = set_count(problem)
            _require(
                sets <= MOST_SETS, f"an optimum of {sets} sets cannot be recomputed: say FEASIBLE"
            )
            _, least = best_of_all(problem)
            _require(loss <= least + 2 * slack, f"loss is {loss:.9g}, and {least:.9g} is possible")
            _require(self.lower_bound <= least + slack, f"bound {self.lower_bound} exceeds {least}")
            bounded = False
        scale = problem.scale or 1.0
        return ExpertVerification(
            loss,
            abs(loss - self.loss) / scale,
            gain / scale,
            ("lower_bound",) if bounded else (),
        )

    def _exchange_gain(self, loss: float) -> float:
        kept = torch.zeros(self.problem.experts, dtype=torch.bool, device=self.support.device)
        kept[self.support] = True
        return loss - float(losses_of(self.problem).exchanges(kept).min())

    def record(self, verification: ExpertVerification | None = None) -> SolutionRecord:
        """Return the summary of this solution, with what a verification recomputed of its bound."""
        word = verification is None or "lower_bound" in verification.not_recomputed
        recomputed = math.nan if word else self.lower_bound
        return self._record(self.loss, recomputed, math.inf, DEFAULT_GAP_TOLERANCE)


def _require(condition: bool, otherwise: str) -> None:
    """Refuse the solution unless a condition holds; with NaN none does."""
    if not condition:
        raise VerificationError(otherwise)


def solve_experts(
    problem: ExpertProblem, backend: str | ExpertBackend = "local_search", **options: Any
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
    ProblemError
        If `problem` is no ExpertProblem.
    """
    if not isinstance(problem, ExpertProblem):
        raise ProblemError(f"problem is {reprlib.repr(problem)}; it must be an ExpertProblem")
    name, chosen = chosen_backend(backend, options, {}, EXPERT_BACKENDS)
    start = time.perf_counter()
    with torch.no_grad():
        selection = checked_selection(name, answer_of(name, chosen, problem), problem)
        try:
            loss = problem.loss(selection.support)
        except ProblemError as error:
            raise BackendError(
                f"backend {name!r} answered with what is no selection: {error}"
            ) from error
    seconds = time.perf_counter() - start
    return ExpertSolution(
        problem=problem, backend=name, loss=loss, seconds=seconds, **vars(selection)
    )
