"""Signals: interrupts that wait, and requests to end that unwind what is being done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let interrupts and requests to end wait until the block is done; keep it short."""
    waiting: list[int] = []
    try:
        with handling(lambda number, _: waiting.append(number)):
            yield
    finally:
        for number in dict.fromkeys(waiting):
            signal.raise_signal(number)


@contextmanager
def ends_tidily() -> Iterator[None]:
    """Let a request to end unwind the block, where it would end the process on the spot.

    The process ends by that signal all the same, once everything in the block is cleaned up.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # someone else, such as the command line, knows what to do
        return
    ended = False

    def unwind(number: int, _: FrameType | None) -> None:
        nonlocal ended
        ended = True
        raise SystemExit(128 + number)

    try:
        with handling(unwind, (signal.SIGTERM,)):
            yield
    finally:
        if ended:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def handling(
    handler: signal.Handlers | Callable[[int, FrameType | None], Any] | int | None,
    numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
) -> Iterator[None]:
    """Handle signals in this way, which only the main thread can say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
