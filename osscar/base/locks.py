"""Locks: one process at a time in a place, and who it is."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from osscar.base.errors import BusyError, OutputError
from osscar.base.files import reason_of, remedy
from osscar.base.inputs import read_bytes

LOCK_FILE = ".osscar.lock"
"""In a directory in which one process at a time is at work."""


@contextmanager
def file_lock(place: Path, work: Path) -> Iterator[bool]:
    """Hold a lock file; the system releases it when the process ends, however.

    It says who holds it, for those who find it held.

    Parameters
    ----------
    place
        The file, which stays where it is.
    work
        What it guards.

    Yields
    ------
    bool
        Whether it is held: on a file system without locks, unguarded is better than not at all.

    Raises
    ------
    BusyError
        If another process holds it, by its number.
    OutputError
        If it cannot be written.
    """
    holder = _holder(place)  # now: some versions of filelock empty the file when they try it
    lock = filelock.FileLock(place, timeout=0)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock)
        except filelock.Timeout:
            raise BusyError(
                f"another process is at work in {work}{_holder(place) or holder}; wait for it, or "
                "give another --out"
            ) from None
        except (NotImplementedError, OSError) as error:
            if not _can_write(place):
                more = remedy(error) if isinstance(error, OSError) else ""
                raise OutputError(f"cannot write {place}: {reason_of(error)}{more}") from error
        if lock.is_locked:
            with suppress(OSError):  # who holds it is good to know, and no more
                place.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield lock.is_locked


def _holder(place: Path) -> str:
    """Return who wrote that it holds a lock, as part of a message; empty where nobody did."""
    with suppress(OSError, ValueError):
        found = re.fullmatch(r"(\d{1,10}) ([\w.-]{1,255})\n", read_bytes(place, 300).decode())
        return f" (process {found[1]} on {found[2]})" if found else ""
    return ""


def _can_write(place: Path) -> bool:
    try:
        with place.open("a"):
            return True
    except OSError:
        return False
