"""Linear cuts under the loss, and the loop that lets a mixed-integer solver close the gap.

For multipliers Y the cost of removing the units in x is at least ``2 a'x - x'Q x`` at every binary
x (`solvers.bounds.removal`), with equality at x_bar if Y is optimal there.  With a diagonal q >= Q
that is a convex function, and its tangent at x_bar a cut

    cost(x) >= slopes' x - constant      at every binary x with r ones,

valid everywhere and tight at a binary x_bar.  A master problem with one binary a unit and one
variable for the cost therefore converges to the optimum, after finitely many cuts (Duran and
Grossmann, "An outer-approximation algorithm for a class of mixed-integer nonlinear programs",
Mathematical Programming 36, 1986).  Consumers are summed up inside a and Q: one cut serves all.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor

from solvers.bounds.quadratic import QuadraticBound, made_dominating, scaled_diagonal
from solvers.bounds.relaxation import Effort, Relaxation, relax
from solvers.bounds.removal import ConsumerRemoval, RemovalTerms
from solvers.certificates.certificate import LEAST_SHARE
from solvers.closed_forms.refit import Incumbent, refit_loss_and_rounding
from solvers.closed_forms.row_blocks import unit_rows
from solvers.exact.enumeration import Enumerate
from solvers.heuristics.local_search import LocalSearch
from solvers.problem import SubsetProblem
from solvers.protocol import (
    DEFAULT_GAP_TOLERANCE,
    Backend,
    BackendKind,
    Seconds,
    Selection,
    Status,
    Tolerance,
)

Array = NDArray[np.float64]

_COUPLING = 1.25
"""How much of the price of q the multipliers anticipate away from the point of a cut."""

_TOWARDS_CORE = 0.3
_STEEPEST = 1e6
_COST_CAP = 2.0
"""In units of the incumbent's cost: what costs more need not be told apart."""

TOLERANCE = 1e-9
"""The feasibility and optimality tolerances that solvers are asked for."""

SOLVER_SLACK = 2e-7
"""What a bound gives up for them, in the cost's unit: one for each of 200 units."""


Cut = tuple[Array, float]
"""``cost >= slopes @ x - constant``, for the indicator x of removed units and in `Search.unit`."""


@dataclass(frozen=True)
class MixedInteger(Backend):
    """A search by a mixed-integer solver, which starts from the swap optimum.

    Parameters
    ----------
    time_limit
        Seconds for the whole solve.
    gap_tolerance
        Relative gap at which the answer counts as optimal.
    threads
        Threads of the solver; 0 leaves the choice to it.
    start
        Units to start the warm-starting local search from; by default it starts from greedy.
    """

    kind: ClassVar[BackendKind] = BackendKind.EXACT
    time_limit: Seconds = 60.0
    gap_tolerance: Tolerance = DEFAULT_GAP_TOLERANCE
    threads: Annotated[int, Interval(ge=0, le=1024)] = 1
    start: tuple[int, ...] | None = None

    def select(self, problem: SubsetProblem) -> Selection:
        """Search, unless there is no choice."""
        if problem.keep == problem.units:
            return Enumerate().select(problem)
        return self.solve(Search(problem, self))

    @abstractmethod
    def solve(self, search: Search) -> Selection:
        """Close the gap of a search."""


