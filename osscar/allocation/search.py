"""The widths of least predicted divergence within a budget: one search over a price of its cost.

Minimize ``sum_g f_g(k_g)`` over the widths ``k_g`` that each group may have, with a cost ``C(k) <=
c``.  At a price p every group takes the width of the least loss plus price; the price is raised
until all of them fit, and what the budget leaves is spent (Everett, "Generalized Lagrange
multiplier method for solving problems of optimum allocation of resources", Operations Research 11,
1963).  By weak duality no choice within the budget loses less than

    min over k of  sum_g f_g(k_g) + p C(k)  -  p c,

so that it is known how far from the best a choice may be.  With hundreds of widths a group that is
next to nothing; with few, what the bound does not rule out is a small integer program.

Where a weight loses along two dimensions, costs of groups multiply.  All choices of such groups are
listed together, so that costs add up over the lists; of a long chain of convolutions, where these
are too many, each group takes its best width given the others', until none changes: such a choice
has no bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from osscar.allocation.costs import ROUNDING, CountedCost

_GAP = 1e-3
"""Of the loss, above which the integer program is solved, and to which."""

_HIGHS = 1e-5
"""By which its bound of numbers near one may be too high: HiGHS prunes to tolerances of 1e-6."""

_NODES = 2000
"""Of its search tree, at most: a clock would not come to the same widths twice."""

_MOST_TOGETHER = 1 << 16
"""Choices of groups whose costs multiply that are listed: of 128 experts and 256 widths of their
neurons there are half as many."""

_SWEEPS = 30
_BISECTIONS = 60
_PRICES = 96
_HALVINGS = 40
"""Of the interval in which an equal share is looked for."""

_FRONTIER = 24
"""Points of the frontier that are kept at most."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Groups whose costs multiply, with all choices that they have together, the least first.

    `counts` are what the groups keep, (choices, groups); `losses` and `costs`, the latter above
    that of the least widths, are of each choice.
    """

    names: tuple[str, ...]
    counts: NDArray[np.int64]
    losses: NDArray[np.float64]
    costs: NDArray[np.float64]

    def at(self, choice: int) -> dict[str, int]:
        """Return what the groups keep."""
        return dict(zip(self.names, self.counts[choice].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Search:
    """Groups with a loss for each width that they may have, and a cost of them all.

    Parameters
    ----------
    options
        The widths that each group may have, ascending.
    losses
        Of each of these.
    others
        What other groups keep.
    cost
        Of the whole model.
    """

    options: Mapping[str, NDArray[np.int64]]
    losses: Mapping[str, NDArray[np.float64]]
    others: Mapping[str, int]
    cost: CountedCost

    def choose(self, limit: float) -> tuple[dict[str, int], float | None]:
        """Return the best widths within a limit, and what no others lose less than.

        They are the least widths where nothing is within it.  The bound is None where too many
        groups' costs multiply.
        """
        limit *= 1 + ROUNDING
        least = self._least
        if not self.cost.of({**self.others, **least}) <= limit:
            return least, None
        room = limit - self.cost.of({**self.others, **least})
        kept, price = self._at(0.0), 0.0
        bound = self.loss(kept)
        if self._total(kept) > limit:
            low, high = self._prices
            kept = self._at(high)
            if self._total(kept) > limit:  # of losses that are next to nothing beside costs
                kept = least
            for _ in range(_BISECTIONS):  # prices differ by magnitudes
                price = math.sqrt(low * high)
                found = self._at(price)
                if self._total(found) > limit:
                    low = price
                else:
                    high, kept = price, found
            bound = max(self._dual(low, room), self._dual(high, room)) if self._parts else 0.0
            price = high
        kept = self._spent(kept, limit)
        if not self._parts:
            return kept, None
        if self.loss(kept) - bound > _GAP * self.loss(kept):
            kept, bound = self._exchanged(kept, bound, price, room, limit)
        return kept, min(bound, self.loss(kept))

    def loss(self, kept: Mapping[str, int]) -> float:
        """Return the sum of what groups lose."""
        indices = {name: np.searchsorted(some, kept[name]) for name, some in self.options.items()}
        return sum(float(self.losses[name][index]) for name, index in indices.items())

    def frontier(self) -> tuple[tuple[float, float], ...]:
        """Return costs of the whole model with the least loss at each, whatever the limit.

        They are the choices at one price each, from that at which nothing leaves to that at which
        all leaves that may: no choice of the same cost loses less where there is a bound.
        """
        choices = [{name: int(some[-1]) for name, some in self.options.items()}]
        choices += [self._at(price) for price in np.geomspace(*self._prices, _PRICES).tolist()]
        found: list[tuple[float, float]] = []
        for cost, loss in sorted({(self._total(kept), self.loss(kept)) for kept in choices}):
            if not found or loss <= found[-1][1]:  # to the dense model, which others may equal
                found.append((cost, loss))
        chosen = np.unique(np.linspace(0, len(found) - 1, _FRONTIER).round().astype(int))
        return tuple(found[i] for i in chosen)

    # ---- at a price ----------------------------------------------------------------------

    @cached_property
    def _least(self) -> dict[str, int]:
        return {name: int(some[0]) for name, some in self.options.items()}

    @cached_property
    def _parts(self) -> tuple[_Part, ...]:
        """Groups in parts whose costs add up; none where one has too many choices."""
        parts = []
        for names in self.cost.classes(self.options):
            sizes = [len(self.options[name]) for name in names]
            if math.prod(sizes) > _MOST_TOGETHER:
                return ()
            grid = np.meshgrid(*(self.options[name] for name in names), indexing="ij")
            counts = np.stack([axis.ravel() for axis in grid], axis=1)
            lost = np.meshgrid(*(self.losses[name] for name in names), indexing="ij")
            *front, last = names
            rows = []
            for few in itertools.product(*(self.options[name].tolist() for name in front)):
                kept = {**self.others, **self._least, **dict(zip(front, few, strict=True))}
                own = self.cost.over(last, self.options[last], kept)
                rows.append(own - own[0] + (self.cost.of(kept) if front else 0.0))
            costs = np.concatenate(rows)
            parts.append(_Part(names, counts, np.sum(lost, axis=0).ravel(), costs - costs[0]))
        return tuple(parts)

    def _total(self, kept: Mapping[str, int]) -> float:
        return self.cost.of({**self.others, **kept})

    def _at(self, price: float) -> dict[str, int]:
        """Return the widths of the least loss plus price, the smallest of several."""
        kept: dict[str, int] = {}
        if self._parts:
            for part in self._parts:
                kept |= part.at(int((part.losses + price * part.costs).argmin()))
            return {name: kept[name] for name in self.options}
        kept = {name: int(some[-1]) for name, some in self.options.items()}
        for _ in range(_SWEEPS):
            before = dict(kept)
            for name, some in self.options.items():
                costs = self.cost.over(name, some, {**self.others, **kept})
                kept[name] = int(some[(self.losses[name] + price * costs).argmin()])
            if kept == before:
                break
        return kept

    def _dual(self, price: float, room: float) -> float:
        paid = (float((part.losses + price * part.costs).min()) for part in self._parts)
        return sum(paid) - price * room

    @cached_property
    def _prices(self) -> tuple[float, float]:
        """Return a price below which nothing leaves, and one above which all leaves that may."""
        every = {**self.others, **{name: int(some[-1]) for name, some in self.options.items()}}
        low, high = math.inf, 0.0
        for name, losses in self.losses.items():
            costs = self.cost.over(name, self.options[name], every)
            lost, spared = losses[:-1] - losses[-1], costs[-1] - costs[:-1]
            some = (lost > 0) & (spared > 0)
            low = min([low, *(lost[some] / spared[some])])
            costs = self.cost.over(name, self.options[name], {**self.others, **self._least})
            gained, paid = losses[0] - losses[1:], costs[1:] - costs[0]
            high = max([high, *(gained[paid > 0] / paid[paid > 0])])
        return (0.9 * low, 1.1 * high) if math.isfinite(low) else (1.0, 1.0)

    # ---- within the limit ----------------------------------------------------------------

    def _spent(self, kept: dict[str, int], limit: float) -> dict[str, int]:
        """Widen groups, the one that gains most first, as far as the limit allows."""
        while True:
            room = limit - self._total(kept)
            best: tuple[float, str, int] | None = None
            for name, some in self.options.items():
                now = int(np.searchsorted(some, kept[name]))
                costs = self.cost.over(name, some, {**self.others, **kept})
                gains = self.losses[name][now] - self.losses[name]
                gains = np.where(costs - costs[now] <= room, gains, 0.0)
                widest = int(gains.argmax())
                if gains[widest] > 0 and (best is None or gains[widest] > best[0]):
                    best = float(gains[widest]), name, int(some[widest])
            if best is None:
                return kept
            kept = {**kept, best[1]: best[2]}

    def _exchanged(
        self, kept: dict[str, int], bound: float, price: float, room: float, limit: float
    ) -> tuple[dict[str, int], float]:
        """Return what an integer program finds over the choices that may be part of better ones.

        A choice may be, as long as its loss plus price is no more above the least of its part than
        the bound is below what is known (Sinha and Zoltners, "The multiple-choice knapsack
        problem", Operations Research 27, 1979).
        """
        known = self.loss(kept)
        paid = [part.losses + price * part.costs for part in self._parts]
        slack = (known - bound) * (1 + 1e-9)
        left = [
            np.flatnonzero(
                (own - own.min() <= slack) & (part.costs <= room) & (part.losses <= known)
            )
            for own, part in zip(paid, self._parts, strict=True)
        ]
        if not all(map(len, left)):
            return kept, bound
        pairs = list(zip(self._parts, left, strict=True))
        losses = np.concatenate([part.losses[some] for part, some in pairs]) / known
        costs = np.concatenate([part.costs[some] for part, some in pairs]) / max(room, 1e-300)
        owner = np.repeat(np.arange(len(left)), [len(some) for some in left])
        one_each = scipy.sparse.csr_array(
            (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(left), len(owner))
        )
        found = scipy.optimize.milp(
            losses,
            integrality=np.ones(len(owner), dtype=np.int64),
            bounds=scipy.optimize.Bounds(0.0, 1.0),
            constraints=[(one_each, 1, 1), (costs[None], -np.inf, 1)],
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
        if found.x is not None:
            chosen: dict[str, int] = {}
            for index, (part, some) in enumerate(pairs):
                chosen |= part.at(int(some[found.x[owner == index].argmax()]))
            # It counts a little over the limit as within.
            if self._total(chosen) <= limit and self.loss(chosen) < known:
                kept = self._spent({name: chosen[name] for name in self.options}, limit)
        if found.mip_dual_bound is not None:
            bound = max(bound, (float(found.mip_dual_bound) - _HIGHS) * known)
        return kept, bound


# ---- equal shares ------------------------------------------------------------------------


def equal_shares(
    options: Mapping[str, NDArray[np.int64]],
    others: Mapping[str, int],
    cost: CountedCost,
    limit: float,
) -> dict[str, int]:
    """Return widths near the share of every group that comes to the limit, within it.

    The coarsest groups, such as heads, are settled first: the others, which move in finer steps,
    make up for what these leave.  Groups of the same widths stay alike.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, some in options.items():
        alike.setdefault(tuple(some.tolist()), []).append(name)
    kept: dict[str, int] = {}

    def fits(widths: Mapping[str, float]) -> bool:
        return cost.of({**others, **kept, **widths}) <= limit * (1 + ROUNDING)

    for widths in sorted(alike, key=len):
        left = [name for name in options if name not in kept]
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            within = fits({name: share * float(options[name][-1]) for name in left})
            low, high = (share, high) if within else (low, share)
        nearest = sorted(widths, key=lambda width: (abs(width - low * widths[-1]), -width))
        least = {name: int(options[name][0]) for name in left}
        for width in [*nearest, widths[0]]:  # the least, where nothing fits
            found = dict.fromkeys(alike[widths], width)
            if fits({**least, **found}):
                break
        kept.update(found)
    return {name: kept[name] for name in options}
