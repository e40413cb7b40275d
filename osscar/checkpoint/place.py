"""Where a checkpoint goes: what may be replaced there, and how a whole directory takes its place.

A run writes into a directory of its own beside the target, which bears a mark and holds a lock.
So a later run can tell what a killed one has left behind from what a live one is writing, and from
what is none of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from osscar.checkpoint.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    OLD_PLAN_FILE,
    REPORT_FILE,
    read_manifest,
)
from osscar.core.errors import BusyError, CheckpointError, FileError, OutputError
from osscar.core.files import (
    LOCK_FILE,
    STRICT,
    ends_tidily,
    hold,
    read_json,
    reason_of,
    resolved,
    uninterrupted,
    write_json,
)

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_CHECKPOINT_FILES = (
    *_WEIGHTS,
    *("*.safetensors.index.json", "pytorch_model.bin.index.json"),
    *(CONFIG_FILE, "generation_config.json", MANIFEST_FILE, OLD_PLAN_FILE, REPORT_FILE),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
"""All that a directory may hold in order to be replaced, beside what its own manifest lists."""

_NAMED = 5
"""Foreign files that a message names."""


# ---- what may be written -----------------------------------------------------------------


def check_output(
    directory: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
    needed_bytes: int = 0,
) -> Path:
    """Return the output directory as a path, if it may and can be written.

    What killed runs have left beside it is put in order first.

    Parameters
    ----------
    directory
        Where a checkpoint is to go.
    overwrite
        Whether a checkpoint that is there may be replaced.
    inputs
        Files and directories that the run needs; names that are no paths do no harm.
    needed_bytes
        How much is going to be written, at most.

    Raises
    ------
    OutputError
        If it is a file or cannot be written; if it is not empty and `overwrite` is not set, or
        holds something other than a checkpoint; if it is or contains the current directory or one
        of the inputs; if the disk has less room.
    """
    path = resolved(directory)
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; give a directory")
        for need in _existing((os.curdir, *inputs)):
            if path == need or path in need.parents:
                raise OutputError(f"{path} would replace {need}, which is in use; give another")
        _recover(path)
        _check_replaceable(path, overwrite)
        _check_writable(path, needed_bytes)
    except OSError as error:
        raise OutputError(f"cannot write to {str(directory)!r}: {reason_of(error)}") from error
    return path


def _existing(inputs: Sequence[str | os.PathLike[str] | None]) -> Iterator[Path]:
    """Yield those names that can be paths; whoever reads the others will say what is wrong."""
    for name in inputs:
        with suppress(OutputError):
            if name is not None:
                yield resolved(name)


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse a directory that holds anything, or anything that must not go.

    Raises
    ------
    OutputError
        Naming what is foreign.
    """
    there = _entries(path) if path.is_dir() else []
    if not there:
        return
    if not overwrite:
        raise OutputError(f"{path} is not empty; give another directory, or --overwrite")
    known = _known_names(path)
    foreign = sorted(entry.name for entry in there if not _is_known(entry, known))
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise OutputError(
            f"{path} holds something other than a checkpoint, which would be lost: "
            f"{', '.join(foreign[:_NAMED])}{more}; give another directory, or move that away"
        )
    ours = any((path / name).is_file() for name in (MANIFEST_FILE, OLD_PLAN_FILE))
    weights = any(fnmatchcase(entry.name, kind) for entry in there for kind in _WEIGHTS)
    if not ours and not (weights and (path / CONFIG_FILE).is_file()):
        raise OutputError(f"{path} holds something other than a checkpoint; give another directory")


def _entries(path: Path) -> list[Path]:
    """Return what is in a directory, but for what runs are at work on."""
    return [entry for entry in path.iterdir() if not entry.name.startswith(_prefix(path))]


def _known_names(path: Path) -> frozenset[str]:
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return frozenset()
    return frozenset(() if manifest is None else manifest.files)


def _is_known(entry: Path, known: frozenset[str]) -> bool:
    if entry.is_dir():  # tokenizers write no other
        return entry.name in known and entry.name == "additional_chat_templates"
    return entry.name in known or any(fnmatchcase(entry.name, kind) for kind in _CHECKPOINT_FILES)


def _check_writable(path: Path, needed_bytes: int) -> None:
    """Make a directory where the run will make its own, and compare room with need."""
    place = path if _stays(path) else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"cannot write {path}: {place} is a file; give another directory")
    try:
        with uninterrupted():
            os.rmdir(tempfile.mkdtemp(prefix=_prefix(path), dir=place))
    except OSError as error:
        raise OutputError(f"cannot write to {place}: {reason_of(error)}") from error
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise OutputError(
            f"cannot write {path}: it may take {needed_bytes / 1e6:,.0f} MB, and {place} has "
            f"{free / 1e6:,.0f} MB left; make room, or give another directory"
        )


