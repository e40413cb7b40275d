"""The widths of least predicted divergence within some limits: one search over prices of costs.

Minimize ``f(k) = sum_g f_g(k_g)`` over the widths ``k_g`` that each group may have, with costs
``C_i(k) <= c_i`` for every limit i.  At prices p >= 0, one a limit, every group takes the width of
the least loss plus prices (Everett, "Generalized Lagrange multiplier method for solving problems of
optimum allocation of resources", Operations Research 11, 1963).  By weak duality no choice within
the limits loses less than

    L(p) = min over k of  f(k) + sum_i p_i (C_i(k) - c_i),

so that it is known how far from the best a choice may be.  L is concave, and each k that was chosen
at some prices is a plane above it.  The next prices are where the planes so far allow the most,
until the choice at these is on one of them (Kelley, "The cutting-plane method for solving convex
programs", Journal of the Society for Industrial and Applied Mathematics 8, 1960).

What the best prices choose may be a little over a limit: then groups are narrowed; and what the
limits leave is spent.  With hundreds of widths a group the gap is next to nothing; with few, what
the bound does not rule out is a small integer program.

Where a weight loses along two dimensions, costs of groups multiply.  All choices of such groups are
listed together, so that costs add up over the lists; of a long chain of convolutions, where these
are too many, each group takes its best width given the others', until none changes: such a choice
has no bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.optimize
from networkx.utils import UnionFind
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
_PLANES = 200
_NOTHING = 1e-200
"""A loss below which numbers in units of it overflow."""

_CLOSED = 1e-7
"""Of the loss, by which planes may lie above the bound when prices are the best."""

_PRICES = 96
_HALVINGS = 40
"""Of the interval in which an equal share is looked for."""

_FRONTIER = 24
"""Points of the frontier that are kept at most."""


class Chosen(NamedTuple):
    """What groups keep; no other widths within the limits lose less than `bound`.

    The bound is None where too many groups' costs multiply.  It was found at `prices`, (limits,),
    in losses for one of what a limit counts.
    """

    kept: dict[str, int]
    bound: float | None = None
    prices: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """Groups whose costs multiply, with all choices that they have together, the least first."""

    names: tuple[str, ...]
    counts: NDArray[np.int64]
    """What the groups keep, (choices, groups)."""
    losses: NDArray[np.float64]
    costs: NDArray[np.float64]
    """Above those of the least widths, (choices, limits)."""

    def at(self, choice: int) -> dict[str, int]:
        """Return what the groups keep."""
        return dict(zip(self.names, self.counts[choice].tolist(), strict=True))


class _Plane(NamedTuple):
    """A choice, its loss, and by how much it is over each limit: L(p) <= loss + p @ over."""

    kept: dict[str, int]
    loss: float
    over: NDArray[np.float64]

    def at(self, prices: NDArray[np.float64]) -> float:
        return self.loss + float(prices @ self.over)


@dataclass(frozen=True, eq=False)
class Search:
    """Groups with a loss for each width that they may have, and costs of them all."""

    options: Mapping[str, NDArray[np.int64]]
    """The widths that each group may have, ascending."""
    losses: Mapping[str, NDArray[np.float64]]
    others: Mapping[str, int]
    """What other groups keep."""
    costs: Sequence[CountedCost]
    """Of the whole model, each with a limit of its own."""

    def choose(self, limits: Sequence[float]) -> Chosen:
        """Return the best widths within limits, one for each cost; the least where none are."""
        most = np.array(limits) * (1 + ROUNDING)
        if not (self._total(self._least) <= most).all():
            return Chosen(self._least)
        planes, bound, prices = self._priced(most)
        nearest = sorted(planes, key=lambda plane: plane.at(prices))[: len(most) + 1]
        found = (self._spent(self._narrowed(plane.kept, most), most) for plane in nearest)
        kept = min(found, key=self.loss)
        if not self._parts:
            return Chosen(kept, prices=prices)
        if self.loss(kept) - bound > _GAP * self.loss(kept):
            kept, bound = self._exchanged(kept, bound, prices, most)
        return Chosen(kept, min(bound, self.loss(kept)), prices)

    def loss(self, kept: Mapping[str, int]) -> float:
        """Return the sum of what groups lose."""
        indices = {name: np.searchsorted(some, kept[name]) for name, some in self.options.items()}
        return sum(float(self.losses[name][index]) for name, index in indices.items())

    def frontier(
        self, prices: NDArray[np.float64], index: int = 0
    ) -> tuple[tuple[float, float], ...]:
        """Return one of the costs of the whole model with the least loss at each.

        They are of the choices at multiples of some prices, from those at which nothing leaves to
        those at which all leaves that may.
        """
        ray = prices / prices.sum() if prices.any() else np.eye(len(prices))[index]
        scales = np.geomspace(*self._scales(ray), _PRICES).tolist()
        choices = [self._widest, *(self._at(scale * ray) for scale in scales)]
        points = {(float(self._total(kept)[index]), self.loss(kept)) for kept in choices}
        found: list[tuple[float, float]] = []
        for cost, loss in sorted(points):
            if not found or loss <= found[-1][1]:  # others may equal the dense model
                found.append((cost, loss))
        chosen = np.unique(np.linspace(0, len(found) - 1, _FRONTIER).round().astype(int))
        return tuple(found[i] for i in chosen)

    # ---- at prices -----------------------------------------------------------------------

    @cached_property
    def _least(self) -> dict[str, int]:
        return {name: int(some[0]) for name, some in self.options.items()}

    @cached_property
    def _widest(self) -> dict[str, int]:
        return {name: int(some[-1]) for name, some in self.options.items()}

    @cached_property
    def _parts(self) -> tuple[_Part, ...]:
        """Groups in parts whose costs add up; none where one has too many choices."""
        parts = []
        classes: UnionFind[str] = UnionFind(self.options)
        for together in (names for cost in self.costs for names in cost.coupled):
            classes.union(*(together & self.options.keys()))
        for one in classes.to_sets():
            names = tuple(name for name in self.options if name in one)
            sizes = [len(self.options[name]) for name in names]
            if math.prod(sizes) > _MOST_TOGETHER:
                return ()
            grid = np.meshgrid(*(self.options[name] for name in names), indexing="ij")
            counts = np.stack([axis.ravel() for axis in grid], axis=1)
            lost = np.meshgrid(*(self.losses[name] for name in names), indexing="ij")
            *front, last = names
            rows = []
            for few in itertools.product(*(self.options[name].tolist() for name in front)):
                kept = {**self._least, **dict(zip(front, few, strict=True))}
                own = self._over(last, kept)
                rows.append(own - own[0] + (self._total(kept) if front else 0.0))
            costs = np.concatenate(rows)
            parts.append(_Part(names, counts, np.sum(lost, axis=0).ravel(), costs - costs[0]))
        return tuple(parts)

    def _total(self, kept: Mapping[str, int]) -> NDArray[np.float64]:
        return np.array([cost.of({**self.others, **kept}) for cost in self.costs])

    def _over(self, name: str, kept: Mapping[str, int]) -> NDArray[np.float64]:
        """Return costs by the width of one group, (widths, limits), less what is the same."""
        counts, every = self.options[name], {**self.others, **kept}
        return np.stack([cost.over(name, counts, every) for cost in self.costs], axis=-1)

    def _at(self, prices: NDArray[np.float64]) -> dict[str, int]:
        """Return the widths of the least loss plus prices, the smallest of several."""
        kept = dict(self._widest)
        for part in self._parts:
            kept |= part.at(int((part.losses + part.costs @ prices).argmin()))
        for _ in range(0 if self._parts else _SWEEPS):
            before = dict(kept)
            for name, some in self.options.items():
                paid = self.losses[name] + self._over(name, kept) @ prices
                kept[name] = int(some[paid.argmin()])
            if kept == before:
                break
        return kept

    def _priced(
        self, limits: NDArray[np.float64]
    ) -> tuple[list[_Plane], float, NDArray[np.float64]]:
        """Return the greatest bound with its prices, and the planes that were met on the way."""
        prices = best = np.zeros(len(limits))
        planes = [self._plane(kept, limits) for kept in (self._widest, self._least)]
        bound, saved = -math.inf, planes[0].over - planes[1].over
        most = np.array([self._scales(one)[1] for one in np.eye(len(limits))])
        unit = np.divide(planes[1].loss or 1.0, saved, where=saved > 0, out=np.ones(len(limits)))
        while len(planes) < _PLANES:
            plane = self._plane(self._at(prices), limits)
            if plane.at(prices) > bound:
                bound, best = plane.at(prices), prices
            known = any(plane.kept == one.kept for one in planes)
            planes.append(plane)
            if known and prices.any():
                break
            unit = np.where(best > 0, best, unit)
            prices, height = _highest(planes, most, unit)
            if height - bound <= _CLOSED * height:
                break
        return planes, bound, best

    def _plane(self, kept: dict[str, int], limits: NDArray[np.float64]) -> _Plane:
        return _Plane(kept, self.loss(kept), self._total(kept) - limits)

    def _scales(self, ray: NDArray[np.float64]) -> tuple[float, float]:
        """Return by which prices on a ray nothing leaves, and by which all leaves that may."""
        low, high = math.inf, 0.0
        for name, losses in self.losses.items():
            costs = self._over(name, self._widest) @ ray
            lost, spared = losses[:-1] - losses[-1], costs[-1] - costs[:-1]
            some = (lost > 0) & (spared > 0)
            low = min([low, *(lost[some] / spared[some])])
            costs = self._over(name, self._least) @ ray
            gained, paid = losses[0] - losses[1:], costs[1:] - costs[0]
            high = max([high, *(gained[paid > 0] / paid[paid > 0])])
        return (0.9 * low, 1.1 * high) if math.isfinite(low) else (1.0, 1.0)

    # ---- within the limits ---------------------------------------------------------------

    def _narrowed(self, kept: dict[str, int], limits: NDArray[np.float64]) -> dict[str, int]:
        """Narrow groups until all limits hold, first what loses least for what it spares.

        What it spares counts relative to what is over a limit, and no more than that.
        """
        while ((over := self._total(kept) - limits) > 0).any():
            excess = over[over > 0]
            best: tuple[float, str, int] | None = None
            for name, some in self.options.items():
                now = int(np.searchsorted(some, kept[name]))
                costs = self._over(name, kept)[: now + 1]
                spared = (costs[-1] - costs[:-1])[:, over > 0] / excess
                spared = spared.clip(max=1).sum(axis=1)
                lost = self.losses[name][:now] - self.losses[name][now]
                rates = np.divide(lost, spared, where=spared > 0, out=np.full(now, np.inf))
                if now and (best is None or rates.min() < best[0]):
                    best = float(rates.min()), name, int(some[rates.argmin()])
            assert best is not None  # since the least widths are within the limits
            kept = {**kept, best[1]: best[2]}
        return kept

    def _spent(self, kept: dict[str, int], limits: NDArray[np.float64]) -> dict[str, int]:
        """Widen groups, the one that gains most first, as far as the limits allow."""
        while True:
            room = limits - self._total(kept)
            best: tuple[float, str, int] | None = None
            for name, some in self.options.items():
                now = int(np.searchsorted(some, kept[name]))
                costs = self._over(name, kept)
                gains = self.losses[name][now] - self.losses[name]
                gains = np.where((costs - costs[now] <= room).all(axis=1), gains, 0.0)
                widest = int(gains.argmax())
                if gains[widest] > 0 and (best is None or gains[widest] > best[0]):
                    best = float(gains[widest]), name, int(some[widest])
            if best is None:
                return kept
            kept = {**kept, best[1]: best[2]}

    def _exchanged(
        self,
        kept: dict[str, int],
        bound: float,
        prices: NDArray[np.float64],
        limits: NDArray[np.float64],
    ) -> tuple[dict[str, int], float]:
        """Return what an integer program finds over the choices that may be part of better ones.

        A choice may be, if its loss plus prices is no more above the least of its part than the
        bound is below what is known (Sinha and Zoltners, "The multiple-choice knapsack problem",
        Operations Research 27, 1979).
        """
        known, room = self.loss(kept), limits - self._total(self._least)
        slack = (known - bound) * (1 + 1e-9)
        pairs = []
        for part in self._parts:
            paid = part.losses + part.costs @ prices
            within = (part.costs <= room).all(axis=1) & (part.losses <= known)
            pairs.append((part, np.flatnonzero((paid - paid.min() <= slack) & within)))
        if not all(len(some) for _, some in pairs):
            return kept, bound
        losses = np.concatenate([part.losses[some] for part, some in pairs]) / known
        costs = np.concatenate([part.costs[some] for part, some in pairs]) / room.clip(1e-300)
        owner = np.repeat(np.arange(len(pairs)), [len(some) for _, some in pairs])
        one_each = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
        found = scipy.optimize.milp(
            losses,
            integrality=np.ones(len(owner), dtype=np.int64),
            bounds=scipy.optimize.Bounds(0.0, 1.0),
            constraints=[(one_each, 1, 1), (costs.T, -np.inf, 1)],
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
        if found.x is not None:
            chosen: dict[str, int] = {}
            for index, (part, some) in enumerate(pairs):
                chosen |= part.at(int(some[found.x[owner == index].argmax()]))
            # It counts a little over a limit as within.
            if (self._total(chosen) <= limits).all() and self.loss(chosen) < known:
                kept = self._spent({name: chosen[name] for name in self.options}, limits)
        if found.mip_dual_bound is not None:
            bound = max(bound, (float(found.mip_dual_bound) - _HIGHS) * known)
        return kept, bound


def _highest(
    planes: Sequence[_Plane], most: NDArray[np.float64], unit: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return the prices, none above the most, where the least of the planes is highest; its height.

    Prices differ by magnitudes: each has a unit, about its own size.
    """
    within = [plane.loss for plane in planes if (plane.over <= 0).all() and plane.loss > 0]
    scale = max(min(within, default=1.0), _NOTHING)
    over = np.array([plane.over for plane in planes]) * unit / scale
    losses = np.array([plane.loss for plane in planes]) / scale
    found = scipy.optimize.linprog(
        np.append(np.zeros(len(unit)), -1.0),
        A_ub=np.column_stack([-over, np.ones(len(planes))]),
        b_ub=losses,
        bounds=[*((0.0, top) for top in most / unit), (None, None)],
    )
    if found.x is None:  # of numbers that HiGHS cannot tell apart
        return unit, -math.inf
    return found.x[:-1] * unit, float(found.x[-1]) * scale


def equal_shares(
    options: Mapping[str, NDArray[np.int64]],
    others: Mapping[str, int],
    costs: Sequence[CountedCost],
    limits: Sequence[float],
) -> dict[str, int]:
    """Return widths near the share of every group that comes to a limit, within all of them.

    The coarsest groups, such as heads, are settled first: the others, which move in finer steps,
    make up for what these leave.  Groups of the same widths stay alike.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, some in options.items():
        alike.setdefault(tuple(some.tolist()), []).append(name)
    kept: dict[str, int] = {}

    def fits(widths: Mapping[str, float]) -> bool:
        every = {**others, **kept, **widths}
        pairs = zip(costs, limits, strict=True)
        return all(cost.of(every) <= limit * (1 + ROUNDING) for cost, limit in pairs)

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
