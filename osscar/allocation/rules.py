"""How a budget is shared out: evenly, or by what each group loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.budget import Budget, Measured, Width
from osscar.allocation.costs import ROUNDING, Cost, CountedCost
from osscar.allocation.curves import Curve
from osscar.allocation.knapsack import choose
from osscar.allocation.widths import possible_widths
from osscar.base.errors import RequestError
from osscar.request import Widths

_HALVINGS = 40
"""Of the interval in which a share is looked for."""

_ROUNDS = 60
_SWEEPS = 30
_PRICES = 96
_MOST_TOGETHER = 1 << 16
"""Choices of groups whose costs multiply that are listed: of 128 experts and 256 widths of their
neurons there are half as many."""
_FRONTIER = 24
"""Points of the frontier that are kept at most."""


@dataclass(frozen=True, eq=False)
class Sharing:
    """Groups that share a budget by curves, or evenly; `others` is what other groups keep."""

    groups: Sequence[CouplingGroup]
    widths: Widths
    others: Mapping[str, int]
    curves: Mapping[str, Curve] | None = None

    def choose(self, cost: CountedCost, limit: float) -> dict[str, int]:
        """Return what the groups keep so that the model costs at most the limit, or the least."""
        if self.curves is not None:
            return self._by_curves(self.curves, cost, limit).choose()
        return _uniform_widths(self.groups, self.widths, self.others, cost, limit)

    def budget(
        self, kind: Cost, cost: CountedCost, limit: float, found: Mapping[str, int]
    ) -> Budget:
        """Report on a choice, with a prediction where there are curves."""
        told, nats = {}, {}
        if self.curves is not None:
            by_curves = self._by_curves(self.curves, cost, limit)
            told = by_curves.prediction(found)
            nats = {name: float(self.curves[name].losses[kept]) for name, kept in found.items()}
        widths = {
            g.name: Width(str(g.kind), g.units, found[g.name], nats.get(g.name))
            for g in self.groups
        }
        reached = cost.of({**self.others, **found})
        return Budget(kind, limit, cost.dense, reached, widths=widths, **told)

    def _by_curves(self, curves: Mapping[str, Curve], cost: CountedCost, limit: float) -> ByCurves:
        options = {group.name: possible_widths(group, self.widths) for group in self.groups}
        own = {name: curves[name] for name in options}
        return ByCurves(own, options, self.others, cost, limit)


def _uniform_widths(
    shared: Sequence[CouplingGroup],
    widths: Widths,
    keep: Mapping[str, int],
    cost: CountedCost,
    limit: float,
) -> dict[str, int]:
    """Return the counts of the largest share of every group within the limit, or the least ones.

    Shares are rounded to widths that groups may have, those of the coarsest groups first: the
    others, which move in finer steps, make up for it.  Groups of the same widths stay alike.
    `keep` is what other groups keep.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for group in shared:
        alike.setdefault(tuple(possible_widths(group, widths).tolist()), []).append(group.name)
    finer = [_Alike(names, np.array(options)) for options, names in alike.items()]
    finer.sort(key=lambda some: len(some.options))
    kept = dict(keep)
    while finer:
        coarsest = finer.pop(0)
        kept.update(coarsest.rounded(finer, cost, limit * (1 + ROUNDING), kept))
    return {group.name: kept[group.name] for group in shared}


@dataclass(frozen=True, eq=False)
class _Alike:
    """Groups that keep the same number of units, and what numbers that may be."""

    names: Sequence[str]
    options: NDArray[np.int64]

    def keeping(self, count: float) -> dict[str, int]:
        return dict.fromkeys(self.names, int(count))

    def nearest(self, share: float) -> int:
        """Return the place of the option that is nearest to a share of all, the larger of two."""
        middles = (self.options[1:] + self.options[:-1]) / 2
        return int(np.searchsorted(middles, share * self.options[-1], side="right"))

    def rounded(
        self, finer: Sequence[_Alike], cost: CountedCost, limit: float, kept: Mapping[str, int]
    ) -> dict[str, int]:
        """Return what these keep at the share at which all come to the limit, rounded.

        The `finer` groups have the same share, and yet are to be rounded.
        """

        def between(share: float) -> float:
            """Return the cost at a share, straight between that of two options of these groups."""
            place = share * self.options[-1]
            above = int(np.searchsorted(self.options, place))
            around = self.options[max(above - 1, 0) : above + 1]
            others = {
                k: v for f in finer for k, v in f.keeping(f.options[f.nearest(share)]).items()
            }
            costs = [cost.of({**kept, **others, **self.keeping(count)}) for count in around]
            return float(np.interp(place, around, costs))

        # The cost at a share is not quite monotone, as finer groups jump between their options:
        # any share that comes to the limit will do, and it is rounded.  Rounding up may exceed the
        # limit by more than the finer groups can make up for; then the next lower option is taken.
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if between(middle) <= limit else (low, middle)
        least = {k: v for f in finer for k, v in f.keeping(f.options[0]).items()}
        place = self.nearest(low)
        while place and cost.of({**kept, **least, **self.keeping(self.options[place])}) > limit:
            place -= 1
        return self.keeping(self.options[place])


