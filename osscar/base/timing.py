"""Seconds: of the stages of a run as it goes on, and of functions that are compared.

Other work on a machine slows it down for seconds at a time.  What is to be compared is therefore
interleaved: each repetition times all of it, in an order that is reversed from one to the next, and
medians are taken.  A ratio of two medians then says more about what is timed than about the moment.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from osscar.base.progress import stage

Clock = Callable[[], float]
"""Returns seconds from some beginning."""

# ---- the stages of a run -----------------------------------------------------------------


class Stage(enum.StrEnum):
    """A part of a run, in the order in which it comes; the value is its name for people."""

    START = "start"
    LOAD = "load"
    OPEN = "open and trace"
    TRIAL = "trial shrink"
    DENSE = "dense passes"
    MEASURED = "loss curves"
    ALLOCATION = "allocation"
    WALK = "calibration passes"
    GRAM = "Gram matrices"
    DAMPING = "choosing damping"
    SOLVER = "solver and refit"
    PROOF = "shrink and prove"
    PRUNED = "pruned passes"
    TEACHER = "recovery: dense passes"
    TRAINING = "recovery: training"
    HELD_OUT = "recovery: held-out samples"
    SOLVES = "solving problems"
    FORWARD = "timing"
    SCORE = "scoring"
    REPORT = "report"
    SAVE = "save"


OTHER = "other"
"""What is told as the name of the seconds that no stage counts."""


@dataclass(eq=False)
class Profile:
    """Seconds by stage; those of a stage within another count for the inner one alone."""

    clock: Clock = time.perf_counter
    seconds: dict[Stage, float] = field(default_factory=dict)
    _running: list[Stage] = field(default_factory=list, repr=False)
    _since: float = 0.0

    def of(self, seconds: float) -> dict[str, float]:
        """Return the stages of so many seconds by name, with what none counts as the last."""
        told = {str(one): self.seconds[one] for one in Stage if one in self.seconds}
        return {**told, OTHER: max(0.0, seconds - sum(told.values()))}

    def _charge(self) -> None:
        now = self.clock()
        if self._running:
            running = self._running[-1]
            self.seconds[running] = self.seconds.get(running, 0.0) + now - self._since
        self._since = now

    def _begin(self, running: Stage) -> None:
        self._charge()
        self._running.append(running)

    def _end(self) -> None:
        self._charge()
        self._running.pop()


_profiles: list[Profile] = []
"""Those that are being made."""


@contextmanager
def profiled(clock: Clock = time.perf_counter) -> Iterator[Profile]:
    """Yield the profile of the block, stage by stage, as it goes on."""
    profile = Profile(clock)
    _profiles.append(profile)
    try:
        yield profile
    finally:
        _profiles.remove(profile)


@contextmanager
def timed(running: Stage) -> Iterator[None]:
    """Count the block as one stage, in every profile that is being made."""
    profiles = tuple(_profiles)
    for profile in profiles:
        profile._begin(running)
    try:
        yield
    finally:
        for profile in profiles:
            profile._end()


# ---- what is compared --------------------------------------------------------------------

WORTHWHILE_SECONDS = 2.0
"""Fast functions are timed more often than asked, for so long."""


def seconds_of(function: Callable[[], object], clock: Clock) -> Callable[[], list[float]]:
    """Return what calls a function once, and returns the seconds that it took."""

    def timing() -> list[float]:
        began = clock()
        function()
        return [clock() - began]

    return timing


def interleaved(
    timings: Sequence[Callable[[], list[float]]],
    repetitions: int,
    description: str,
    *,
    worthwhile: float | None = None,
) -> list[list[float]]:
    """Collect the seconds that each timing reports, over as many repetitions as are worth it.

    A timing does once what is timed, and returns the seconds of the steps that it took. They are
    repeated so often at the least, and for so many seconds (`WORTHWHILE_SECONDS` by default) at the
    least. The description is what a progress bar says.
    """
    seconds: list[list[float]] = [[] for _ in timings]
    for timing in timings:
        timing()  # warm-up: allocations, thread pools, kernels chosen at first use
    least = WORTHWHILE_SECONDS if worthwhile is None else worthwhile
    order = list(range(len(timings)))
    began, done = time.perf_counter(), 0
    with stage(description) as bar:
        while done < repetitions or time.perf_counter() - began < least:
            for index in order:
                seconds[index] += timings[index]()
            order.reverse()
            done += 1
            bar.advance()
    return seconds
