"""Linear cuts under the loss, and the loop that lets a mixed-integer solver close the gap.

For multipliers Y the cost of removing the units in x is at least ``2 a'x - x'Q x`` at every binary
x (`solvers.bounds.removal`), with equality at x_bar if Y is optimal there.  With a diagonal q >= Q
that is a convex function, and its tangent at x_bar a cut

    cost(x) >= slopes' x - constant      at every binary x with r ones,

valid everywhere and tight at a binary x_bar.  A master problem with one binary a unit and one
variable for the cost therefore converges to the optimum, after finitely many cuts (Duran and
Grossmann, "An outer-approximation algorithm for a class of mixed-integer nonlinear programs",
Mathematical Programming 36, 1986).  Consumers are summed up inside a and Q: one cut serves all.

HiGHS solves it again and again, with a cut at what it found.  Gurobi searches one tree, to which
cuts are added.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

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
    Capabilities,
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


_FRACTIONAL_ROUNDS = 40
_ROUND_PROGRESS = 1e-4


@dataclass(frozen=True)
class Highs(MixedInteger):
    """Prove which support is best with an open-source solver.

    The linear relaxation is tightened by cuts at its own optima first.  Then the integer search is
    solved again and again, each time with a cut at what it found: its bound rises to the optimum.
    """

    summary: ClassVar[str] = "outer approximation as a linear integer program, without a licence"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=200, devices=("cpu",))
    package: ClassVar[str] = "highspy"

    def solve(self, search: Search) -> Selection:
        """Alternate between the master problem and cuts at its solutions."""
        model = _Model(search.problem.units, search.terms.removals, self.threads)
        for cut in (search.root_cut(), search.cut(search.removed())):
            model.add(cut)
        bound = _tighten_relaxation(model, search)
        model.make_integer()
        seen = set[bytes]()
        while bound < search.cutoff and (left := search.seconds_left) > 0:
            proved, point = model.solve(left)
            bound = max(bound, proved)
            if point is None:
                break
            point = np.round(point)
            search.offer_point(point)
            if point.tobytes() in seen:
                break
            seen.add(point.tobytes())
            for cut in search.cuts_at(point):
                model.add(cut)
        return search.answer(bound, "HiGHS", timed_out=search.seconds_left <= 0)


def _tighten_relaxation(model: _Model, search: Search) -> float:
    """Add cuts at fractional optima while they raise the bound; return the bound."""
    bound = 0.0
    for _ in range(_FRACTIONAL_ROUNDS):
        left = search.seconds_left
        if left <= 0:
            break
        value, point = model.solve(left)
        if point is None:
            break
        progress, bound = value - bound, max(bound, value)
        if bound >= search.cutoff or progress < _ROUND_PROGRESS:
            break
        model.add(search.cut(point))
    return bound


_REDIRECTED = threading.RLock()


@contextmanager
def without_prints() -> Iterator[None]:
    """Keep off standard output, which may be JSON, what HiGHS prints: no option of it does.

    It is that of the whole process, so that threads take turns.
    """
    with _REDIRECTED, ExitStack() as undo:
        try:
            terminal = os.dup(1)
        except OSError:  # it is closed, and nothing can be printed
            yield
            return
        undo.callback(os.close, terminal)
        undo.callback(os.dup2, terminal, 1)
        undo.callback(_flush_c)
        with suppress(AttributeError, OSError, ValueError):  # Python may have none
            sys.stdout.flush()
        _flush_c()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        undo.callback(os.close, nowhere)
        os.dup2(nowhere, 1)
        yield


def _flush_c() -> None:
    """Write out what C has kept back for standard output, as it does for a pipe."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)


