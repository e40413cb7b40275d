"""A multiple-choice knapsack: one choice from each table, of least loss within some limits.

Costs are tables, of any shape, and add up, those of single choices and those that several make
together.  A column x of a mixed-integer program says what is chosen from a table, and a column y
what is chosen from several together: ``sum over b of y_ab = x_a``, ``sum over a of y_ab = x_b``
(Koster, van Hoesel and Kolen, "The partial constraint satisfaction problem", Operations Research
Letters 23, 1998).

With any prices p >= 0 of the limits, and any multipliers of the equations between x and y, nothing
within the limits loses less than the sum of the least reduced losses of all tables, less what the
limits are worth (weak duality).  Both are those of the linear relaxation.  What has some choice in
it loses more than this bound by the choice's *excess* at least, its reduced loss above the least of
its table.  So the integer program has the choices of least excess alone, and the excess of what was
left out bounds the rest (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations
Research 27, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from solvers.exact.outer_approximation import without_prints

_GAP = 5e-4
"""Of the loss, to which the integer program is solved."""

_HIGHS = 1e-5
"""By which its bound of numbers near one may be too high: HiGHS prunes to tolerances of 1e-6."""

_WITHIN = 3e-6
"""Of what costs differ by: more than what HiGHS takes for nothing."""

_NODES = 500
"""Of its search tree, at most: a clock would not come to the same choice twice."""

_CHOICES = 600
"""In the integer program, of all tables, but 8 of each at least."""

_FAR = 1e-3
"""A loss so small beside the largest is lost in the solver's tolerances."""

_NOTHING = 1e-200
"""A loss below which numbers in units of it overflow."""

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Together(NamedTuple):
    """What choices from some tables cost together, beyond what each costs by itself."""

    tables: tuple[int, ...]
    costs: Array
    """(choices of the first, choices of the second, .., limits)."""


class Solved(NamedTuple):
    """An index into each table, or None if none was found, and a bound on the least loss."""

    choice: Indices | None
    bound: float


class _Relaxed(NamedTuple):
    """A solution of the dual of the linear relaxation."""

    bound: float
    excess: list[Array]
    """Of each choice from each table."""