def _stays(path: Path) -> bool:
    """Whether a directory cannot be renamed, so that what is in it has to change."""
    return path.is_dir() and (_is_mounted(path) or not os.access(path.parent, os.W_OK))


def _is_mounted(path: Path) -> bool:
    """Whether something is mounted there, also from the same file system."""
    if path.is_mount():
        return True
    with suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        escaped = str(path).replace("\\", "\\134").replace(" ", "\\040")
        return any(line.split()[4] == escaped for line in lines)
    return False


# ---- writing -----------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty directory, which takes the place of `path` once the block has succeeded.

    What was at `path` stays whole until then; if the block fails, nothing is left behind.

    Raises
    ------
    OutputError
        If another run is writing to `path` or has done so meanwhile, or the disk refuses.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ends_tidily())
            place = path if _stays(path) else path.parent
            place.mkdir(parents=True, exist_ok=True)
            with uninterrupted():
                run = stack.enter_context(_run(path, place))
            _recover(path)
            _refuse_earlier(run)
            yield run.new
            _check_replaceable(path, overwrite)
            with uninterrupted():
                run.swap()
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {reason_of(error)}; it was left as it was"
            ) from error


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
class _Run:
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
        """Put what was written in its place; at every moment either that or the old is whole."""
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
        for entry in _entries(self.target):
            entry.rename(self.old / entry.name)
        self.new.rename(self.going)
        self.settle()

    def settle(self) -> None:
        """Finish what a killed run was swapping, or undo it where nothing new was in place yet."""
        if self.work.parent == self.target:
            source = self.going if self.going.is_dir() else self.old
            for entry in source.iterdir() if source.is_dir() else ():
                entry.rename(self.target / entry.name)
        elif self.old.is_dir() and not self.target.exists():
            # What is new had been read back and compared before the swap.
            (self.new if self.new.is_dir() else self.old).rename(self.target)


_MARK_FILE = "run.json"

_MAKING_SECONDS = 60.0
"""A directory of a run without a mark is not in the making any more after so long."""


def _prefix(path: Path) -> str:
    return f".{path.name}.osscar-"


@contextmanager
def _run(path: Path, place: Path) -> Iterator[_Run]:
    """Make the directory of a run, and remove it in the end."""
    run = _Run(path, Path(tempfile.mkdtemp(prefix=_prefix(path), dir=place)))
    try:
        with hold(run.work / LOCK_FILE, path):
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


def _remove(run: _Run) -> None:
    """Remove the directory of a run whose target is settled; the mark goes last."""
    try:
        run.settle()
    except OSError as error:
        raise OutputError(
            f"{run.target} could not be put in order: {reason_of(error)}; what belongs there lies "
            f"in {run.work}"
        ) from error
    for part in (run.new, run.old, run.going, run.work):
        shutil.rmtree(part, ignore_errors=True)


def _others(path: Path) -> Iterator[_Run]:
    """Yield what looks like the directories of runs for this target."""
    for place in dict.fromkeys((path.parent, path)):
        if place.is_dir():
            for work in sorted(place.glob(f"{_globbed(_prefix(path))}*")):
                yield _Run(path, work)


def _globbed(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _recover(path: Path) -> None:
    """Finish or remove what killed runs have left; what is not marked is left alone."""
    for run in _others(path):
        mark = run.mark()
        if mark is None:
            _remove_unmarked(run.work)
            continue
        with suppress(OutputError), hold(run.work / LOCK_FILE, path) as held, uninterrupted():
            if held or not _may_live(mark):
                _remove(run)


def _remove_unmarked(work: Path) -> None:
    """Remove what a run was killed in before it had written anything."""
    with suppress(OSError, OutputError):
        idle = time.time() - work.stat().st_mtime > _MAKING_SECONDS
        if idle and all(entry.name == LOCK_FILE for entry in work.iterdir()):
            with hold(work / LOCK_FILE, work):
                (work / LOCK_FILE).unlink()
            work.rmdir()


def _may_live(mark: _Mark) -> bool:
    """Whether a run may go on, as far as can be told without a lock."""
    if mark.host != socket.gethostname():
        return True
    try:
        os.kill(mark.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return mark.pid != os.getpid()


def _refuse_earlier(own: _Run) -> None:
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