class _Model:
    """The master problem: indicators of removed units, and the cost above all cuts."""

    def __init__(self, units: int, removals: int, threads: int) -> None:
        import highspy

        self._highspy: Any = highspy
        self._units = units
        with without_prints():
            self._solver: Any = highspy.Highs()
        self._solver.setOptionValue("output_flag", False)
        self._solver.setOptionValue("threads", threads)
        self._solver.setOptionValue("mip_rel_gap", 1e-7)
        for name in ("primal", "dual", "mip"):
            self._solver.setOptionValue(f"{name}_feasibility_tolerance", TOLERANCE)
        infinity = highspy.kHighsInf
        for _ in range(units):
            self._solver.addVar(0.0, 1.0)
        self._solver.addVar(0.0, infinity)
        self._solver.changeColCost(units, 1.0)
        self._add_row(float(removals), float(removals), np.r_[np.ones(units), 0.0])

    def add(self, cut: Cut) -> None:
        """Add ``cost - slopes @ x >= -constant``."""
        slopes, constant = cut
        self._add_row(-constant, self._highspy.kHighsInf, np.r_[-slopes, 1.0])

    def _add_row(self, lower: float, upper: float, values: Array) -> None:
        index = np.flatnonzero(values).astype(np.int32)
        self._solver.addRow(lower, upper, len(index), index, values[index])

    def make_integer(self) -> None:
        """Require binary indicators from now on."""
        for column in range(self._units):
            self._solver.changeColIntegrality(column, self._highspy.HighsVarType.kInteger)

    def solve(self, seconds: float) -> tuple[float, Array | None]:
        """Return the proved bound of the cost, and the point found, if any."""
        # HiGHS counts the time of all its runs together.
        used = self._solver.getRunTime()
        self._solver.setOptionValue("time_limit", used + seconds)
        self._solver.run()
        info = self._solver.getInfo()
        integer = info.mip_node_count >= 0
        bound = float(info.mip_dual_bound if integer else info.objective_function_value)
        found = info.primal_solution_status == self._highspy.kSolutionStatusFeasible
        finished = self._solver.getModelStatus() == self._highspy.HighsModelStatus.kOptimal
        if not found or not (integer or finished):
            return max(bound, 0.0) if integer else 0.0, None
        values = np.asarray(self._solver.getSolution().col_value, dtype=np.float64)
        return bound, np.clip(values[: self._units], 0.0, 1.0)


_VIOLATION = 1e-7
_ROOT_CUTS = 40


@dataclass(frozen=True)
class Gurobi(MixedInteger):
    """Prove which support is best with Gurobi, started from the swap optimum.

    The program has one binary a unit and one variable for the cost; cuts are added where the solver
    finds integer points, and at the fractional points of the root node
    (`solvers.exact.outer_approximation`).  The licence that comes with the pip wheel suffices.
    """

    summary: ClassVar[str] = "outer approximation by lazy cuts; the free licence suffices"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=1999, devices=("cpu",))
    package: ClassVar[str] = "gurobipy"

    def solve(self, search: Search) -> Selection:
        """Search one tree: of the indicators of removed units, and the cost above all cuts."""
        import gurobipy

        with (
            gurobipy.Env(params={"OutputFlag": 0}) as environment,
            gurobipy.Model(env=environment) as model,
        ):
            x = model.addMVar(search.problem.units, vtype="B")
            x.setAttr("Start", search.removed())
            model.addConstr(x.sum() == search.terms.removals)
            cost = model.addVar(obj=1.0)
            for slopes, constant in (search.root_cut(), *search.cuts_at(search.removed())):
                model.addConstr(cost - slopes @ x >= -constant)
            parameters = {
                "TimeLimit": self.time_limit,
                "BestBdStop": search.cutoff,
                "MIPGap": 1e-7,
                "Threads": self.threads,
                # Slopes are steep near a singular H: an almost integral point would slip under its
                # cut.
                "IntFeasTol": TOLERANCE,
                "FeasibilityTol": TOLERANCE,
                "OptimalityTol": TOLERANCE,
                "LazyConstraints": 1,
            }
            for name, value in parameters.items():
                model.setParam(name, value)
            model.optimize(_Cutting(search, x, cost))
            timed_out = model.Status == gurobipy.GRB.TIME_LIMIT
            return search.answer(max(model.ObjBound, 0.0), "Gurobi", timed_out=timed_out)


class _Cutting:
    """Adds cuts where Gurobi finds integer points, and at fractional points of the root node."""

    def __init__(self, search: Search, x: Any, cost: Any) -> None:
        self._search, self._x, self._cost, self._root_cuts = search, x, cost, 0

    def __call__(self, model: Any, where: int) -> None:
        """Add the cuts that a point of the tree violates."""
        from gurobipy import GRB

        codes = GRB.Callback
        if where == codes.MIPSOL:
            point = np.round(model.cbGetSolution(self._x))
            self._search.offer_point(point)
            cuts, cost = self._search.cuts_at(point), model.cbGetSolution(self._cost)
        elif (
            where == codes.MIPNODE
            and self._root_cuts < _ROOT_CUTS
            and model.cbGet(codes.MIPNODE_STATUS) == GRB.OPTIMAL
            and model.cbGet(codes.MIPNODE_NODCNT) == 0
        ):
            self._root_cuts += 1
            point = np.clip(model.cbGetNodeRel(self._x), 0.0, 1.0)
            cuts, cost = (self._search.cut(point),), model.cbGetNodeRel(self._cost)
        else:
            return
        for slopes, constant in cuts:
            if slopes @ point - constant > cost + _VIOLATION:
                model.cbLazy(self._cost - slopes @ self._x >= -constant)
