"""One option out of every class, at the least loss within a budget: the multiple-choice knapsack.

Minimize ``sum_g f_g(i_g)`` subject to ``sum_g c_g(i_g) <= C``.  The Lagrangian relaxation at one
multiplier gives a lower bound and nearly always a choice within a fraction of it (Sinha and
Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979).  Options that
cannot be part of anything better are struck out by their reduced costs; what is left is a few
options a class, over which dynamic programming, in the order of classes, proves a best choice.
Curves of neighbouring widths are so much alike that general solvers of integer programs take
hundreds of times as long to prove less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 200
_MOST_STATES = 20_000
"""Choices of some classes that are followed at once; what is dropped limits what is proved."""
_MOST_EXPANDED = 1_000_000
"""The same times the options of one class: memory."""


@dataclass(frozen=True)
class _Choice:
    """What the knapsack holds: the index of the option of each class, and sums over the classes.

    No choice within the budget has a smaller loss than the lower bound.
    """

    options: tuple[int, ...]
    loss: float
    cost: float
    lower_bound: float


def choose(
    losses: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], budget: float
) -> _Choice:
    """Choose one option of each class, of which each has finite losses and costs.

    Raises
    ------
    ValueError
        If nothing is within the budget, a class has no option, or sums are not finite.
    """
    for found in (*losses, *costs):
        if not len(found) or not np.isfinite(found).all():
            raise ValueError("each class needs an option, and finite numbers")
    if not np.isfinite(sum(float(np.abs(c).max()) for c in (*losses, *costs))):
        raise ValueError("the sum of the largest losses and costs is not finite; scale them")
    least, most = (sum(float(find(c)) for c in costs) for find in (np.min, np.max))
    # More than all there is changes nothing; sums may exceed the sum that was meant.
    budget = min(budget, most) + 1e-12 * sum(float(np.abs(c).max()) for c in costs)
    if not least <= budget:
        raise ValueError(f"the least cost of any choice is {least:g}")
    multiplier, options = _relaxed(losses, costs, budget)
    reduced = [f + multiplier * c for f, c in zip(losses, costs, strict=True)]
    bound = sum(float(r.min()) for r in reduced) - multiplier * budget
    options = _filled(losses, costs, budget, options)
    if _sum(losses, options) > bound:
        options, proved = _searched(losses, costs, budget, multiplier, options)
        bound = max(bound, proved)
    loss = _sum(losses, options)
    return _Choice(tuple(map(int, options)), loss, _sum(costs, options), min(float(bound), loss))


def _sum(values: Sequence[NDArray[np.float64]], options: Sequence[int]) -> float:
    return float(sum(v[i] for v, i in zip(values, options, strict=True)))


def _relaxed(
    losses: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], budget: float
) -> tuple[float, list[int]]:
    """Return the multiplier of the best bound, and the choice just within the budget at it.

    Where the budget does not bind, that is the least loss of each class, at the least cost.
    """

    def at(multiplier: float) -> list[int]:
        return [int((f + multiplier * c).argmin()) for f, c in zip(losses, costs, strict=True)]

    options = [int(np.lexsort((c, f))[0]) for f, c in zip(losses, costs, strict=True)]
    if _sum(costs, options) <= budget:
        return 0.0, options
    # The cost of `at` falls as the multiplier grows, in steps: where an option of a class gives way
    # to a cheaper one.  The dual function, max over the multiplier of the least reduced loss minus
    # multiplier times budget, is concave, and its slope is that cost minus the budget: the best
    # bound is at the step that passes the budget.  It lies between `low`, whose choice costs too
    # much, and `high`, whose choice fits; nothing is known of its magnitude but for that.
    low, high = 0.0, 1e-30
    while _sum(costs, options := at(high)) > budget:
        low, high = high, 10 * high
        if high > 1e300:  # all that is left is to be as cheap as can be
            return high, [int(c.argmin()) for c in costs]
    for _ in range(_BISECTIONS):
        # Halves the exponent as long as the ends are further apart than a factor of ten, then the
        # interval, until no number lies between them.
        middle = (low + high) / 2 if low > 0.1 * high else (low or high * 1e-6) ** 0.5 * high**0.5
        if not low < middle < high:
            break
        found = at(middle)
        if _sum(costs, found) > budget:
            low = middle
        else:
            high, options = middle, found
    return high, options


def _filled(
    losses: Sequence[NDArray[np.float64]],
    costs: Sequence[NDArray[np.float64]],
    budget: float,
    options: Sequence[int],
) -> list[int]:
    """Exchange single options for better ones as long as the budget has room for one."""
    chosen = list(options)
    room = budget - _sum(costs, chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for index, (f, c) in enumerate(zip(losses, costs, strict=True)):
            gains = np.where(c - c[chosen[index]] <= room, f[chosen[index]] - f, -np.inf)
            option = int(gains.argmax())
            if gains[option] > 0 and (best is None or gains[option] > best[0]):
                best = float(gains[option]), index, option
        if best is None:
            return chosen
        _, index, option = best
        room -= float(costs[index][option] - costs[index][chosen[index]])
        chosen[index] = option


@dataclass(frozen=True, eq=False)
class _States:
    """Choices of the first classes: what each comes to, and how.

    `parents` are the choices of one class less that they go on from, and `options` those by which.
    """

    losses: NDArray[np.float64]
    costs: NDArray[np.float64]
    parents: NDArray[np.intp]
    options: NDArray[np.intp]

    @classmethod
    def first(cls) -> _States:
        """Return the choice of no class."""
        return cls(*np.zeros((2, 1)), *np.zeros((2, 1), dtype=np.intp))

    def at(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> _States:
        """Return some of them."""
        return _States(
            self.losses[index], self.costs[index], self.parents[index], self.options[index]
        )

    def continued(
        self, losses: NDArray[np.float64], costs: NDArray[np.float64], options: NDArray[np.intp]
    ) -> _States:
        """Return each with each option of the next class."""
        parents = np.repeat(np.arange(len(self.losses)), len(options))
        return _States(
            np.add.outer(self.losses, losses[options]).ravel(),
            np.add.outer(self.costs, costs[options]).ravel(),
            parents,
            np.tile(options, len(self.losses)),
        )

    def undominated(self) -> _States:
        """Return those that lose less than all that cost as much or less."""
        ordered = self.at(np.lexsort((self.losses, self.costs)))
        least = np.minimum.accumulate(ordered.losses)
        return ordered.at(np.append(True, ordered.losses[1:] < least[:-1])[: len(least)])


def _searched(
    losses: Sequence[NDArray[np.float64]],
    costs: Sequence[NDArray[np.float64]],
    budget: float,
    multiplier: float,
    options: Sequence[int],
) -> tuple[list[int], float]:
    """Return the best choice that dynamic programming finds, and a bound for all.

    A state is left out where its loss, and the least reduced costs of the classes to come, are no
    better than a choice that is known; each is completed by the choice of the relaxation, as a
    choice of its own.
    """
    reduced = [f + multiplier * c for f, c in zip(losses, costs, strict=True)]
    relaxed = [int(r.argmin()) for r in reduced]
    chosen, best = list(options), _sum(losses, options)
    # Reduced costs cancel: what rounding may hide is kept.
    slack = 1e-13 * (abs(best) + multiplier * sum(float(np.abs(c).max()) for c in costs))
    room = best + slack - sum(float(r.min()) for r in reduced) + multiplier * budget
    left = [np.flatnonzero(r - r.min() <= room) for r in reduced]
    order = sorted(range(len(left)), key=lambda g: -len(left[g]))
    least_reduced = _to_come([float(reduced[g].min()) for g in order])
    least_cost = _to_come([float(costs[g][left[g]].min()) for g in order])
    rest_losses = _to_come([float(losses[g][relaxed[g]]) for g in order])
    rest_costs = _to_come([float(costs[g][relaxed[g]]) for g in order])
    path, dropped = [_States.first()], np.inf
    for place, group in enumerate(order):
        states = path[-1].continued(losses[group], costs[group], left[group])
        states = states.at(states.costs + least_cost[place] <= budget)
        bounds = states.losses + multiplier * (states.costs - budget) + least_reduced[place]
        states = states.at(bounds < best + slack).undominated()
        bounds = states.losses + multiplier * (states.costs - budget) + least_reduced[place]
        following = len(left[order[place + 1]]) if place + 1 < len(order) else 1
        most = max(1, min(_MOST_STATES, _MOST_EXPANDED // following))
        if len(bounds) > most:
            by_bound = np.argpartition(bounds, most)
            dropped = min(dropped, float(bounds[by_bound[most]]))
            states = states.at(by_bound[:most])
        path.append(states)
        completed = np.where(
            states.costs + rest_costs[place] <= budget, states.losses + rest_losses[place], np.inf
        )
        if not len(completed):
            break
        if completed.min() < best:
            best = float(completed.min())
            rest = {g: relaxed[g] for g in order[place + 1 :]}
            chosen = _followed(path, order, int(completed.argmin()), rest)
    return chosen, min(best, dropped - slack)


def _to_come(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the sum of what comes after each value."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)[1:]


def _followed(
    path: Sequence[_States], order: Sequence[int], state: int, rest: dict[int, int]
) -> list[int]:
    """Return the options that led to a state, and the rest, in the order of the classes."""
    options = dict(rest)
    for group, states in zip(reversed(order[: len(path) - 1]), reversed(path[1:]), strict=True):
        options[group] = int(states.options[state])
        state = int(states.parents[state])
    return [options[group] for group in range(len(order))]
