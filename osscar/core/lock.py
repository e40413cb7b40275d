"""A directory in which one process at a time is at work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from osscar.core.errors import StudyError

LOCK_FILE = ".osscar.core.lock"


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; the system releases it when the process ends, however.

    Raises
    ------
    StudyError
        If another process holds it, or the directory cannot be written.
    """
    path = directory / LOCK_FILE
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            _take(file.fileno())
        except (BlockingIOError, PermissionError) as error:
            raise StudyError(
                f"another process is at work in {directory}; wait for it, or give another --out"
            ) from error
        except OSError:
            # This file system knows no locks: better an unguarded study than none.
            pass
        yield


def _take(descriptor: int) -> None:
    """Lock an open file for this process alone, or fail at once."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
