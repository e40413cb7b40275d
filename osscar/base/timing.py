"""Seconds: of the stages of a run as it goes on, and of functions that are compared.

Other work slows a machine down for seconds at a time.  Functions that are compared are therefore
interleaved: each repetition times all of them, in an order that is reversed each time.
"""

from __future__ import annotations

import enum
import sys
import time
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from osscar.base.process import memory_kept
from osscar.base.progress import progress_bar


def clock() -> float:
    """Return seconds from some beginning, once a card has done what it was given to do."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def busy_clock() -> float:
    """Return seconds as `clock` does; of one thread on a processor those in which it was busy."""
    torch = sys.modules.get("torch")
    if torch is None or torch.cuda.is_initialized() or torch.get_num_threads() > 1:
        return clock()
    return time.thread_time()


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
"""The name of the seconds that no stage counts."""


@dataclass(eq=False)
class Profile:
    """Seconds by stage; those of a stage within another count for the inner one alone."""

    seconds: dict[Stage, float] = field(default_factory=dict)
    _running: list[Stage] = field(default_factory=list, repr=False)
    _since: float = 0.0

    def of(self, seconds: float) -> dict[str, float]:
        """Return the stages of so many seconds by name, with what none counts as the last."""
        told = {str(one): self.seconds[one] for one in Stage if one in self.seconds}
        return {**told, OTHER: max(0.0, seconds - sum(told.values()))}

    def _charge(self) -> None:
        now = clock()
        if self._running:
            running = self._running[-1]
            self.seconds[running] = self.seconds.get(running, 0.0) + now - self._since
        self._since = now


_profiles: list[Profile] = []
"""Those that are being made."""


@contextmanager
def profiled() -> Iterator[Profile]:
    """Yield the profile of the block, stage by stage, as it goes on."""
    profile = Profile()
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
        profile._charge()
        profile._running.append(running)
    try:
        yield
    finally:
        for profile in profiles:
            profile._charge()
            profile._running.pop()


# ---- what is compared --------------------------------------------------------------------

WORTHWHILE_SECONDS = 0.25
"""Fast functions are timed more often than asked, for so long."""


def interleaved(
    timers: Sequence[timeit.Timer],
    repetitions: int,
    description: str,
) -> list[list[float]]:
    """Return the seconds of each timer in each turn, of so many turns or `WORTHWHILE_SECONDS`."""
    turns: list[list[float]] = []
    with memory_kept(), progress_bar(description) as bar:
        for timer in timers:
            timer.timeit(1)  # warm-up: allocations, thread pools, kernels chosen at first use
        began = time.perf_counter()
        while len(turns) < repetitions or time.perf_counter() - began < WORTHWHILE_SECONDS:
            order = -1 if len(turns) % 2 else 1
            turns.append([timer.timeit(1) for timer in timers[::order]][::order])
            bar.advance()
    return [list(seconds) for seconds in zip(*turns, strict=True)]