def _measured(curve: Curve) -> tuple[Measured, ...]:
    predicted = curve.predicted.tolist()
    return tuple(
        Measured(kept, predicted[kept] if curve.comparable else None, nats)
        for kept, nats in sorted(curve.measured.items())
    )


@dataclass(frozen=True, eq=False)
class _Class:
    """Groups whose costs multiply, with all choices that they have together, the least first.

    `counts` are what the groups keep, (choices, groups); `losses` and `costs`, the latter up to a
    constant, are of each choice.
    """

    names: tuple[str, ...]
    counts: NDArray[np.int64]
    losses: NDArray[np.float64]
    costs: NDArray[np.float64]

    def at(self, choice: int) -> dict[str, int]:
        """Return what the groups keep."""
        return dict(zip(self.names, self.counts[choice].tolist(), strict=True))


def can_be_listed(cost: CountedCost, options: Mapping[str, NDArray[np.int64]]) -> bool:
    """Whether all choices of groups whose costs multiply are few enough to be listed together.

    `options` are the numbers of units that each group may keep.
    """
    return all(
        math.prod(len(options[name]) for name in names) <= _MOST_TOGETHER
        for names in cost.classes(options)
    )


@dataclass(frozen=True, eq=False)
class ByCurves:
    """The widths of least predicted divergence within a limit.

    Each group has a curve and some options; `others` is what other groups keep.
    """

    curves: Mapping[str, Curve]
    options: Mapping[str, NDArray[np.int64]]
    others: Mapping[str, int]
    cost: CountedCost
    limit: float

    @cached_property
    def losses(self) -> dict[str, NDArray[np.float64]]:
        """Of each option of each group."""
        return {name: self.curves[name].losses[some] for name, some in self.options.items()}

    @cached_property
    def classes(self) -> tuple[_Class, ...]:
        """Groups in classes whose costs add up; none where one has too many choices."""
        if not can_be_listed(self.cost, self.options):
            return ()
        found = []
        for names in self.cost.classes(self.options):
            grid = np.meshgrid(*(self.options[name] for name in names), indexing="ij")
            losses = np.meshgrid(*(self.losses[name] for name in names), indexing="ij")
            counts = np.stack([axis.ravel() for axis in grid], axis=1)
            costs = self._together(names, self._least())
            found.append(_Class(names, counts, np.stack(losses).sum(0).ravel(), costs))
        return tuple(found)

    def _together(self, names: Sequence[str], kept: Mapping[str, int]) -> NDArray[np.float64]:
        """Return what all choices of some groups cost, up to a constant; the last varies first."""
        name, *rest = names
        own = self._over(name, kept)
        if not rest:
            return own
        # With each count of the first group, the others cost so much more than their least.
        inner = [self._together(rest, {**kept, name: int(count)}) for count in self.options[name]]
        return np.concatenate([c - c[0] + one for c, one in zip(inner, own, strict=True)])

    def choose(self) -> dict[str, int]:
        """Return the best widths, or the least ones where nothing is within the limit."""
        least = {name: int(some[0]) for name, some in self.options.items()}
        if not self.cost.of({**self.others, **least}) <= self.limit * (1 + ROUNDING):
            return least
        return self.exact()[0] if self.classes else self.alternating()

    def prediction(self, found: Mapping[str, int]) -> dict[str, Any]:
        """Return what a `Budget` tells of a choice, with a bound on it where `exact` finds one."""
        return {
            "predicted": self._loss(found),
            "lower_bound": self.exact()[1] if self.classes else None,
            "comparable": all(curve.in_nats for curve in self.curves.values()),
            "curves": {
                name: tuple(curve.losses.tolist())
                for name, curve in self.curves.items()
                if len(self.options[name]) > 1
            },
            "measured": {name: _measured(c) for name, c in self.curves.items() if c.measured},
            "frontier": self.frontier(),
        }

    def exact(self) -> tuple[dict[str, int], float]:
        """Solve the knapsack: costs of classes add up."""
        costs = [one.costs - one.costs[0] for one in self.classes]
        try:
            room = self.limit - self.cost.of(self._least())
            choice = choose([one.losses for one in self.classes], costs, room)
        except ValueError as error:  # by less than rounding, as the least widths were checked
            raise RequestError(f"the budget cannot be met: {error}") from error
        found: dict[str, int] = {}
        for one, index in zip(self.classes, choice.options, strict=True):
            found.update(one.at(index))
        return {name: found[name] for name in self.options}, choice.lower_bound

    def alternating(self) -> dict[str, int]:
        """Choose widths whose costs multiply: one group after the other, at one price for all.

        At a price for the cost, each group in turn takes its best width given the others', until
        none changes; the price is the least that comes within the limit, and what is left of that
        is spent.
        """
        # As in the knapsack, the price is bracketed: at `low` the choice costs too much, at `high`
        # it fits.  Costs multiply, so that a choice at a price is a local one: each bisection
        # starts from all units anew, for the same price always to come to the same choice.
        low, high = 0.0, 1e-12
        kept = self._at(high, self._all())
        while self.cost.of(kept) > self.limit and high < 1e300:
            low, high = high, 10 * high
            kept = self._at(high, kept)
        for _ in range(_ROUNDS):
            middle = math.sqrt(max(low, 1e-3 * high) * high)  # prices differ by magnitudes
            found = self._at(middle, self._all())
            if self.cost.of(found) > self.limit:
                low = middle
            else:
                high, kept = middle, found
        return self._spent({name: kept[name] for name in self.options})

    def _all(self) -> dict[str, int]:
        return {**self.others, **{name: int(some[-1]) for name, some in self.options.items()}}

    def _least(self) -> dict[str, int]:
        return {**self.others, **{name: int(some[0]) for name, some in self.options.items()}}

    def _over(self, name: str, kept: Mapping[str, int]) -> NDArray[np.float64]:
        """Return what the options of a group cost, up to a constant."""
        return self.cost.over(name, self.options[name], kept)

    def _at(self, price: float, start: Mapping[str, int]) -> dict[str, int]:
        kept = dict(start)
        if self.classes:
            for one in self.classes:
                kept.update(one.at(int((one.losses + price * one.costs).argmin())))
            return kept
        for _ in range(_SWEEPS):
            before = dict(kept)
            for name, some in self.options.items():
                paid = self.losses[name] + price * self._over(name, kept)
                kept[name] = int(some[paid.argmin()])
            if kept == before:
                break
        return kept

    def frontier(self) -> tuple[tuple[float, float], ...]:
        """Return costs of the whole model with the least loss at each, whatever the limit.

        They are the choices at one price of the cost each, from that at which nothing leaves to
        that at which all leaves that may: no choice of the same cost has a smaller loss where costs
        of groups add up.  Where they multiply, some are worse than others that cost less, and left
        out.
        """
        low, high = self._prices()
        prices = np.geomspace(low, high, _PRICES).tolist() if high > 0 else []
        choices = [self._all(), *(self._at(price, self._all()) for price in prices)]
        found: list[tuple[float, float]] = []
        for cost, loss in sorted({(self.cost.of(kept), self._loss(kept)) for kept in choices}):
            if not found or loss <= found[-1][1]:  # to the dense model, which others may equal
                found.append((cost, loss))
        chosen = np.unique(np.linspace(0, len(found) - 1, _FRONTIER).round().astype(int))
        return tuple(found[i] for i in chosen)

    def _prices(self) -> tuple[float, float]:
        """Return a price below which nothing leaves, and one above which all leaves that may."""
        every, least = self._all(), self._least()
        low, high = math.inf, 0.0
        for name, losses in self.losses.items():
            costs = self._over(name, every)
            lost, spared = losses[:-1] - losses[-1], costs[-1] - costs[:-1]
            some = (lost > 0) & (spared > 0)
            low = min([low, *(lost[some] / spared[some])])
            costs = self._over(name, least)
            gained, paid = losses[0] - losses[1:], costs[1:] - costs[0]
            high = max([high, *(gained[paid > 0] / paid[paid > 0])])
        return (0.9 * low, 1.1 * high) if math.isfinite(low) else (0.0, 0.0)

    def _loss(self, kept: Mapping[str, int]) -> float:
        indices = {name: np.searchsorted(some, kept[name]) for name, some in self.options.items()}
        return sum(float(self.losses[name][index]) for name, index in indices.items())

    def _spent(self, kept: dict[str, int]) -> dict[str, int]:
        """Widen groups, the one that gains most by its cost first, as far as the limit allows."""
        while True:
            room = self.limit - self.cost.of({**self.others, **kept})
            best: tuple[float, str, int] | None = None
            for name, some in self.options.items():
                now = int(np.searchsorted(some, kept[name]))
                costs = self._over(name, {**self.others, **kept})
                fits = np.flatnonzero(costs[now + 1 :] - costs[now] <= room)
                if len(fits):
                    widest = now + 1 + int(fits[-1])
                    gain = float(self.losses[name][now] - self.losses[name][widest])
                    rate = gain / max(float(costs[widest] - costs[now]), 1e-300)
                    if gain > 0 and (best is None or rate > best[0]):
                        best = rate, name, int(some[widest])
            if best is None:
                return kept
            kept = {**kept, best[1]: best[2]}