@dataclass(frozen=True, eq=False)
class Knapsack:
    """Tables with losses and costs of their choices, and costs of choices together."""

    losses: Sequence[Array]
    """Of each table, (choices,), not negative."""
    costs: Sequence[Array]
    """Of each table, (choices, limits)."""
    together: Sequence[Together] = ()

    def solve(self, limits: Array) -> Solved:
        """Choose from each table within the limits."""
        relaxed = self._relaxed(limits)
        most = max(8, _CHOICES // len(self.losses))
        some, left = [], math.inf
        for excess in relaxed.excess:
            order = np.argsort(excess, kind="stable")
            some.append(np.union1d(order[:most], [0]))  # the least costs
            left = min([left, *np.delete(excess, some[-1])])
        largest = float(max(map(np.max, self.losses)))
        choice, bound = self._among(some, limits, max(relaxed.bound, 1e-6 * largest, _NOTHING))
        if choice is not None and (lost := self._loss(choice)) < _FAR * largest:
            # Nothing better has a choice that loses more by itself.
            near = [own[losses[own] <= lost] for own, losses in zip(some, self.losses, strict=True)]
            again, bound = self._among(near, limits, max(lost, _NOTHING))
            bound = min(bound, lost)
            choice = choice if again is None else min(choice, again, key=self._loss)
        bound = max(relaxed.bound, min(bound, relaxed.bound + left))
        return Solved(choice, bound)

    def _among(
        self, some: Sequence[Indices], limits: Array, unit: float
    ) -> tuple[Indices | None, float]:
        """Choose among some of each table; losses are in a unit.  Return a bound for these, too."""
        fewer = self.restricted(some)
        choice, bound = fewer._integer(limits, unit)
        if choice is not None and not fewer._within(choice, limits):
            choice, _ = fewer._integer(limits - _WITHIN * self._unit, unit)
        if choice is None:
            return None, bound
        return np.array([own[index] for own, index in zip(some, choice, strict=True)]), bound

    def _loss(self, choice: Indices) -> float:
        return float(sum(one[index] for one, index in zip(self.losses, choice, strict=True)))

    def least(self, limits: Array) -> float:
        """Return a bound on the least loss within limits, that of the linear relaxation."""
        return self._relaxed(limits).bound

    def restricted(self, some: Sequence[Indices]) -> Knapsack:
        """Return the same with some choices of each table."""
        return Knapsack(
            [losses[own] for losses, own in zip(self.losses, some, strict=True)],
            [costs[own] for costs, own in zip(self.costs, some, strict=True)],
            [
                Together(tables, costs[np.ix_(*(some[i] for i in tables))])
                for tables, costs in self.together
            ],
        )

    # ---- columns -------------------------------------------------------------------------

    @cached_property
    def _starts(self) -> Indices:
        """Where the columns of each table, and of each that is of several, begin; and the end."""
        several = (costs[..., 0].size for _, costs in self.together)
        return np.cumsum([0, *map(len, self.losses), *several])

    @cached_property
    def _unit(self) -> Array:
        """What costs of each limit differ by at most, (limits,)."""
        tables = [*self.costs, *(c.reshape(-1, c.shape[-1]) for _, c in self.together)]
        spread = np.sum([costs.max(axis=0) - costs.min(axis=0) for costs in tables], axis=0)
        return np.where(spread > 0, spread, 1.0)

    @cached_property
    def _columns(self) -> tuple[Array, Array]:
        """Losses, and costs in units, of all columns."""
        several = [costs.reshape(-1, costs.shape[-1]) for _, costs in self.together]
        costs = np.concatenate([*self.costs, *several]) / self._unit
        losses = np.concatenate(self.losses)
        return np.append(losses, np.zeros(len(costs) - len(losses))), costs

    @cached_property
    def _equations(self) -> tuple[scipy.sparse.csr_array, Array]:
        """One is chosen of each table; then those between x and y."""
        tables = len(self.losses)
        rows = [np.repeat(np.arange(tables), [*map(len, self.losses)])]
        columns, values, count = [np.arange(len(rows[0]))], [np.ones(len(rows[0]))], tables
        for (several, costs), start in zip(self.together, self._starts[tables:-1], strict=True):
            for table, choice in zip(several, np.indices(costs.shape[:-1]), strict=True):
                own = np.arange(len(self.losses[table]))
                rows += [count + choice.ravel(), count + own]
                columns += [start + np.arange(choice.size), self._starts[table] + own]
                values += [np.ones(choice.size), -np.ones(len(own))]
                count += len(own)
        entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
        matrix = scipy.sparse.csr_array(entries, shape=(count, int(self._starts[-1])))
        return matrix, np.repeat([1.0, 0.0], [tables, count - tables])

    # ---- programs ------------------------------------------------------------------------

    def _relaxed(self, limits: Array) -> _Relaxed:
        """Solve the linear relaxation, again in units of its own loss where that is small.

        HiGHS takes what is below 1e-7 for nothing.
        """
        (losses, costs), (matrix, ones) = self._columns, self._equations
        room, unit = limits / self._unit, max(float(losses.max()), _NOTHING)
        best = self._dual(losses, np.zeros(costs.shape[1]), room)
        for _ in range(2):
            found = scipy.optimize.linprog(  # type: ignore[call-overload]  # of sparse matrices
                losses / unit, A_ub=costs.T, b_ub=room, A_eq=matrix, b_eq=ones, method="highs"
            )
            if found.x is None:
                break
            prices = unit * (-found.ineqlin.marginals).clip(min=0)
            equations = unit * found.eqlin.marginals
            equations[: len(self.losses)] = 0.0
            dual = self._dual(losses + costs @ prices - matrix.T @ equations, prices, room)
            best = max(best, dual, key=lambda one: one.bound)
            if not 0 < dual.bound < unit / 10:
                break
            unit = max(dual.bound, _NOTHING)
        return best

    def _dual(self, reduced: Array, prices: Array, room: Array) -> _Relaxed:
        """Return the bound of some prices, by the reduced losses of all columns."""
        least = np.minimum.reduceat(reduced, self._starts[:-1])
        above = np.split(reduced - np.repeat(least, np.diff(self._starts)), self._starts[1:-1])
        excess, rest = above[: len(self.losses)], above[len(self.losses) :]
        for (tables, costs), own in zip(self.together, rest, strict=True):
            for axis, table in enumerate(tables):
                own = own.reshape(costs.shape[:-1])
                others = tuple(i for i in range(len(tables)) if i != axis)
                excess[table] = excess[table] + own.min(axis=others)
        return _Relaxed(max(0.0, float(least.sum() - prices @ room)), excess)

    def _integer(self, limits: Array, unit: float) -> tuple[Indices | None, float]:
        """Solve the integer program, losses in a unit; return a choice, if any, and a bound."""
        (losses, costs), (matrix, ones), tables = self._columns, self._equations, len(self.losses)
        with without_prints():
            found = scipy.optimize.milp(
                losses / unit,
                integrality=np.arange(len(losses)) < self._starts[tables],
                bounds=scipy.optimize.Bounds(0.0, 1.0),
                constraints=[(matrix, ones, ones), (costs.T, -np.inf, limits / self._unit)],
                options={"mip_rel_gap": _GAP, "node_limit": _NODES},
            )
        bound = 0.0 if found.mip_dual_bound is None else (found.mip_dual_bound - _HIGHS) * unit
        if found.x is None:
            return None, float(bound)
        each = np.split(found.x, self._starts[1 : tables + 1])[:tables]
        return np.array([one.argmax() for one in each]), float(bound)

    def _within(self, choice: Indices, limits: Array) -> bool:
        spent = sum(costs[index] for costs, index in zip(self.costs, choice, strict=True))
        spent += sum(costs[tuple(choice[i] for i in tables)] for tables, costs in self.together)
        return bool((spent <= limits).all())
