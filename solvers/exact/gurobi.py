"""Outer approximation in one tree of Gurobi, to which cuts are added while it is searched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from solvers.errors import BackendError
from solvers.exact.outer_approximation import TOLERANCE, Array, Cut, MixedInteger, Search
from solvers.protocol import Capabilities, Selection, missing

_FREE_SIZE = "2000 variables and 2000 constraints"
_OTHERS = "branch_and_bound or highs"

_VIOLATION = 1e-7
_ROOT_CUTS = 40


@dataclass(frozen=True)
class Gurobi(MixedInteger):
    """Prove which support is best with Gurobi, started from the swap optimum.

    The program has one binary a unit and one variable for the cost; cuts are added where the solver
    finds integer points, and at the fractional points of the root node
    (`solvers.exact.outer_approximation`).  The licence that comes with the pip wheel suffices.

    Parameters
    ----------
    time_limit
        Seconds for the tree search.
    gap_tolerance
        Relative gap at which the answer counts as optimal.
    threads
        Threads of the solver; 0 leaves the choice to it.
    start
        Units to start the warm-starting local search from; by default it starts from greedy.
    """

    summary: ClassVar[str] = "outer approximation by lazy cuts; the free licence suffices"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=1999, devices=("cpu",))

    @classmethod
    def available(cls) -> str | None:
        """Return None, or that gurobipy is missing."""
        return missing("gurobipy")

    def solve(self, search: Search) -> Selection:
        """Search one tree."""
        with (
            _licence_errors(f"outer approximation of {search.problem.units} units"),
            _Tree(search) as tree,
        ):
            tree.run()
            return search.answer(tree.bound, "Gurobi", timed_out=tree.timed_out)


@contextmanager
def _licence_errors(model: str) -> Iterator[None]:
    """Turn Gurobi's licence errors into ones that name the limit and what to use instead."""
    import gurobipy

    try:
        yield
    except gurobipy.GurobiError as error:
        if error.errno == gurobipy.GRB.Error.SIZE_LIMIT_EXCEEDED:
            raise BackendError(
                f"gurobi: the {model} exceeds the licence, which takes {_FREE_SIZE} without a full "
                f"one; install a full licence, or use {_OTHERS}"
            ) from error
        if error.errno == gurobipy.GRB.Error.NO_LICENSE:
            raise BackendError(f"gurobi: no valid licence ({error}); use {_OTHERS}") from error
        raise


class _Tree:
    """The master problem: indicators of removed units, and the cost above all cuts."""

    def __init__(self, search: Search) -> None:
        import gurobipy

        self._gurobi: Any = gurobipy
        self._search, self._root_cuts = search, 0
        self._environment: Any = gurobipy.Env(params={"OutputFlag": 0})
        self._model: Any = gurobipy.Model(env=self._environment)
        self._x: Any = self._model.addMVar(search.problem.units, vtype="B")
        self._x.setAttr("Start", search.removed())
        self._model.addConstr(self._x.sum() == search.removals)
        self._cost: Any = self._model.addVar(obj=1.0)
        for cut in (search.root_cut(), *search.cuts_at(search.removed())):
            self._model.addConstr(self._expression(cut) >= -cut[1])
        parameters = {
            "TimeLimit": search.limits.time_limit,
            "BestBdStop": search.cutoff,
            "MIPGap": 1e-7,
            "Threads": search.limits.threads,
            # Slopes are steep near a singular H: an almost integral point would slip under its cut.
            "IntFeasTol": TOLERANCE,
            "FeasibilityTol": TOLERANCE,
            "OptimalityTol": TOLERANCE,
            "LazyConstraints": 1,
        }
        for name, value in parameters.items():
            self._model.setParam(name, value)

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.dispose()
        self._environment.dispose()

    def run(self) -> None:
        """Search the tree, adding cuts on the way."""
        self._model.optimize(self._callback)

    @property
    def bound(self) -> float:
        """The proved bound of the cost."""
        return max(float(self._model.ObjBound), 0.0)

    @property
    def timed_out(self) -> bool:
        """Whether the time limit ended the search."""
        return bool(self._model.Status == self._gurobi.GRB.TIME_LIMIT)

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
