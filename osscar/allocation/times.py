"""Seconds of a forward pass as a function of the units that groups keep: a sum over its operators.

On a device time is a staircase in most widths, and operations do not see it.  So each operator that
has units of a group in a dimension is timed alone, at the shapes that it has at some widths, with
straight lines between these; equal calls are timed once.  What is left of a whole pass is a
constant.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from networkx.utils import UnionFind
from numpy.typing import NDArray

from graph import Operator, Size
from osscar.allocation.clocks import Clock, OperatorCall
from osscar.allocation.costs import CountedCost, Table
from osscar.allocation.task import SMALL, PruningTask, unit_width
from osscar.base.memory import attempt
from osscar.base.process import memory_kept
from osscar.base.timing import clock as wall_clock
from osscar.base.timing import progress_bar

_NEGLIGIBLE = 0.002
"""Of a pass: operators that take less, all together, are part of the constant."""

_SECONDS, _PASSES = 15.0, 4
"""Operators take so long, or as long as so many dense passes if that is longer; to make the tensors
that they read takes about as long again."""

_ROUNDS, _MOST_ROUNDS = 3, 9
"""How often each call is timed, at least and at most, spread over the whole time, as other work
slows a machine down for seconds.  Medians count."""

_STEP = 8
"""Stairs of layers up to the width `SMALL` begin behind multiples of this; all are looked for."""

ROUND = 16
"""Wider layers are timed at multiples of this, and may have no other widths."""

_GRIDS = 16, 12, 8, 6, 4
"""Widths of a group at which an operator is timed at most: the first for which there is time. With
the first, all stairs of small layers are looked for.  An operator of two groups has half as many of
each."""

_JOINT = 4
"""Widths of groups that add up to one dimension, between the least and all of each."""


def time_operators(task: PruningTask, clock: Clock) -> CountedCost:
    """Time the operators over the widths that the groups of a task may have, once."""
    task = task.with_streams[-1]
    ranges = {name: (int(some[0]), int(some[-1])) for name, some in task.options.items()}
    units = {group.name: group.units for group in clock.traced.groups}
    ranges |= {name: (kept, units[name]) for name, kept in task.keep.items() if name in units}
    key = clock.described, *sorted(ranges.items())
    return task.prepared.once(key, lambda: tabled(clock, ranges))


def as_shares(times: CountedCost) -> CountedCost:
    """Return times as shares of the dense model's."""
    dense, tables = times.dense, (one for one in times.terms if isinstance(one, Table))
    terms = tuple(replace(one, seconds=one.seconds / dense) for one in tables)
    return replace(times, fixed=times.fixed / dense, terms=terms)


@memory_kept()
def tabled(clock: Clock, ranges: Mapping[str, tuple[int, int]]) -> CountedCost:
    """Time the operators over the widths of some groups: the fewest units of each, and all."""
    units = {group.name: group.units for group in clock.traced.groups}
    ends = {n: one for n, one in ranges.items() if n in units and one[0] < one[1]}
    unit_widths = {group.name: unit_width(group) for group in clock.traced.groups}
    clock.dense.timeit(1)  # from here on its memory is there
    whole = [clock.dense.timeit(1) for _ in range(_ROUNDS)]
    limit = max(_SECONDS, _PASSES * statistics.median(whole))
    dense = _Calls(clock, units)
    least = _NEGLIGIBLE * statistics.median(whole)
    operators = _worthwhile(dense, clock.traced.operators, ends, least)
    getting_ready = dense.getting_ready / max(len(dense.noted), 1)
    for most in _GRIDS:
        grids = _Grids(ends, unit_widths, most)
        sweeps = [one for operator, axes in operators for one in grids.sweeps(operator, axes)]
        calls = _Calls(clock, units)
        expected = 0.0
        for sweep in sweeps:
            at_dense = dense.seconds(dense.key(sweep.operator, {}))
            for widths in sweep.widths:
                if (key := calls.key(sweep.operator, widths)) not in calls.noted:
                    calls.note(key, sweep.operator, widths)
                    expected += at_dense * min(w / units[name] for name, w in widths.items())
        left = limit - getting_ready * len(calls.noted)
        if _ROUNDS * expected <= left:
            break
    rounds = int(min(max(_ROUNDS, left / max(expected, 1e-9)), _MOST_ROUNDS))
    with progress_bar("timing operators", rounds) as bar:
        for _ in range(rounds):
            whole.append(clock.dense.timeit(1))
            calls.time_all()
            bar.advance()
    tables: dict[tuple[Any, ...], Table] = {}
    for sweep in sweeps:
        seconds = np.array([calls.seconds(calls.key(sweep.operator, w)) for w in sweep.widths])
        if np.isnan(seconds).any():  # it cannot be called at these widths: a part of the constant
            continue
        for table in sweep.tables(seconds):
            same = table.names, *map(bytes, table.grids)
            before = tables[same].seconds if same in tables else 0.0
            tables[same] = replace(table, seconds=table.seconds + before)
    alone = sum(float(table.seconds.flat[-1]) for table in tables.values())
    scale = min(1.0, statistics.median(whole) / alone) if alone else 1.0
    terms = tuple(Table(t.names, t.grids, scale * t.seconds) for t in tables.values())
    fixed = max(statistics.median(whole) - alone, 0.0)
    return CountedCost(fixed, terms, units, clock.described)


