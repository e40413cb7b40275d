"""Seconds of stages and of functions that are compared, and progress on standard error.

Other work slows a machine down for seconds at a time.  Functions that are compared are therefore
interleaved: each repetition times all of them, in an order that is reversed each time.
"""

from __future__ import annotations

import enum
import sys
import time
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from osscar.base.printable import printable
from osscar.base.process import launched, memory_kept


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


# ---- progress ----------------------------------------------------------------------------


SECONDS_A_LINE = 30.0
"""Of work between two lines where no bar is drawn: logs stay short, and tell that it goes on."""

_display: _Display | None = None
"""The live display that open bars share; None while none is open."""

_untold = 0.0
"""Seconds that bars have been open since the last line, also of displays that have closed."""


class _Display(Progress):
    """Bars at a terminal; elsewhere a line for so many seconds, when a bar would have moved."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        first = launched()[0] == 0  # one rank shows for all
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal and first),
            get_time=lambda: time.monotonic(),
        )
        self._writes_lines = first and not console.is_terminal
        self._since = self.get_time()

    def tell(self) -> None:
        """Write where the open bars stand, if nothing was written for long enough."""
        global _untold
        now = self.get_time()
        _untold += now - self._since
        self._since = now
        if self._writes_lines and self.tasks and _untold >= SECONDS_A_LINE:
            _untold = 0.0
            line = "; ".join(map(_in_words, self.tasks))
            self.console.print(f"progress: {line}", markup=False, highlight=False, soft_wrap=True)


def _in_words(task: Task) -> str:
    """Say where a bar stands, and since when it is open."""
    elapsed = timedelta(seconds=round(task.elapsed or 0.0))
    steps = "" if task.total is None else f"{task.completed:g} of {task.total:g}, "
    return f"{task.description} ({steps}{elapsed})"


@dataclass(frozen=True)
class _Bar:
    """A running bar, handed out by :func:`progress_bar`."""

    _progress: _Display
    _task: TaskID

    def advance(self, steps: float = 1) -> None:
        """Move the bar on by this many steps."""
        self._progress.advance(self._task, steps)
        self._progress.tell()

    def describe(self, description: str) -> None:
        """Replace the text in front of the bar."""
        self._progress.update(self._task, description=printable(description))


@contextmanager
def progress_bar(description: str, total: float | None = None) -> Iterator[_Bar]:
    """Show a bar while the block runs, below those around it; it pulses without a total.

    Rich allows one live display at a time, so nested bars share a single one: the first to open
    starts it, the last to close stops it and leaves nothing behind on the screen.
    """
    global _display
    is_first = _display is None
    display = _display = _display or _Display()
    try:
        with display if is_first else nullcontext():
            task = display.add_task(printable(description), total=total)
            try:
                yield _Bar(display, task)
            finally:
                display.remove_task(task)
    finally:
        if is_first:
            display.tell()
            _display = None
