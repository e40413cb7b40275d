"""Seconds of each group at the widths that it may have: where the stairs are.

They are those of the table that `--speedup` uses (`osscar.allocation.times`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from osscar.allocation.clocks import clock_of
from osscar.allocation.costs import CountedCost
from osscar.allocation.costs import Table as Times
from osscar.allocation.task import PruningTask
from osscar.allocation.times import time_operators
from osscar.report.sections import Table, from_zero, new_figure, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_SHARES = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25}
"""Of the units, for each of which the table has a column."""

_STEEP, _HIGH, _STAIRS = 3.0, 0.05, 3
"""A stair rises so many times as steeply as the whole curve, and by this share of it at least; so
many are named, the highest first."""

_DRAWN = 6
"""Panels, of the groups that can save most: a phone shows no more at once."""


@dataclass(frozen=True)
class GroupTimes:
    """Seconds of the operators that have units of a group, with all others whole.

    Groups of equal blocks, which take the same, are one.
    """

    name: str
    """That of all of them, such as ``layers.*.mlp``."""
    groups: tuple[str, ...]
    kind: str
    kept: tuple[int, ...]
    """Widths, ascending; the last is that of the dense model."""
    seconds: tuple[float, ...]
    """Of each of the groups."""

    @property
    def stairs(self) -> list[int]:
        """The widths behind which time rises most steeply, the highest stair first."""
        rise, run = np.diff(self.seconds), np.diff(self.kept)
        whole = self.seconds[-1] - self.seconds[0]
        mean = whole / (self.kept[-1] - self.kept[0])
        found = [i for i in np.argsort(-rise, kind="stable") if rise[i] > _STEEP * mean * run[i]]
        return [self.kept[i] for i in found if rise[i] > _HIGH * whole][:_STAIRS]

    def at(self, share: float) -> tuple[int, float]:
        """Return the width of a share of the units, and its seconds."""
        width = max(self.kept[0], round(share * self.kept[-1]))
        return width, float(np.interp(width, self.kept, self.seconds))


@dataclass(frozen=True)
class ModelTimes:
    """What a pass takes, and the groups of a model by widths."""

    timed: str
    """A pass, and what its time depends on, in words."""
    dense: float
    """Seconds of a pass of the dense model."""
    groups: tuple[GroupTimes, ...]
    """In the order of the model, without those on which no timed operator depends."""

    @classmethod
    def measured(cls, task: PruningTask) -> ModelTimes:
        """Time the operators of a pass over the first batch, as `--speedup` does, once."""
        cost = time_operators(task, clock_of(task))
        return cls(cost.assumed, cost.dense, tuple(_by_group(task, cost)))

    @property
    def table(self) -> Table:
        """A row for each group."""
        columns: dict[str, Callable[[GroupTimes], str]] = {
            "group": lambda one: one.name,
            "groups >": lambda one: str(len(one.groups)) if one.groups[1:] else "",
            "units >": lambda one: str(one.kept[-1]),
            "all >": lambda one: _milliseconds(one.seconds[-1]),
            **{f"{name} >": partial(_at, share=share) for name, share in _SHARES.items()},
            "fast up to": lambda one: ", ".join(map(str, one.stairs)),
        }
        return table("Milliseconds of groups at numbers of units", columns, self.groups)

    def figure(self) -> Drawing:
        """Draw the groups that can save most; of several widths alone there are stairs."""
        stairs = [one for one in self.groups if len(one.kept) > 2]
        shown = sorted(stairs, key=lambda one: one.seconds[0] - one.seconds[-1])[:_DRAWN]
        figure, panels = new_figure(max(1, len(shown)), height=0.4 + 1.3 * max(1, len(shown)))
        for axes, one in zip(panels, shown, strict=False):
            milliseconds = [1000 * seconds for seconds in one.seconds]
            axes.plot(one.kept, milliseconds, "o-", color="C0", markersize=2.5, linewidth=1.2)
            for width in one.stairs:
                axes.axvline(width, color="k", linewidth=0.7, linestyle=":")
            axes.set_title(one.name, loc="left", fontsize=9)
            axes.set_ylabel("ms")
            axes.locator_params(axis="x", integer=True)
            axes.set_xlim(0)
            from_zero(axes)
        panels[-1].set_xlabel("units kept")
        return figure


def _by_group(task: PruningTask, cost: CountedCost) -> Iterator[GroupTimes]:
    """Yield what the groups that share a budget take by a table of times, those alike once."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for group in (*task.shared, *task.streams):
        grids = [
            grid
            for one in cost.terms
            if isinstance(one, Times)
            for name, grid in zip(one.names, one.grids, strict=True)
            if name == group.name
        ]
        if grids:
            kept = np.unique(np.concatenate(grids))
            seconds = cost.over(group.name, kept, {}).round(12)  # sums of the same, in any order
            form = re.sub(r"\d+", "#", group.name)
            key = form, str(group.kind), tuple(kept.tolist()), tuple(seconds.tolist())
            alike[key].append(group.name)
    for (_, *times), names in alike.items():
        parts = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
        joined = "".join(part[0] if len({*part}) == 1 else "*" for part in parts)
        yield GroupTimes(joined, tuple(names), *times)


# ---- shown -------------------------------------------------------------------------------


def _milliseconds(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _at(one: GroupTimes, share: float) -> str:
    width, seconds = one.at(share)
    return f"{width}: {_milliseconds(seconds)}"