# ---- what is timed -----------------------------------------------------------------------


Axes = tuple[dict[str, int], ...]
"""Of an operator, groups with what one unit of each adds to a dimension; those that add up to one
are together, and come first."""


@dataclass(frozen=True, eq=False)
class _Sweep:
    """An operator at all widths of one or two axes, other groups at those of the dense model."""

    operator: Operator
    axes: Axes
    counts: tuple[NDArray[np.int64], ...]
    """Of each axis, its widths, ascending, (widths, groups)."""
    has_others: bool

    @property
    def widths(self) -> Iterator[dict[str, int]]:
        """The widths, those of the last axis change first."""
        each = (
            [dict(zip(axis, row, strict=True)) for row in counts.tolist()]
            for axis, counts in zip(self.axes, self.counts, strict=True)
        )
        for few in itertools.product(*each):
            yield {name: width for one in few for name, width in one.items()}

    def tables(self, seconds: NDArray[np.float64]) -> Iterator[Table]:
        """Yield what seconds at all widths come to, as a sum.

        Of groups that add up, each takes its part of a straight line: so at most two groups are in
        a table.
        """
        seconds = seconds.reshape([*map(len, self.counts)])
        if self.has_others:  # what it takes in the dense model would be added up several times
            seconds = seconds - seconds.flat[-1]
        names = tuple(next(iter(axis)) for axis in self.axes)
        grids, (first, *_) = tuple(counts[:, 0] for counts in self.counts), self.counts
        if first.shape[1] == 1:
            yield Table(names, grids, seconds)
            return
        numbers = self.axes[0]
        sizes = first @ np.array([*numbers.values()])
        slopes, start = np.polyfit(sizes, seconds.reshape(len(first), -1), 1)
        for (name, number), counts in zip(numbers.items(), first.T, strict=True):
            grid = counts[[0, -1]]
            line = (number * np.outer(grid, slopes)).reshape(2, *seconds.shape[1:])
            yield Table((name, *names[1:]), (grid, *grids[1:]), line)
        if names[1:]:
            yield Table(names[1:], grids[1:], start)