class Search(Incumbent):
    """The incumbent, an oracle of cuts, and what a solver's bound of the cost proves."""

    def __init__(self, problem: SubsetProblem, limits: MixedInteger) -> None:
        self.deadline = time.perf_counter() + limits.time_limit
        super().__init__(problem, LocalSearch(start=limits.start).select(problem).support)
        self.limits = limits
        self.terms = RemovalTerms.of(problem)
        self.root: Relaxation = relax(self.terms, Effort())
        self.unit = max(self.loss - self.terms.constant, 1e-9 * problem.empty_loss) or 1.0
        self.cuts = 0

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.perf_counter()

    @property
    def cutoff(self) -> float:
        """The cost, in units, at which a bound proves the incumbent optimal within tolerance."""
        target = self.loss * (1 - self.limits.gap_tolerance)
        return self.terms.cost_reaching(target) / self.unit + SOLVER_SLACK

    def removed(self) -> Array:
        """Return the indicator of the units that the incumbent removes."""
        x = np.ones(self.problem.units)
        x[self.support.cpu().numpy()] = 0.0
        return x

    def offer_point(self, point: Array) -> None:
        """Take a binary point as the incumbent if its refit is better."""
        kept = np.sort(np.argsort(point, kind="stable")[: self.problem.keep])
        self.offer(torch.from_numpy(kept).to(self.problem.device))

    def answer(self, cost: float, solver: str, *, timed_out: bool) -> Selection:
        """Turn a solver's bound of the cost, in units of `Search.unit`, into an answer.

        A gap that is left though the search has not `timed_out` is one that rounding hides.
        """
        lower, certificate = self.terms.certified((cost - SOLVER_SLACK) * self.unit), None
        if not lower > self.root.value:
            lower, certificate = self.root.claim
        lower = min(lower, self.loss)
        rounding = refit_loss_and_rounding(self.problem, self.support)[1]
        closed = self.loss - lower <= self.limits.gap_tolerance * self.loss + rounding
        left_open = Status.TIME_LIMIT if timed_out else Status.PRECISION_LIMIT
        return Selection(
            self.support,
            Status.OPTIMAL if closed else left_open,
            lower_bound=lower,
            bound_from=f"outer approximation by {solver}, {self.cuts} cuts",
            iterations=self.cuts,
            history=tuple(self.history),
            gap_tolerance=self.limits.gap_tolerance,
            certificate=certificate,
        )

    def root_cut(self) -> Cut:
        """Return the cut of the root relaxation."""
        return self._as_cut(self.root.bound)

    def cuts_at(self, point: Array) -> tuple[Cut, ...]:
        """Return cuts for a binary point: tight at it, stronger around it, and mild.

        The second lies on the way to the minimizer of the root relaxation (Magnanti and Wong,
        "Accelerating Benders decomposition", Operations Research 29, 1981).  The last says that the
        cost is not negative unless all these units go, and then at least what it is, up to a cap
        (Laporte and Louveaux, "The integer L-shaped method", Operations Research Letters 13, 1993):
        near a singular H the slopes of the others exceed what solvers can tell from rounding.
        """
        core = self.root.bound.point.cpu().numpy()
        tight = self.cut(point)
        cost = min(float(tight[0] @ point) - tight[1], _COST_CAP)
        mild = cost * point, cost * (self.terms.removals - 1)
        steep = (tight, self.cut(point + _TOWARDS_CORE * (core - point)))
        return (mild, *(cut for cut in steep if np.abs(cut[0]).max() < _STEEPEST))

    def cut(self, point: Array) -> Cut:
        """Return a cut at a point of the polytope, tight if it is binary."""
        x = torch.from_numpy(point).to(self.problem.device).clamp(0.0, 1.0)
        parts = [c.aggregate(_multipliers(c, x)) for c in self.terms.consumers]
        a, Q, magnitudes = (sum(sums[1:], sums[0]) for sums in zip(*parts, strict=True))
        Q = (Q + Q.T) / 2
        q = scaled_diagonal(Q, torch.ones_like(a))
        self.cuts += 1
        return self._as_cut(
            made_dominating(QuadraticBound(a, Q, self.terms.removals, q, x, magnitudes))
        )

    def _as_cut(self, bound: QuadraticBound) -> Cut:
        return bound.slopes.cpu().numpy() / self.unit, bound.offset / self.unit


def _multipliers(consumer: ConsumerRemoval, x: Tensor) -> Tensor:
    """Return multipliers that suit x, and are optimal for the removed units if x is binary."""
    Y = consumer.multipliers(x.clamp(min=LEAST_SHARE), torch.full_like(x, _COUPLING))
    removed = torch.nonzero(x == 1).flatten()
    if len(removed) == int(x.count_nonzero()):
        rows = unit_rows(removed, consumer.width)
        factor = torch.linalg.cholesky(consumer.A[rows[:, None], rows])
        Y[rows] = torch.cholesky_solve(consumer.W[rows], factor)
    return Y
