"""The directories that runs are at work in: marked, locked, and put in order after a kill.

A run writes into a directory of its own beside the target, which bears a mark and holds a lock.
So a later run can tell what a killed one has left behind from what a live one is writing, and from
what is none of ours.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from osscar.base.errors import BusyError, FileError, OutputError
from osscar.base.files import PARTIAL, fsync, reason_of, write_json
from osscar.base.json_files import STRICT, read_json
from osscar.base.locks import LOCK_FILE, file_lock
from osscar.base.signals import uninterrupted

_MARK_FILE = "run.json"

_MAKING_SECONDS = 60.0
"""A directory of a run without a mark is not in the making any more after so long."""


# ---- places ---------------------------------------------------------------------------------


def prefix(path: Path) -> str:
    """Return how the names of all directories begin in which runs write what goes to a path."""
    return f".{path.name}.osscar-"


def entries(path: Path) -> list[Path]:
    """Return what is in a directory, but for what runs are at work on."""
    return [entry for entry in path.iterdir() if not entry.name.startswith(prefix(path))]


def cannot_move(path: Path) -> bool:
    """Whether a directory cannot be renamed, so that what is in it has to change."""
    try:
        return path.is_dir() and (_is_mounted(path) or not os.access(path.parent, os.W_OK))
    except OSError:  # such as a name that is too long, which is said when it is written
        return False


def _is_mounted(path: Path) -> bool:
    """Whether something is mounted there, also from the same file system."""
    if path.is_mount():
        return True
    with suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        escaped = str(path).replace("\\", "\\134").replace(" ", "\\040")
        return any(line.split()[4] == escaped for line in lines)
    return False


# ---- runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    """Says that a directory is a run's, which run's, and what for."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.run/1"]
    target: str
    pid: int
    host: str
    started_ns: int


@dataclass(frozen=True)
class Run:
    """What a run is at work on.

    Parameters
    ----------
    target
        Where the checkpoint goes.
    work
        The run's own directory, beside the target or in it.
    """

    target: Path
    work: Path

    @property
    def new(self) -> Path:
        """What is being written, and after an exchange what was replaced."""
        return self.work / "new"

    @property
    def old(self) -> Path:
        """What is being replaced, where the two cannot be exchanged in one step."""
        return self.work / "old"

    @property
    def going(self) -> Path:
        """What has been written and goes into a target that stays, from when it is empty."""
        return self.work / "going"

    def mark(self) -> _Mark | None:
        """Return the mark; None if there is none of ours."""
        try:
            mark = read_json(self.work / _MARK_FILE, _Mark)
        except FileError:
            return None
        return mark if mark.target == self.target.name else None

    def swap(self) -> None:
        """Put what was written in its place; at every moment either that or the old is whole.

        What is new is on the disk before it takes the place of what is old.
        """
        for written in (*self.new.rglob("*"), self.new):
            fsync(written)
        self._swap()
        with suppress(OSError):  # it is done, whatever a loss of power may undo
            fsync(self.target.parent)

    def _swap(self) -> None:
        if self.work.parent == self.target:
            self._fill()
        elif not self.target.exists() or not any(self.target.iterdir()):
            if sys.platform == "win32" and self.target.exists():
                self.target.rmdir()
            self.new.rename(self.target)  # fails where another run has filled it meanwhile
        elif not _exchanged(self.new, self.target):
            self.target.rename(self.old)
            try:
                self.new.rename(self.target)
            except OSError:
                self.old.rename(self.target)
                raise

    def _fill(self) -> None:
        self.old.mkdir()
        for entry in entries(self.target):
            entry.rename(self.old / entry.name)
        self.new.rename(self.going)
        self.finish()

    def finish(self) -> None:
        """Finish what a killed run was swapping, or undo it where nothing new was in place yet."""
        if self.work.parent == self.target:
            source = self.going if self.going.is_dir() else self.old
            for entry in source.iterdir() if source.is_dir() else ():
                entry.rename(self.target / entry.name)
        elif self.old.is_dir() and not self.target.exists():
            # What is new had been read back and compared before the swap.
            (self.new if self.new.is_dir() else self.old).rename(self.target)


