"""Widths whose model is as fast as is wanted: whole models are built, timed, and decide.

What a width saves in time depends on the device.  A table of times (`osscar.allocation.times`), the
operations, and the operations with round widths each propose widths of least predicted distance
within a limit; whole models are timed beside the dense one, and the limit is moved until the time
fits.  Of the models that are fast enough, the one of least predicted distance is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from timeit import Timer
from typing import NamedTuple

from torch import nn

from osscar.allocation.clocks import Clock, clock_of
from osscar.allocation.task import PruningTask
from osscar.base.errors import RequestError
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
"""What every group keeps of which a request or a budget says so."""

Proposal = Callable[[float], Kept]
"""Returns the best widths of which a share of the dense model's time is expected."""

Point = tuple[float, float]
"""A limit, and the seconds of the model that came of it, relative to the dense one."""

_DENSE: Point = (1.0, 1.0)


class Ratio(NamedTuple):
    """How many times as fast as the dense model one is, and the relative error of that."""

    speedup: float
    error: float

    def told(self, wanted: float) -> float:
        """Return the error up to which it is known whether this is what is wanted."""
        return max(CLOSE / 2, (abs(self.speedup / wanted - 1) - CLOSE) / _CLEARLY)


@dataclass(eq=False)
class WholeModels:
    """Models of the first units of each group, timed beside the dense one."""

    task: PruningTask
    ratios: dict[frozenset[tuple[str, int]], Ratio] = field(default_factory=dict)
    """How fast they were, by what groups keep."""
    limit: float | None = None
    """Where the last proposal has ended, and the next begins."""

    @classmethod
    def shared(cls, task: PruningTask) -> WholeModels:
        """Return those of a task, with what others of the same model have timed."""
        request = task.request
        timed = "models", request.timed, request.timed_in, request.context, request.batch
        return cls(task, task.prepared.once(timed, dict))

    @cached_property
    def least(self) -> Kept:
        """The least widths."""
        return {**self.task.keep, **self.task.least}

    @cached_property
    def clock(self) -> Clock:
        """What times them."""
        return clock_of(self.task)

    @property
    def wanted(self) -> float:
        """The speed-up that is asked for."""
        assert self.task.request.speedup is not None
        return self.task.request.speedup

    def speedup(self, kept: Mapping[str, int]) -> float:
        """Return how many times as fast as the dense model it is.

        Each is timed once; again where that was for another speed-up, and is too rough for this.

        A `RequestError` says that the device is too noisy to tell.
        """
        key = frozenset(kept.items())
        found = self.ratios.get(key)
        if found is None or found.error > max(CLOSE, found.told(self.wanted)):
            found = self.ratios[key] = self.timed(kept)
        return found.speedup

    def timed(self, kept: Mapping[str, int]) -> Ratio:
        """Build a model, and time it."""
        smaller = _built(self.task.prepared, kept)
        return time_against(self.clock.dense, self.clock.timer(smaller), self.wanted)

    def check_reach(self) -> None:
        """Time the model of the least widths: a `RequestError` says that no model is so fast."""
        fastest = self.speedup(self.least)
        if fastest < self.wanted * (1 - CLOSE):
            raise RequestError(
                f"speedup {self.wanted:g} cannot be met: the smallest possible model is "
                f"{fastest:.2f} times as fast as the dense one; ask for less, or prune more kinds "
                "of units"
            )

    def fitted(
        self, within: Proposal, expected: Callable[[Kept], float], models: int
    ) -> Kept | None:
        """Return widths of a proposal that were timed to be as fast as wanted, but for `CLOSE`.

        They are faster if other limits of the request, or the widths that there are, allow nothing
        between; None where neither is found with so many models.  `expected` returns what share of
        the dense model's time widths take, by the table.
        """
        seconds, seen = 1 / self.wanted, set[frozenset[tuple[str, int]]]()
        fast: Point = (expected(self.least), 1 / self.speedup(self.least))
        slow, quick = _DENSE, None
        limit = max(fast[0], seconds) if self.limit is None else self.limit
        for _ in range(_PROPOSED):
            kept = within(limit)
            seen.add(frozenset(kept.items()))
            if len(seen) > models:
                return None
            found = 1 / self.speedup(kept)
            if abs(seconds / found - 1) <= CLOSE:
                self.limit = limit
                return kept
            if found < seconds:
                fast, quick = (limit, found), kept
            else:
                slow = limit, found
            if slow[0] - fast[0] <= _FINEST:
                break
            # Of the least widths most time is overhead: as long as nothing else was too fast, the
            # next limit lies on the line through the dense model.
            limit = _between(fast, slow, fast if quick or slow[1] >= 1 else _DENSE, seconds)
        if quick:
            self.limit = fast[0]
        return quick

    def refuse(self) -> None:
        """Raise a `RequestError` that says that none was found, and why."""
        ratios = self.ratios.values()
        near = min(ratios, key=lambda one: abs(one.speedup / self.wanted - 1)).speedup
        error = max((one.error for one in ratios if one.error > one.told(self.wanted)), default=0.0)
        why = f"no more are tried; ask for {near:.2f}, or give flops (`--flops`)"
        if error:
            why = (
                f"this device is too noisy to aim at a time, which is known to {error:.1%} only; "
                "end what else runs on it, or give flops (`--flops`)"
            )
        raise RequestError(
            f"speedup {self.wanted:g} cannot be met within {CLOSE:.0%}: of {len(ratios)} models "
            f"that were timed the closest is {near:.2f} times as fast as the dense one, and {why}"
        )


def _between(fast: Point, slow: Point, other: Point, seconds: float) -> float:
    """Return the limit at which so many seconds are expected, on the line through two points.

    It is not near the ends, as times are noisy: a bisection where these mislead.
    """
    slope = (slow[1] - other[1]) / (slow[0] - other[0])
    part = (slow[1] - seconds) / max(slope * (slow[0] - fast[0]), 1e-9)
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
            f"{found.error:.0%}; stop other work on it, or give flops (`--flops`) instead"
        )
    return found


def _built(prepared: Prepared, kept: Mapping[str, int]) -> nn.Module:
    """Return a copy of the dense model that keeps the first units of each group."""
    fewer = [(g, range(kept[g.name])) for g in prepared.groups if g.name in kept]
    plans = (GroupPlan.of(g, tuple(some)) for g, some in fewer if len(some) < g.units)
    smaller = copied(prepared.model)
    shrink(smaller, PruningPlan(tuple(plans)), [prepared.example])
    return smaller
