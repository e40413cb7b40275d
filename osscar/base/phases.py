"""What a run spends its time on: named parts of it, timed wherever somebody wants to know."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Phase(enum.StrEnum):
    """A part of a pruning run, in the order in which it comes; the value is its name for people."""

    START = "start"
    LOAD = "load"
    OPEN = "open and trace"
    TRIAL = "trial"
    DENSE = "dense passes"
    CURVATURE = "curvature"
    CURVES = "curves"
    ALLOCATION = "allocation"
    WALK = "walk"
    GRAM = "Gram matrices"
    DAMPING = "damping"
    SOLVER = "solver and refit"
    PROOF = "shrink and prove"
    PRUNED = "pruned passes"
    REPORT = "report"
    SAVE = "save"


Clock = Callable[[], float]
"""Returns seconds from some beginning."""


@dataclass(eq=False)
class Spent:
    """Seconds by phase; those of a phase within another count for the inner one alone.

    Parameters
    ----------
    clock
        What time is.
    """

    clock: Clock = time.perf_counter
    seconds: dict[Phase, float] = field(default_factory=dict)
    _running: list[Phase] = field(default_factory=list, repr=False)
    _since: float = 0.0

    def _charge(self) -> None:
        now = self.clock()
        if self._running:
            phase = self._running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def _begin(self, phase: Phase) -> None:
        self._charge()
        self._running.append(phase)

    def _end(self) -> None:
        self._charge()
        self._running.pop()


_listening: list[Spent] = []
"""Those who want to know now."""


@contextmanager
def spending(clock: Clock = time.perf_counter) -> Iterator[Spent]:
    """Yield what the block spends, phase by phase, as it goes on."""
    spent = Spent(clock)
    _listening.append(spent)
    try:
        yield spent
    finally:
        _listening.remove(spent)


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Count the block as one phase."""
    told = tuple(_listening)
    for spent in told:
        spent._begin(name)
    try:
        yield
    finally:
        for spent in told:
            spent._end()
