"""Progress bars on standard error: on for people at a terminal, silent everywhere else.

Rich allows one live display at a time, so nested stages share a single one: the first stage to
open starts it, the last to close stops it and leaves nothing behind on the screen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from osscar.base.launch import launched
from osscar.base.printable import printable

T = TypeVar("T")

_display: Progress | None = None
"""The live display that open stages share; None while no stage is open."""


@dataclass(frozen=True)
class _Bar:
    """A running bar, handed out by :func:`stage`."""

    _progress: Progress
    _task: TaskID

    def advance(self, steps: float = 1) -> None:
        """Move the bar on by this many steps."""
        self._progress.advance(self._task, steps)

    def describe(self, description: str) -> None:
        """Replace the text in front of the bar."""
        self._progress.update(self._task, description=printable(description))


@contextmanager
def stage(description: str, total: float | None = None) -> Iterator[_Bar]:
    """Show a bar while the block runs; stages opened inside it appear below.

    The total is the number of steps, or None when unknown (the bar then pulses).
    """
    with _shared_display() as display:
        task = display.add_task(printable(description), total=total)
        try:
            yield _Bar(display, task)
        finally:
            display.remove_task(task)


def track(iterable: Iterable[T], description: str) -> Iterator[T]:
    """Iterate with a bar, of as many steps as there are items, where that is known."""
    total = len(iterable) if isinstance(iterable, Sized) else None
    with stage(description, total) as bar:
        for item in iterable:
            yield item
            bar.advance()


@contextmanager
def _shared_display() -> Iterator[Progress]:
    global _display
    if _display is not None:
        yield _display
        return
    display = _new_display()
    _display = display
    try:
        with display:
            yield display
    finally:
        _display = None


def _new_display() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or launched()[0] > 0,  # one rank shows for all
    )
