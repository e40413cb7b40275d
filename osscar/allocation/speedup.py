"""Widths whose model is as fast as is wanted: whole models are built, timed, and decide.

What a width saves in time depends on the device.  A table of times (`osscar.allocation.times`), the
operations, and the operations with round widths each propose widths of least predicted distance
within a limit; whole models are timed beside the dense one, and the limit is moved until the time
fits.  Of the models that are fast enough, the one of least predicted distance is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from timeit import Timer
from typing import NamedTuple

from torch import nn

from osscar.allocation.clocks import Clock
from osscar.allocation.task import PruningTask
from osscar.allocation.timed import clock_of
from osscar.base.errors import EquivalenceError, RequestError
from osscar.base.timing import interleaved
from osscar.network.modules import copied
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink

CLOSE = 0.02
"""How near the timed speed-up has to come to the one that was asked for."""

_TURNS, _MOST_TURNS = 5, 60
_SECONDS = 60.0
"""Models are timed in so many turns at least, and then until the error is half of what is `CLOSE`,
or clearly less than what is wanted is away, there were the most, or that took so long."""

_CLEARLY = 4.0
"""A speed-up is not the one that is wanted if it is so many errors further away than `CLOSE`."""

_PROPOSED = 16
"""How many limits are tried for a proposal at most: most of them propose what was timed before."""

_FINEST = 1e-3
"""Of the dense model's time, by which limits differ at least."""

Kept = dict[str, int]

Point = tuple[float, float]
"""A limit, and the seconds of the model that came of it, relative to the dense one."""


class Ratio(NamedTuple):
    """How many times as fast as the dense model one is, and the relative error of that."""

    speedup: float
    error: float

    def told(self, wanted: float) -> float:
        """Return the error up to which it is known whether this is what is wanted."""
        return max(CLOSE / 2, (abs(self.speedup / wanted - 1) - CLOSE) / _CLEARLY)


class Timed(NamedTuple):
    """Widths, and how fast their model was."""

    kept: Kept
    speedup: float


class Ends(NamedTuple):
    """Limits between which widths are looked for: the model of one is too fast, the other's slow.

    `quick` are the widths of the first, if a proposal came to them.
    """

    fast: Point
    slow: Point
    quick: Timed | None = None


@dataclass(frozen=True)
class Proposal:
    """A way to come to widths."""

    within: Callable[[float], Kept]
    """Returns the best widths of which a share of the dense model's time is expected."""
    models: int
    """How many are built and timed at most."""


@dataclass(eq=False)
class WholeModels:
    """Models of the first units of each group, timed beside the dense one."""

    task: PruningTask
    ratios: dict[tuple[int, ...], Ratio] = field(default_factory=dict)
    """How fast they were, by their widths in the order of the groups that share budgets."""

    @classmethod
    def shared(cls, task: PruningTask) -> WholeModels:
        """Return those of a task, with what others of the same model have timed."""
        request = task.request
        timed = request.timed, request.timed_in, request.context, request.batch
        key = "models", *timed, *task.options, *sorted(task.keep.items())
        return cls(task, task.prepared.timed.setdefault(key, {}))

    @cached_property
    def clock(self) -> Clock:
        """What times them."""
        return clock_of(self.task)

    @property
    def wanted(self) -> float:
        """The speed-up that is asked for."""
        assert self.task.request.speedup is not None
        return self.task.request.speedup

    @property
    def speedups(self) -> dict[tuple[int, ...], float]:
        """How fast they were, by their widths."""
        return {key: ratio.speedup for key, ratio in self.ratios.items()}

    @property
    def error(self) -> float:
        """The largest, of those of which it is not known whether they are as fast as wanted."""
        unsure = (r.error for r in self.ratios.values() if r.error > r.told(self.wanted))
        return max(unsure, default=0.0)

    def key(self, kept: Mapping[str, int]) -> tuple[int, ...]:
        """Return what stands for widths."""
        return tuple(kept[name] for name in self.task.options)

    def speedup(self, kept: Mapping[str, int]) -> float:
        """Return how many times as fast as the dense model it is.

        Each is timed once; again where that was for another speed-up, and is too rough for this.

        A `RequestError` says that none can be built, or that the device is too noisy to tell.
        """
        key = self.key(kept)
        found = self.ratios.get(key)
        if found is None or found.error > max(CLOSE, found.told(self.wanted)):
            smaller = _built(self.task.prepared, {**self.task.keep, **kept})
            found = time_against(self.clock.dense, self.clock.timer(smaller), self.wanted)
            self.ratios[key] = found
        return found.speedup

    def ends(self, expected: Callable[[Kept], float]) -> tuple[Point, Point]:
        """Return what is expected of the least widths and all, and what they took."""
        least = self.task.least
        return (expected(least), 1 / self.speedup(least)), (1.0, 1.0)

    def limit(self, wanted: float, expected: Callable[[Kept], float]) -> float:
        """Return the limit at which widths are as fast as wanted, on a line between the ends."""
        return _between(*self.ends(expected), 1 / wanted)

    def check_reach(self, wanted: float) -> None:
        """Time the model of the least widths: a `RequestError` says that no model is so fast."""
        fastest = self.speedup(self.task.least)
        if fastest < wanted * (1 - CLOSE):
            raise RequestError(
                f"speedup {wanted:g} cannot be met: the smallest possible model is "
                f"{fastest:.2f} times as fast as the dense one; ask for less, or prune more kinds "
                "of units"
            )


