"""Outer approximation in one tree of Gurobi, to which cuts are added while it is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from solvers.exact.outer_approximation import TOLERANCE, MixedInteger, Search
from solvers.protocol import Capabilities, Selection

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
