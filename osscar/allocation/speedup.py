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

Point = tuple[float, float]
"""A limit, and the seconds of the model that came of it, relative to the dense one."""


class Ratio(NamedTuple):
    """How many times as fast as the dense model one is, and the relative error of that."""

    speedup: float
    error: float

    def told(self, wanted: float) -> float:
        """Return the error up to which it is known whether this is what is wanted."""
        return max(CLOSE / 2, (abs(self.speedup / wanted - 1) - CLOSE) / _CLEARLY)


_DENSE: Point = (1.0, 1.0)


class Ends(NamedTuple):
    """Limits between which widths are looked for: the model of one is too fast, the other's slow.

    `quick` are the widths of the first, if the proposal came to them.
    """

    fast: Point
    slow: Point
    quick: Kept | None = None


@dataclass(eq=False)
class Proposal:
    """A way to come to widths."""

    within: Callable[[float], Kept]
    """Returns the best widths of which a share of the dense model's time is expected."""
    models: int
    """How many are built and timed at most."""
    ends: Ends | None = None
    """What is known of it."""


@dataclass(eq=False)
class WholeModels:
    """Models of the first units of each group, timed beside the dense one."""

    task: PruningTask
    ratios: dict[tuple[int, ...], Ratio] = field(default_factory=dict)
    """How fast they were, by their widths in the order of `names`."""

    @classmethod
    def shared(cls, task: PruningTask) -> WholeModels:
        """Return those of a task, with what others of the same model have timed."""
        request, found = task.request, cls(task)
        timed = request.timed, request.timed_in, request.context, request.batch
        found.ratios = task.prepared.timed.setdefault(("models", *timed, *found.names), {})
        return found

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The groups of which widths are told."""
        return *self.task.options, *self.task.keep

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
        """Return what stands for widths; 0 is for groups that keep all."""
        return tuple(kept.get(name, 0) for name in self.names)

    def speedup(self, kept: Mapping[str, int]) -> float:
        """Return how many times as fast as the dense model it is.

        Each is timed once; again where that was for another speed-up, and is too rough for this.

        A `RequestError` says that the device is too noisy to tell.
        """
        key = self.key(kept)
        found = self.ratios.get(key)
        if found is None or found.error > max(CLOSE, found.told(self.wanted)):
            smaller = _built(self.task.prepared, kept)
            found = time_against(self.clock.dense, self.clock.timer(smaller), self.wanted)
            self.ratios[key] = found
        return found.speedup

    def check_reach(self, wanted: float) -> None:
        """Time the model of the least widths: a `RequestError` says that no model is so fast."""
        fastest = self.speedup(self.least)
        if fastest < wanted * (1 - CLOSE):
            raise RequestError(
                f"speedup {wanted:g} cannot be met: the smallest possible model is "
                f"{fastest:.2f} times as fast as the dense one; ask for less, or prune more kinds "
                "of units"
            )


class Aim:
    """Finds widths whose model was timed to be as fast as wanted.

    Each proposal begins at the limit where the one before has ended.

    Parameters
    ----------
    expected
        Returns what share of the dense model's time widths take, by the table.
    """

    def __init__(
        self, models: WholeModels, wanted: float, expected: Callable[[Kept], float]
    ) -> None:
        self.models, self.wanted, self.expected = models, wanted, expected
        self._limit: float | None = None

    def fitted(self, proposal: Proposal) -> Kept | None:
        """Return widths that a proposal comes to within what is `CLOSE`.

        They are faster if other limits of the request, or the widths that there are, allow nothing
        between; None where neither is found with so many models: then the next call goes on.
        """
        timed = set[tuple[int, ...]]()
        limit, ends = self._begin(proposal)
        for _ in range(_PROPOSED):
            kept = proposal.within(limit)
            key = self.models.key(kept)
            if key not in timed and len(timed) == proposal.models:
                return None
            timed.add(key)
            speedup = self.models.speedup(kept)
            if abs(speedup / self.wanted - 1) <= CLOSE:
                self._limit = limit
                return kept
            at = limit, 1 / speedup
            fast = speedup > self.wanted
            ends = ends._replace(fast=at, quick=kept) if fast else ends._replace(slow=at)
            proposal.ends = ends
            if ends.slow[0] - ends.fast[0] <= _FINEST:
                break
            limit = _between(ends, 1 / self.wanted)
        self._limit = ends.fast[0] if ends.quick else self._limit
        return ends.quick

    def _begin(self, proposal: Proposal) -> tuple[float, Ends]:
        """Return the limit at which a proposal begins, or goes on, and what is known of it."""
        if proposal.ends is not None:
            return _between(proposal.ends, 1 / self.wanted), proposal.ends
        least = self.models.least
        fewest = self.expected(least)
        start = max(fewest, 1 / self.wanted) if self._limit is None else self._limit
        return start, Ends((fewest, 1 / self.models.speedup(least)), _DENSE)

    def refuse(self) -> None:
        """Raise a `RequestError` that says that none was found, and why."""
        told = sorted(self.models.speedups.values())
        near = min(told, key=lambda speedup: abs(speedup / self.wanted - 1))
        noise = (
            f"this device is too noisy to aim at a time, which is known to {self.models.error:.1%} "
            "only; end what else runs on it, or give flops (`--flops`)"
        )
        tries = f"no more are tried; ask for {near:.2f}, or give flops (`--flops`)"
        raise RequestError(
            f"speedup {self.wanted:g} cannot be met within {CLOSE:.0%}: of {len(told)} models that "
            f"were timed the closest is {near:.2f} times as fast as the dense one, and "
            f"{noise if self.models.error else tries}"
        )


def _between(ends: Ends, seconds: float) -> float:
    """Return the limit at which so many seconds are expected, between the ends.

    It lies on the line through both.  Of the least widths most time is overhead: as long as nothing
    else was too fast, it lies on the line through the dense model.  It is not near the ends, as
    times are noisy: a bisection where these mislead.
    """
    fast, slow, quick = ends
    if slow[0] <= fast[0]:
        return slow[0]
    other = fast if quick is not None or slow[1] >= 1 else _DENSE
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
