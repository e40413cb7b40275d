"""The widths of least predicted distance within some limits.

Losses and costs of widths are tables, of any shape, in one multiple-choice knapsack
(`osscar.allocation.knapsack`); where costs of groups multiply, so do their tables.  Where that
makes too many entries, a few widths of each group, spread over all, are searched, and then closer
and closer ones around what was found, until nothing moves: such a choice has no bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from osscar.allocation.costs import ROUNDING, CountedCost
from osscar.allocation.knapsack import Knapsack, Solved, Together

_TOGETHER = 1 << 14
"""Entries of tables of groups whose costs multiply, at most, in one knapsack."""

_FEWEST = 6
"""Widths of a group around what was found."""

_ROUNDS = 40

_POINTS, _SPREAD = 24, 1.5
"""Points of the frontier, and the power by which they are closer to the dense model, where losses
differ by magnitudes."""

_DRAWN, _MOST_DRAWN = 1 << 10, 24
"""Entries of tables of several groups, and widths of each, that the frontier is made of."""

_HALVINGS = 40
"""Of the interval in which an equal share is looked for."""


class Chosen(NamedTuple):
    """What groups keep; no other widths within the limits lose less than `bound`.

    The bound is None where too many widths multiply.
    """

    kept: dict[str, int]
    bound: float | None = None


@dataclass(frozen=True, eq=False)
class Search:
    """Groups with a loss for each width that they may have, and costs of them all."""

    options: Mapping[str, NDArray[np.int64]]
    """The widths that each group may have, ascending."""
    losses: Mapping[str, NDArray[np.float64]]
    """Of these widths; they do not increase."""
    others: Mapping[str, int]
    """What other groups keep."""
    costs: Sequence[CountedCost]
    """Of the whole model, each with a limit of its own."""

    def choose(self, limits: Sequence[float]) -> Chosen:
        """Return the best widths within limits, one for each cost; the least where none are."""
        most = np.array(limits) * (1 + ROUNDING)
        kept = {name: int(some[0]) for name, some in self.options.items()}
        if not (self._total(kept) <= most).all():
            return Chosen(kept)
        largest = max(map(len, self.options.values()))
        widths, share = self._most(_TOGETHER, largest), 1.0
        for _ in range(_ROUNDS):
            before = kept
            kept, solved = self._better(kept, self._around(kept, share, widths), most)
            if self._entries(largest) <= _TOGETHER:  # these were all
                return Chosen(kept, min(solved.bound, self.loss(kept)))
            finest = all(share * len(some) <= widths / 2 for some in self.options.values())
            if finest and kept == before:
                break
            share *= 1.0 if finest else 2 / widths
        return Chosen(kept)

    def loss(self, kept: Mapping[str, int]) -> float:
        """Return the sum of what groups lose."""
        indices = {name: np.searchsorted(some, kept[name]) for name, some in self.options.items()}
        return sum(float(self.losses[name][index]) for name, index in indices.items())

    def frontier(self) -> tuple[tuple[float, float], ...]:
        """Return the only cost of the whole model, ascending, with about the least loss at each.

        It is that of the linear relaxation, the lower hull, over a few widths of each group, from
        the least widths to the widest.
        """
        near = 1 - np.linspace(1, 0, self._most(_DRAWN, _MOST_DRAWN)) ** _SPREAD
        some = {
            name: np.unique((near * (len(each) - 1)).round().astype(int))
            for name, each in self.options.items()
        }
        knapsack, least = self._knapsack(some)
        ends = [{n: int(each[i]) for n, each in self.options.items()} for i in (0, -1)]
        (low, high), found = (float(self._total(one)[0]) for one in ends), []
        for share in 1 - np.linspace(1, 0, _POINTS)[1:-1] ** _SPREAD:
            cost = low + share * (high - low)
            found.append((cost, knapsack.least(np.array([cost]) - least)))
        return ((low, self.loss(ends[0])), *found, (high, self.loss(ends[1])))

    # ---- tables --------------------------------------------------------------------------

    @cached_property
    def _coupled(self) -> list[tuple[str, ...]]:
        """Groups of which some cost multiplies, in the order of the options."""
        every = {names.intersection(self.options) for cost in self.costs for names in cost.coupled}
        largest = [one for one in every if len(one) > 1 and not any(one < other for other in every)]
        return sorted(tuple(name for name in self.options if name in one) for one in largest)

    def _entries(self, most: int) -> int:
        """Return how many entries tables of several groups have with so many widths of each."""
        sizes = {name: min(len(some), most) for name, some in self.options.items()}
        return sum(math.prod(sizes[name] for name in names) for names in self._coupled)

    def _total(self, kept: Mapping[str, int]) -> NDArray[np.float64]:
        return np.array([cost.of({**self.others, **kept}) for cost in self.costs])

    def _knapsack(
        self, some: Mapping[str, NDArray[np.int64]]
    ) -> tuple[Knapsack, NDArray[np.float64]]:
        """Return the tables of some widths, above the costs of the least of these, and those."""
        counts = {name: self.options[name][indices] for name, indices in some.items()}
        least = {name: int(own[0]) for name, own in counts.items()}
        place = {name: index for index, name in enumerate(counts)}

        def above(names: Sequence[str]) -> NDArray[np.float64]:
            """Return what widths of groups cost above the least, (widths, .., limits)."""
            if not names:
                return np.zeros(len(self.costs))
            *front, last = names
            rows = []
            for few in itertools.product(*(counts[name].tolist() for name in front)):
                every = {**self.others, **least, **dict(zip(front, few, strict=True))}
                over = [cost.over(last, counts[last], every) for cost in self.costs]
                rows.append(np.stack(over, axis=-1))
            shape = *(len(counts[name]) for name in names), len(self.costs)
            own = np.stack(rows).reshape(shape)
            return np.expand_dims(above(front), -2) + own - own[..., :1, :]

        tables: dict[tuple[str, ...], NDArray[np.float64]] = {}
        for names in [*((name,) for name in counts), *self._coupled]:
            costs = above(names)
            for known, table in tables.items():  # which have a part of it
                inside = [name for name in known if name in names]
                if inside:
                    part = table[tuple(slice(None) if n in inside else 0 for n in known)]
                    others = [axis for axis, name in enumerate(names) if name not in inside]
                    costs = costs - np.expand_dims(part, others)
            tables[names] = costs
        knapsack = Knapsack(
            [self.losses[name][indices] for name, indices in some.items()],
            [tables[name,] for name in counts],
            [Together(tuple(place[n] for n in names), tables[names]) for names in self._coupled],
        )
        return knapsack, self._total(least)

    # ---- widths --------------------------------------------------------------------------

    def _better(
        self, kept: dict[str, int], some: Mapping[str, NDArray[np.int64]], most: NDArray[np.float64]
    ) -> tuple[dict[str, int], Solved]:
        """Return the best of some widths within the limits, or those known where none is better."""
        knapsack, least = self._knapsack(some)
        solved = knapsack.solve(most - least)
        if solved.choice is not None:
            found, fewer = dict[str, int](), dict[str, int]()
            for (name, indices), index in zip(some.items(), solved.choice, strict=True):
                lost = self.losses[name]
                found[name] = int(self.options[name][indices[index]])
                # Of widths that lose the same, the least: it mostly costs less, too.
                fewer[name] = int(self.options[name][(lost <= lost[indices[index]]).argmax()])
            for one in (fewer, found):
                if (self._total(one) <= most).all() and self.loss(one) < self.loss(kept):
                    return one, solved
        return kept, solved

    def _most(self, entries: int, most: int) -> int:
        """Return how many widths each group can have so that tables have so many entries."""
        while most > _FEWEST and self._entries(most) > entries:
            most = max(_FEWEST, most * 9 // 10)
        return most

    def _around(
        self, kept: Mapping[str, int], share: float, widths: int
    ) -> dict[str, NDArray[np.int64]]:
        """Return some widths of each group, up to a share of all of them from what it keeps."""
        found = {}
        for name, some in self.options.items():
            now, reach = int(np.searchsorted(some, kept[name])), share * len(some)
            low, high = max(0, now - reach), min(len(some) - 1, now + reach)
            spread = np.linspace(low, high, min(widths, math.ceil(high - low) + 1))
            found[name] = np.unique([*spread.round().astype(int), now])
        return found


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