def as_fast_as(
    models: WholeModels,
    wanted: float,
    expected: Callable[[Kept], float],
    proposals: Sequence[Proposal],
    start: float,
) -> dict[int, Timed]:
    """Return widths whose model was timed to be as fast as wanted, by the place of the proposal.

    It is faster where other limits of the request, or the widths that there are, allow nothing
    between.  Where no proposal fits, the first goes on once more between what was timed.  A
    `RequestError` says that none was found, and whether the device or the widths are why.

    Parameters
    ----------
    expected
        Returns what share of the dense model's time widths take, by the table.
    proposals
        The first begins at the limit `start`, the others where it ended.
    """
    found, ends = dict[int, Timed](), [Ends(*models.ends(expected))] * len(proposals)
    for some in (proposals, proposals[:1]):
        for place, proposal in enumerate(some):
            timed, ends[place], limit = _fitted(models, wanted, proposal, ends[place], start)
            if place == 0:
                start = limit
            if timed is not None:
                found[place] = timed
        if found:
            break
    if not found:
        told = sorted(models.speedups.values())
        near = min(told, key=lambda speedup: abs(speedup / wanted - 1))
        noise = (
            f"this device is too noisy to aim at a time, which is known to {models.error:.1%} "
            "only; end what else runs on it, or give flops (`--flops`)"
        )
        tries = f"no more are tried; ask for {near:.2f}, or give flops (`--flops`)"
        raise RequestError(
            f"speedup {wanted:g} cannot be met within {CLOSE:.0%}: of {len(told)} models that "
            f"were timed the closest is {near:.2f} times as fast as the dense one, and "
            f"{noise if models.error else tries}"
        )
    return found


def _fitted(
    models: WholeModels, wanted: float, proposal: Proposal, ends: Ends, start: float
) -> tuple[Timed | None, Ends, float]:
    """Return widths that a proposal comes to within what is `CLOSE`, their limit, and its ends.

    They are faster if nothing lies between these and what is too slow; None where neither is found.
    Then the limit is the next one to try.
    """
    limit, timed = start, set[tuple[int, ...]]()
    for _ in range(_PROPOSED):
        kept = proposal.within(limit)
        key = models.key(kept)
        if key not in timed and len(timed) == proposal.models:
            return None, ends, limit
        timed.add(key)
        found = Timed(kept, models.speedup(kept))
        if abs(found.speedup / wanted - 1) <= CLOSE:
            return found, ends, limit
        at = limit, 1 / found.speedup
        fast = found.speedup > wanted
        ends = ends._replace(fast=at, quick=found) if fast else ends._replace(slow=at)
        if ends.slow[0] - ends.fast[0] <= _FINEST:
            break
        limit = _between(ends.fast, ends.slow, 1 / wanted)
    return ends.quick, ends, ends.fast[0]


def _between(fast: Point, slow: Point, seconds: float) -> float:
    """Return the limit at which so many seconds are expected, between two with their seconds.

    It is interpolated, but not to the ends, as times are noisy: a bisection where these mislead.
    """
    part = (slow[1] - seconds) / max(slow[1] - fast[1], 1e-9)
    return slow[0] + min(max(part, 0.1), 0.9) * (fast[0] - slow[0])


def time_against(dense: Timer, other: Timer, wanted: float) -> Ratio:
    """Return the ratio of the times of the dense model and of another one, a median.

    Its error is about half of the interquartile range of the single ratios, over the root of their
    number.  It is as small as what is wanted asks for; a `RequestError` is raised if it cannot be.
    """
    turns: list[tuple[float, ...]] = []
    while True:
        turns += zip(*interleaved((dense, other), _TURNS, "timing"), strict=True)
        low, middle, high = statistics.quantiles((a / b for a, b in turns), n=4)
        found = Ratio(middle, (high - low) / 2 / len(turns) ** 0.5 / middle)
        if found.error <= found.told(wanted):
            return found
        if len(turns) >= _MOST_TURNS or sum(map(sum, turns)) >= _SECONDS:
            break
    if not found.error <= CLOSE:
        raise RequestError(
            f"this device is too noisy to time: a speed-up of {middle:.2f} is only known to "
            f"{found.error:.0%}; end what else runs on it, or give flops in its place"
        )
    return found


def _built(prepared: Prepared, kept: Mapping[str, int]) -> nn.Module:
    """Return a copy of the dense model that keeps the first units of each group."""
    fewer = [(g, range(kept[g.name])) for g in prepared.groups if g.name in kept]
    plans = (GroupPlan.of(g, tuple(some)) for g, some in fewer if len(some) < g.units)
    smaller = copied(prepared.model)
    try:
        shrink(smaller, PruningPlan(tuple(plans)), [prepared.example])
    except EquivalenceError as error:
        raise RequestError(
            f"no trial model can be built to time: {error}; give flops (`--flops`)"
        ) from error
    return smaller