@dataclass(frozen=True)
class _Grids:
    """The units of groups at which operators are timed.

    They are before, at and behind the stairs of small layers if there is time, else `most` of them.
    """

    ends: Mapping[str, tuple[int, int]]
    unit_widths: Mapping[str, int]
    most: int

    def sweeps(self, operator: Operator, axes: Axes) -> Iterator[_Sweep]:
        """Yield at what an operator is timed: each axis by itself, unless there are few."""
        few = len(axes) <= 2 and sum(len(one) > 1 for one in axes) <= 1
        for part in [axes] if few else [(one,) for one in axes]:
            counts = tuple(self._counts([*one], self.most // len(part)) for one in part)
            yield _Sweep(operator, part, counts, not few)

    def _counts(self, names: Sequence[str], most: int) -> NDArray[np.int64]:
        if len(names) > 1:
            low, high = np.array([self.ends[name] for name in names]).T
            shares = np.linspace(0, 1, _JOINT)[:, None]
            return np.asarray(np.round(low + shares * (high - low)), np.int64)
        (low, high), width = self.ends[names[0]], self.unit_widths[names[0]]
        if self.most == _GRIDS[0] and high * width <= SMALL:
            step = _STEP // math.gcd(_STEP, width)
            found = [n + m for n in range(0, high + 1, step) for m in (-1, 0, 1)]
        else:
            round_to = ROUND if high * width > SMALL else _STEP
            step = round_to // math.gcd(round_to, width)
            found = [round(n / step) * step for n in np.linspace(low, high, max(most, 2))]
        return np.array(sorted({low, high, *(n for n in found if low < n < high)}))[:, None]


class _Calls:
    """Operators at shapes, equal ones once; all of them are timed once a round."""

    def __init__(self, clock: Clock, units: Mapping[str, int]) -> None:
        self._clock, self._units = clock, units
        self.noted: dict[str, OperatorCall] = {}
        """The operators at their widths, by `key`."""
        self.getting_ready = 0.0
        """Seconds that it took the clock to be ready for them."""
        self._timers: dict[str, Callable[[], float]] = {}
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._order = random.Random(0)

    def key(self, operator: Operator, widths: Mapping[str, int]) -> str:
        """Return what equal calls have in common."""
        every = {**self._units, **widths}
        given = operator.arguments_at(lambda size: size.at(every), lambda *operand: operand)
        return f"{operator.function} {given}"

    def note(self, key: str, operator: Operator, widths: Mapping[str, int]) -> None:
        """Note that it is to be timed."""
        self.noted[key] = operator, partial(Size.at, kept={**self._units, **widths})

    def time_all(self) -> None:
        """Time each once, in any order; what cannot be called takes NaN."""
        if not self._timers:
            began = wall_clock()
            ready = self._clock.ready([*self.noted.values()])
            self._timers = dict(zip(self.noted, ready, strict=True))
            self.getting_ready = wall_clock() - began
        # Neighbours in a row would find in the cache what a pass has to fetch.
        for key in self._order.sample([*self._timers], len(self._timers)):
            seconds = math.nan
            with attempt():  # numbers in the code that do not follow widths
                seconds = self._timers[key]()
            self._seconds[key].append(seconds)

    def seconds(self, key: str) -> float:
        """Return what a call took; NaN where it failed."""
        return statistics.median(self._seconds[key])


def _worthwhile(
    dense: _Calls, operators: Sequence[Operator], names: Collection[str], least: float
) -> list[tuple[Operator, Axes]]:
    """Return the operators whose seconds depend on groups, with their axes.

    They are timed in the dense model; those that take less than so long, all together, are left.
    """
    found = []
    for one in operators:
        if axes := _axes(one, names):
            key = dense.key(one, {})
            dense.note(key, one, {})
            found.append((one, axes, key))
    for _ in range(_ROUNDS):
        dense.time_all()
    seconds = {key: dense.seconds(key) for key in dense.noted}
    left, taken = set[str](), 0.0
    number = Counter(key for _, _, key in found)
    for key in sorted(seconds, key=lambda key: seconds[key] * number[key]):
        taken += seconds[key] * number[key]
        if not taken > least:
            left.add(key)
    return [(one, axes) for one, axes, key in found if key not in left and seconds[key] > 0]


def _axes(operator: Operator, names: Collection[str]) -> Axes:
    """Return the axes of some groups in an operator."""
    numbers: dict[str, int] = {}
    together: UnionFind[str] = UnionFind()
    for operand in (*operator.reads, *operator.outputs):
        for size in operand.dims:
            own = {group: n for several, n in size.terms for group in several if group in names}
            numbers = own | numbers
            if own:
                together.union(*own)
    found = ({name: numbers[name] for name in sorted(one)} for one in together.to_sets())
    return tuple(sorted(found, key=lambda axis: (-len(axis), [*axis])))