@contextmanager
def run_for(path: Path, place: Path) -> Iterator[Run]:
    """Make the directory of a run, and remove it in the end."""
    run = Run(path, Path(tempfile.mkdtemp(prefix=_maker(path), dir=place)))
    try:
        with file_lock(run.work / LOCK_FILE, path):
            try:
                now, host = time.time_ns(), socket.gethostname()
                mark = _Mark("osscar.run/1", path.name, os.getpid(), host, now)
                write_json(run.work / _MARK_FILE, dataclasses.asdict(mark))
                run.new.mkdir()
                yield run
            finally:
                with uninterrupted():
                    _remove(run)
    finally:
        if run.mark() is None:  # where a file that is locked cannot be removed, it can be now
            shutil.rmtree(run.work, ignore_errors=True)


def _remove(run: Run) -> None:
    """Remove the directory of a run whose target is settled; the mark goes last."""
    try:
        run.finish()
    except OSError as error:
        raise OutputError(
            f"{run.target} could not be put in order: {reason_of(error)}; what belongs there lies "
            f"in {run.work}"
        ) from error
    for part in (run.new, run.old, run.going, run.work):
        shutil.rmtree(part, ignore_errors=True)


def _others(path: Path) -> Iterator[Run]:
    """Yield what looks like the directories of runs for this target."""
    for place in dict.fromkeys((path.parent, path)):
        if place.is_dir():
            for work in sorted(place.glob(f"{_globbed(prefix(path))}*")):
                yield Run(path, work)


def _globbed(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def recover(path: Path) -> None:
    """Finish or remove what killed runs have left; what is not marked is left alone."""
    for run in _others(path):
        mark = run.mark()
        if mark is None:
            _remove_unmarked(run.work)
            continue
        with suppress(OutputError), file_lock(run.work / LOCK_FILE, path) as held, uninterrupted():
            if held or not _may_live(mark):
                _remove(run)


def _host() -> str:
    """Return 8 hexadecimal digits that tell this host from others."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _maker(path: Path) -> str:
    """Return how the name of this process's directory begins, which tells of whom it is."""
    return f"{prefix(path)}{_host()}-{os.getpid()}-"


def _maker_is_gone(work: Path) -> bool:
    """Whether the name is that of a process of this host that has ended."""
    found = re.search(r"\.osscar-([0-9a-f]{8})-(\d+)-\w+$", work.name)
    return found is not None and found[1] == _host() and not _is_alive(int(found[2]))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _remove_unmarked(work: Path) -> None:
    """Remove what a run was killed in before it had written anything.

    A run takes the lock before it writes its mark: where the lock is free, the run is gone.
    """
    with suppress(OSError, OutputError):
        idle = time.time() - work.stat().st_mtime > _MAKING_SECONDS or _maker_is_gone(work)
        names = {entry.name for entry in work.iterdir()}
        partial = {n for n in names if n.startswith(f".{_MARK_FILE}.") and n.endswith(PARTIAL)}
        if names - partial - {LOCK_FILE} or not (idle or LOCK_FILE in names):
            return
        with file_lock(work / LOCK_FILE, work) as held:
            if held or idle:
                for name in (*partial, LOCK_FILE):
                    (work / name).unlink(missing_ok=True)
                work.rmdir()


def _may_live(mark: _Mark) -> bool:
    """Whether a run may go on, as far as can be told without a lock."""
    here = mark.host == socket.gethostname()
    return not here or (mark.pid != os.getpid() and _is_alive(mark.pid))


def refuse_earlier(own: Run) -> None:
    """Give way to another live run that writes to the same place and began before this one."""
    mine = own.mark()
    for run in _others(own.target):
        mark = run.mark()
        if run.work == own.work or mark is None or mine is None:
            continue
        if (mark.started_ns, run.work.name) < (mine.started_ns, own.work.name):
            raise BusyError(
                f"process {mark.pid} on {mark.host} is writing {own.target}; wait for it, give "
                f"another directory, or delete {run.work} if that process is gone"
            )


# ---- one step ----------------------------------------------------------------------------

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False  # the kernel or the file system does not know how
    raise OSError(number, os.strerror(number), str(other))


def _renameat2() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
