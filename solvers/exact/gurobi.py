"""Two exact models of a problem in Gurobi: the perspective program, and a tree with lazy cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from solvers.errors import BackendError
from solvers.exact.outer_approximation import TOLERANCE, Array, Cut, MixedInteger, Search
from solvers.exact.perspective_miqp import REACH, PerspectiveConsumer, PerspectiveProgram
from solvers.protocol import Capabilities, Selection, missing

_FORMULATIONS = ("auto", "perspective", "outer_approximation")
_FREE_QUADRATIC_VARIABLES = 200
_FREE_SIZE = "2000 variables and 2000 constraints"
_OTHERS = "branch_and_bound or highs"

_WORST_CONDITION = 1e6
_LEAST_COST = 1e-6
"""Beyond both, Gurobi meets numerical trouble in some perspective programs."""

_VIOLATION = 1e-7
_ROOT_CUTS = 40


@dataclass(frozen=True)
class Gurobi(MixedInteger):
    """Prove which support is best with Gurobi, started from the swap optimum.

    Two formulations of the same problem are offered.

    - ``"perspective"``: a mixed-integer second-order cone program in the weights and one binary a
      unit (`solvers.exact.perspective_miqp`).  Its size is that of the weights: 2 variables a unit
      and one a row and response, of units that may go.  The licence that comes with the pip wheel
      takes 200 variables in a quadratic model.
    - ``"outer_approximation"``: one binary a unit and one variable for the cost; cuts are added
      where the solver finds integer points, and at the fractional points of the root node
      (`solvers.exact.outer_approximation`).  That licence takes 2000 variables in a linear model.

    Parameters
    ----------
    time_limit
        Seconds for the tree search.
    gap_tolerance
        Relative gap at which the answer counts as optimal.
    threads
        Threads of the solver; 0 leaves the choice to it.
    formulation
        One of them, or ``"auto"``: the perspective program where it has at most 200 variables, but
        outer approximation where H is near singular and removals cost little but damping (copies of
        an input, damp 1e-7 or less).  There Gurobi gives up on some relaxations of the perspective
        program, which leaves its bound valid and the gap open.
    start
        Units to start the warm-starting local search from; by default it starts from greedy.
    """

    summary: ClassVar[str] = "perspective program, or lazy cuts; the free licence suffices"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=1999, devices=("cpu",))
    formulation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.formulation not in _FORMULATIONS:
            raise BackendError(
                f"gurobi: formulation is {self.formulation!r}; "
                f"choose from {', '.join(_FORMULATIONS)}"
            )

    @classmethod
    def available(cls) -> str | None:
        """Return None, or that gurobipy is missing."""
        return missing("gurobipy")

    def solve(self, search: Search) -> Selection:
        """Search one tree of the chosen formulation."""
        if self.formulation == "outer_approximation":
            return self._approximate(search)
        program = PerspectiveProgram.of(search)
        if self.formulation == "perspective" or _suits(program, search):
            return self._solve_program(search, program)
        return self._approximate(search)

    def _approximate(self, search: Search) -> Selection:
        model = f"outer approximation of {search.problem.units} units"
        with licence_errors(model, _FREE_SIZE, _OTHERS), _Tree(search) as tree:
            tree.run()
            return search.answer_by_cuts(tree.bound, "Gurobi", timed_out=tree.timed_out)

    def _solve_program(self, search: Search, program: PerspectiveProgram) -> Selection:
        model = f"perspective program of {program.variables} variables"
        limit = f"{_FREE_QUADRATIC_VARIABLES} variables in a quadratic model ({_FREE_SIZE} in any)"
        others = f"formulation='outer_approximation', {_OTHERS}"
        with (
            licence_errors(model, limit, others),
            _Program(search, program) as solver,
        ):
            solver.run()
            proof = f"perspective program by Gurobi, {solver.nodes} nodes"
            # What the program leaves out costs a unit or more.
            bound = min(solver.bound, 1.0) - program.slack
            return search.answer(bound, proof, solver.nodes, timed_out=solver.timed_out)


def _suits(program: PerspectiveProgram, search: Search) -> bool:
    """Return whether the free licence takes the program, and the solver can bear its numbers."""
    if program.variables > _FREE_QUADRATIC_VARIABLES:
        return False
    cheap = search.unit < _LEAST_COST * search.problem.empty_loss
    return not (cheap and program.condition > _WORST_CONDITION)


@contextmanager
def licence_errors(model: str, limit: str, others: str) -> Iterator[None]:
    """Turn Gurobi's licence errors into ones that name the limit and what to use instead.

    model: What is being solved, and its size.
    limit: What the licence of the pip wheel takes.
    others: What to use instead.
    """
    import gurobipy

    try:
        yield
    except gurobipy.GurobiError as error:
        if error.errno == gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED:
            raise BackendError(
                f"gurobi: the {model} exceeds the licence, which takes {limit} without a full one; "
                f"install a full licence, or use {others}"
            ) from error
        if error.errno == gurobipy.GRB.Error.NO_LICENSE:
            raise BackendError(f"gurobi: no valid licence ({error}); use {_OTHERS}") from error
        raise


class _Model:
    """What both formulations share: the indicators of removed units, limits and tolerances.

    search: Incumbent and limits.
    removed: The incumbent: which of the units of the model it removes.
    """

    def __init__(self, search: Search, removed: Array) -> None:
        import gurobipy

        self._gurobi: Any = gurobipy
        self._environment: Any = gurobipy.Env(params={"OutputFlag": 0})
        self._model: Any = gurobipy.Model(env=self._environment)
        self._x: Any = self._model.addMVar(len(removed), vtype="B")
        self._x.setAttr("Start", removed)
        self._model.addConstr(self._x.sum() == search.removals)
        self._set(
            TimeLimit=search.limits.time_limit,
            BestBdStop=search.cutoff,
            MIPGap=1e-7,
            Threads=search.limits.threads,
            # Slopes are steep near a singular H: an almost integral point would slip under its cut.
            IntFeasTol=TOLERANCE,
            FeasibilityTol=TOLERANCE,
            OptimalityTol=TOLERANCE,
        )

    def _set(self, **parameters: float) -> None:
        for name, value in parameters.items():
            self._model.setParam(name, value)

    def __enter__(self) -> _Model:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.dispose()
        self._environment.dispose()

    def run(self) -> None:
        """Search the tree."""
        self._model.optimize()

    @property
    def bound(self) -> float:
        """The proved bound of the cost."""
        return max(float(self._model.ObjBound), 0.0)

    @property
    def nodes(self) -> int:
        """How many nodes were searched."""
        return int(self._model.NodeCount)

    @property
    def timed_out(self) -> bool:
        """Whether the time limit ended the search."""
        return bool(self._model.Status == self._gurobi.GRB.TIME_LIMIT)


class _Program(_Model):
    """Gurobi's model of the perspective program."""

    def __init__(self, search: Search, program: PerspectiveProgram) -> None:
        self._search = search
        self._units = program.terms.units.numpy()
        removed = search.removed()[self._units]
        super().__init__(search, removed)
        self._s: Any = self._model.addMVar(len(removed), ub=REACH**2)
        cones: list[Any] = [0.0] * len(removed)
        objective, start = self._s.sum(), np.zeros(len(removed))
        for consumer in program.consumers:
            y = self._add_change(consumer)
            change = consumer.best_change(removed)
            y.setAttr("Start", change)
            start += consumer.per_unit(change, len(removed))
            objective += self._cost(consumer, y)
            for unit in np.unique(consumer.unit):
                rows = consumer.unit == unit
                cones[unit] += (consumer.split[rows, None] * (y[rows] * y[rows])).sum()
        self._s.setAttr("Start", start)
        for unit, cone in enumerate(cones):
            self._model.addConstr(cone <= self._s[unit] * (1 - self._x[unit]))
        self._model.setObjective(objective)
        self._set(
            BestBdStop=search.cutoff + program.slack,
            # What ends a branch is the optimum of a cone program, by default good to 1e-6 only.
            BarQCPConvTol=TOLERANCE,
            # Nothing is left to reduce, and the incumbent is a swap optimum: nodes are worth more.
            Presolve=0,
            Cuts=0,
            Heuristics=0,
        )

    def _add_change(self, consumer: PerspectiveConsumer) -> Any:
        """Add y, (p, r), which is zero on the rows of removed units."""
        reach = np.repeat(consumer.reach[:, None], consumer.V.shape[1], axis=1)
        y = self._model.addMVar(reach.shape, lb=-reach, ub=reach)
        for column in range(reach.shape[1]):
            most = consumer.reach * (1 - self._x[consumer.unit])
            self._model.addConstr(y[:, column] <= most)
            self._model.addConstr(y[:, column] >= -most)
        return y

    def _cost(self, consumer: PerspectiveConsumer, y: Any) -> Any:
        """Return the cost without s: ``tr(u'(K - t I)u) + sum_j t |V_j|^2 x_j``."""
        cost = consumer.per_unit(consumer.V, len(self._units)) @ self._x
        rest = consumer.rest
        for column, V in enumerate(consumer.V.T):
            u = y[:, column] - V * self._x[consumer.unit]
            cost += u @ rest @ u
        return cost

    def run(self) -> None:
        """Search the tree, and offer what it found to the search."""
        super().run()
        if self._model.SolCount:
            point = np.zeros(self._search.problem.units)
            point[self._units] = self._x.X
            self._search.offer_point(point)


