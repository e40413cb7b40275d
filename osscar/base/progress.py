"""Progress on standard error: bars for people at a terminal, and now and then a line elsewhere.

Rich allows one live display at a time, so nested bars share a single one: the first to open
starts it, the last to close stops it and leaves nothing behind on the screen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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
from osscar.base.process import launched

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
    """Show a bar while the block runs, below those around it; it pulses without a total."""
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
