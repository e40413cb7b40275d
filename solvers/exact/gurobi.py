"""Outer approximation in one branch-and-cut tree, by Gurobi with lazy cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from solvers.backend import Capabilities, Kind
from solvers.errors import BackendError
from solvers.exact.outer_approximation import Cut, Limits, Master, keep_everything
from solvers.problem import SubsetProblem
from solvers.solution import DEFAULT_GAP_TOLERANCE, Selection

_VIOLATION = 1e-7
_ROOT_CUTS = 40


@dataclass(frozen=True)
class Gurobi:
    """Prove which support is best with Gurobi, started from the swap optimum.

    One binary a unit and one variable for the cost; cuts are added where the solver finds integer
    points, and at the fractional points of the root node.  The licence that comes with the pip
    wheel takes 2000 variables.

    Parameters
    ----------
    time_limit
        Seconds for the tree search.
    gap_tolerance
        Relative gap at which the answer counts as optimal.
    threads
        Threads of the solver; 0 leaves the choice to it.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    summary: ClassVar[str] = "outer approximation with lazy cuts; the free licence suffices"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=1999, devices=("cpu",))
    time_limit: float = 60.0
    gap_tolerance: float = DEFAULT_GAP_TOLERANCE
    threads: int = 1

    def __post_init__(self) -> None:
        Limits(self.time_limit, self.gap_tolerance)

    @classmethod
    def available(cls) -> str | None:
        """Return None, or that gurobipy is missing."""
        if find_spec("gurobipy") is None:
            return "gurobipy is not installed; pip install 'osscar[exact]'"
        return None

    def select(self, problem: SubsetProblem) -> Selection:
        """Search one tree, adding cuts on the way."""
        if problem.keep == problem.units:
            return keep_everything(problem)
        master = Master(problem, Limits(self.time_limit, self.gap_tolerance))
        with licence_errors(problem.units), _Tree(master, self.threads) as tree:
            bound = tree.search()
        return master.selection(bound, "Gurobi")


@contextmanager
def licence_errors(units: int) -> Iterator[None]:
    """Turn Gurobi's licence errors into ones that name the limit and another backend."""
    import gurobipy

    try:
        yield
    except gurobipy.GurobiError as error:
        if error.errno == gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED:
            raise BackendError(
                f"gurobi: the model of {units} units exceeds the licence, which takes 2000 "
                "variables and 2000 constraints without a full one; install a licence, or use "
                "branch_and_bound or highs"
            ) from error
        if error.errno == gurobipy.GRB.Error.NO_LICENSE:
            raise BackendError(
                f"gurobi: no valid licence ({error}); use branch_and_bound or highs"
            ) from error
        raise


class _Tree:
    """Gurobi's model of the master problem."""

    def __init__(self, master: Master, threads: int) -> None:
        import gurobipy

        self._gurobi: Any = gurobipy
        self._master = master
        self._root_cuts = 0
        self._environment: Any = gurobipy.Env(params={"OutputFlag": 0})
        self._model: Any = gurobipy.Model(env=self._environment)
        units = master.problem.units
        self._x: Any = self._model.addMVar(units, vtype="B")
        self._cost: Any = self._model.addVar(obj=1.0)
        self._model.addConstr(self._x.sum() == master.removals)
        for cut in (master.root_cut(), *master.cuts_at(master.incumbent())):
            self._model.addConstr(self._expression(cut) >= -cut.constant)
        self._x.setAttr("Start", master.incumbent())
        self._model.setParam("TimeLimit", master.limits.time_limit)
        self._model.setParam("BestBdStop", master.cutoff)
        self._model.setParam("MIPGap", 1e-7)
        # Slopes are steep near a singular H: an almost integral point would slip under its cut.
        for name in ("IntFeasTol", "FeasibilityTol", "OptimalityTol"):
            self._model.setParam(name, 1e-9)
        self._model.setParam("LazyConstraints", 1)
        self._model.setParam("Threads", threads)

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.dispose()
        self._environment.dispose()

    def search(self) -> float:
        """Run the tree search; return the proved bound of the cost."""
        self._model.optimize(self._callback)
        return max(float(self._model.ObjBound), 0.0)

    def _expression(self, cut: Cut) -> Any:
        return self._cost - cut.slopes @ self._x

    def _callback(self, model: Any, where: int) -> None:
        codes = self._gurobi.GRB.Callback
        if where == codes.MIPSOL:
            point = np.round(model.cbGetSolution(self._x))
            cost = model.cbGetSolution(self._cost)
            self._master.offer(point)
            self._add_violated(model, self._master.cuts_at(point), point, cost)
        elif where == codes.MIPNODE and self._root_cuts < _ROOT_CUTS:
            optimal = model.cbGet(codes.MIPNODE_STATUS) == self._gurobi.GRB.OPTIMAL
            if optimal and model.cbGet(codes.MIPNODE_NODCNT) == 0:
                self._root_cuts += 1
                point = np.clip(model.cbGetNodeRel(self._x), 0.0, 1.0)
                cost = model.cbGetNodeRel(self._cost)
                self._add_violated(model, (self._master.cut(point),), point, cost)

    def _add_violated(self, model: Any, cuts: tuple[Cut, ...], point: Any, cost: float) -> None:
        for cut in cuts:
            if cut.slopes @ point - cut.constant > cost + _VIOLATION:
                model.cbLazy(self._expression(cut) >= -cut.constant)
