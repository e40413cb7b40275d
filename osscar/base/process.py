"""How a process was launched, its signals, and the memory that it frees; nothing loads torch."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any, NoReturn

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and launchers like it, say to each process."""


def launched() -> tuple[int, int]:
    """Return which rank this process was launched as, and how many there are: (0, 1) if none."""
    if any(name not in os.environ for name in _LAUNCHED):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def neighbours() -> int:
    """Return how many processes of this launch share this machine, this one among them."""
    size = launched()[1]
    return 1 if size == 1 else min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), size)


ENDING = (signal.SIGINT, signal.SIGTERM)

_RETRY_SECONDS = 0.02


def ends_at_once(number: int, _: FrameType | None) -> NoReturn:
    """Say so in one line and end the process, which has begun nothing that is to be undone."""
    os.write(2, b"interrupted: nothing was begun\n")
    os._exit(128 + number)


def unwinds(number: int, frame: FrameType | None) -> None:
    """Raise a KeyboardInterrupt of the signal's number once no import or C library loses it."""
    stack = [one for one, _ in traceback.walk_stack(frame)]
    if stack[0].f_code.co_filename.startswith("<frozen importlib") or any(
        isinstance(one.f_locals.get("self"), ExtensionFileLoader) for one in stack
    ):
        signal.signal(signal.SIGALRM, lambda _, frame: unwinds(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        return
    raise KeyboardInterrupt(number)


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
def handling(
    handler: signal.Handlers | Callable[[int, FrameType | None], Any] | int | None,
    numbers: tuple[signal.Signals, ...] = ENDING,
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


# ---- memory that is freed: what the allocator of glibc does with it, and no other ------------


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""What `mallopt` calls how much free memory is kept, from which size on a block is taken from the
system by itself, and how many such blocks there may be."""

_TRIM_USUALLY, _MMAP_USUALLY = 64 << 20, 1 << 16

_large = 32 << 20
"""Blocks from this size on are taken from the system by themselves.

Once `mallopt` was called, glibc no longer raises this, and the free memory that is kept, with the
blocks that are freed.  Both are then what it would have raised them to at most, so that a process
in which something was timed is no slower than one of long standing.
"""


@cache
def _glibc() -> tuple[ctypes.CDLL, ...]:
    """Return the library of C where it is glibc, else nothing."""
    try:
        found = ctypes.CDLL("libc.so.6")
    except OSError:
        return ()
    return (found,) if hasattr(found, "malloc_trim") and hasattr(found, "mallopt") else ()


def give_back() -> None:
    """Give memory that was freed back to the system."""
    for libc in _glibc():
        libc.malloc_trim(0)


def give_back_at_once() -> None:
    """Have tensors of 1 MB or more go back to the system whenever they are freed, from now on."""
    global _large
    _large = 1 << 20
    for libc in _glibc():
        libc.mallopt(_MMAP_THRESHOLD, _large)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep all memory that is freed, as allocators for servers do, while something is timed.

    Else the system maps the memory of large tensors anew, and fills it with zeros, in one pass and
    not in the next: the same convolution then takes 3 or 10 ms.
    """
    for libc in _glibc():
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for libc in _glibc():
            libc.mallopt(_MMAP_MAX, _MMAP_USUALLY)
            libc.mallopt(_TRIM_THRESHOLD, _TRIM_USUALLY)
            libc.mallopt(_MMAP_THRESHOLD, _large)
        give_back()