class _Tree(_Model):
    """Gurobi's model of the master problem, to which cuts are added while it is searched."""

    def __init__(self, search: Search) -> None:
        super().__init__(search, search.removed())
        self._search = search
        self._root_cuts = 0
        self._cost: Any = self._model.addVar(obj=1.0)
        for cut in (search.root_cut(), *search.cuts_at(search.removed())):
            self._model.addConstr(self._expression(cut) >= -cut[1])
        self._set(LazyConstraints=1)

    def run(self) -> None:
        """Search one tree, adding cuts on the way."""
        self._model.optimize(self._callback)

    def _expression(self, cut: Cut) -> Any:
        return self._cost - cut[0] @ self._x

    def _callback(self, model: Any, where: int) -> None:
        codes = self._gurobi.GRB.Callback
        if where == codes.MIPSOL:
            point = np.round(model.cbGetSolution(self._x))
            cost = model.cbGetSolution(self._cost)
            self._search.offer_point(point)
            self._add_violated(model, self._search.cuts_at(point), point, cost)
        elif where == codes.MIPNODE and self._root_cuts < _ROOT_CUTS:
            optimal = model.cbGet(codes.MIPNODE_STATUS) == self._gurobi.GRB.OPTIMAL
            if optimal and model.cbGet(codes.MIPNODE_NODCNT) == 0:
                self._root_cuts += 1
                point = np.clip(model.cbGetNodeRel(self._x), 0.0, 1.0)
                cost = model.cbGetNodeRel(self._cost)
                self._add_violated(model, (self._search.cut(point),), point, cost)

    def _add_violated(self, model: Any, cuts: tuple[Cut, ...], point: Array, cost: float) -> None:
        for cut in cuts:
            if cut[0] @ point - cut[1] > cost + _VIOLATION:
                model.cbLazy(self._expression(cut) >= -cut[1])
