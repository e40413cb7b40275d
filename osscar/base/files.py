"""Files: written whole or not at all, locked by one process, recognized by what they hold."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from osscar.base.errors import BusyError, FileError, OutputError

LOCK_FILE = ".osscar.lock"
"""The file by which one process at a time locks a directory."""

PARTIAL = ".partial"
"""The end of the names of directories in which something is being written."""


def cache_directory() -> Path:
    """Give the place of what is kept between runs: ``$OSSCAR_CACHE``, else ``~/.cache/osscar``."""
    configured = os.environ.get("OSSCAR_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "osscar"


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """Give an empty directory of this process beside a path, which goes when the block ends."""
    remove_abandoned(target)
    place = target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir()
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove_abandoned(target: Path) -> bool:
    """Remove what killed processes left beside a path; return whether another process writes it."""
    written = False
    start, machine = f".{target.name}.", re.escape(socket.gethostname())
    for left in target.parent.glob(f"{glob.escape(start)}*{PARTIAL}"):
        found = re.fullmatch(rf"{machine}-(\d{{1,9}}){PARTIAL}", left.name.removeprefix(start))
        if found is not None and _is_running(int(found[1])):
            written = True
        elif found is not None:
            shutil.rmtree(left, ignore_errors=True)
    return written


def _is_running(process: int) -> bool:
    """Whether a process has this number."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # but perhaps of another user
    return True


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a place to write to, of the same name; once the block has ended, it becomes `path`.

    It is in a directory of its own (`temporary_sibling`), where others may be written that it
    names: all files take their places at the end, `path` last.  Where there are others, what was
    there goes first, since it would name those of another.  What is written is on the disk before
    it takes its place: what survives a loss of power is either whole or not there.  A pipe or a
    device is written to itself, since it cannot be replaced.  Where it cannot be written, an
    OutputError is raised, and what was there is left as it was.
    """
    target = resolved(path)
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        with temporary_sibling(target) as place:
            with system_errors():
                yield place / target.name
            written = sorted(place.iterdir(), key=lambda file: file.name == target.name)
            for file in written:
                fsync(file)
            if len(written) > 1:
                target.unlink(missing_ok=True)
            for file in written:
                file.replace(target.with_name(file.name))
        with suppress(OSError):  # it is there, whatever a loss of power may undo
            fsync(target.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {path}: {reason_of(error)}; make room there, or write elsewhere"
    )


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return a path to be written without links in it (OutputError if it cannot be a path)."""
    name = os.fspath(path)
    try:
        return Path(name).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"cannot write {name[:300]!r}: {reason_of(error)}") from error


def file_target(path: str | os.PathLike[str]) -> Path:
    """Return a path as `resolved` does if a file may go there (OutputError), before any work."""
    target = resolved(path)
    if os.path.isdir(target) or not os.path.isdir(target.parent):
        raise OutputError(f"cannot write {target}: give a file in a directory that exists")
    return target


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, which appears whole or not at all (OutputError)."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write JSON; the file appears whole or not at all (OutputError; ValueError if not finite)."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def make_directory(path: Path) -> None:
    """Make a directory where there is none, and those above it (OutputError)."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk (OSError)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    finally:
        os.close(descriptor)


_UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
"""What file systems answer that cannot do a thing, as some networks do of directories and locks."""


def reason_of(error: BaseException) -> str:
    """Return what the system says of an error, without number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise as an OSError also what a library raises otherwise, with the number in its text."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"\b(?:os error|Errno) (\d+)\b", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


# ---- locks -------------------------------------------------------------------------------


@contextmanager
def file_lock(place: Path, work: Path) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however.

    Those who find it held raise a BusyError; it stays where it is when it is released.  `work` is
    what it guards.  On a file system without locks, unguarded is better than not at all.
    """
    import filelock  # here, since help needs none, and it takes 40 ms to load

    with ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(place, timeout=0))
        except filelock.Timeout:
            raise BusyError(
                f"another process is at work in {work}; wait for it, or give another "
                "directory (`--out`)"
            ) from None
        except NotImplementedError:
            pass
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise _unwritable(place, error) from error
        yield


# ---- digests -----------------------------------------------------------------------------


def digest(data: bytes | str) -> str:
    """Return the SHA-256 of some bytes, or of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def short_hash(data: bytes | str) -> int:
    """Return the first 64 bits of that digest as a number."""
    return int(digest(data)[:16], 16)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece (FileError if it cannot be read)."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(path, f"cannot be read: {reason_of(error)}") from error
