"""Where a checkpoint goes: what may be replaced there, and how a directory takes its place.

A save writes into a directory of its own beside the target, and holds a lock in it.  So a later one
can tell what a killed one has left behind from what a live one is writing, and one that comes at
the same time is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from osscar.base.errors import CheckpointError, OutputError
from osscar.base.files import LOCK_FILE, file_lock, fsync, reason_of, remedy, resolved
from osscar.base.printable import listed
from osscar.base.signals import ends_tidily, uninterrupted
from osscar.checkpoint.manifest import CONFIG_FILE, MANIFEST_FILE, REPORT_FILE, read_manifest

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_CHECKPOINT_FILES = (
    *_WEIGHTS,
    *("*.safetensors.index.json", "pytorch_model.bin.index.json"),
    *(CONFIG_FILE, "generation_config.json", MANIFEST_FILE, REPORT_FILE),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "modeling_pruned.py"),
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

    What killed runs have left beside it is put in order first. `inputs` are files and directories
    that the run needs (names that are no paths do no harm), and `needed_bytes` is how much is going
    to be written, at most.
    """
    path = resolved(directory)
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; give a directory")
        for need in _existing((os.curdir, *inputs)):
            if path == need or path in need.parents:
                raise OutputError(f"{path} would replace {need}, which is in use; give another")
        finish_killed(path)
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
    """Refuse a directory that holds anything, or anything that must not go."""
    there = entries(path) if path.is_dir() else []
    if not there:
        return
    known = _known_names(path)
    foreign = sorted(entry.name for entry in there if not _is_known(entry, known))
    if foreign:
        raise OutputError(
            f"{path} is not empty: it holds something other than a checkpoint, which would be "
            f"lost: {listed(foreign, _NAMED)}; give another directory, or move that away"
        )
    ours = (path / MANIFEST_FILE).is_file()
    weights = any(fnmatchcase(entry.name, kind) for entry in there for kind in _WEIGHTS)
    if not ours and not (weights and (path / CONFIG_FILE).is_file()):
        raise OutputError(
            f"{path} is not empty: it holds something other than a checkpoint; "
            "give another directory"
        )
    if not overwrite:
        raise OutputError(
            f"{path} is not empty: a checkpoint is there; give another directory, or --overwrite "
            "(overwrite=True in Python) to replace it"
        )


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
    place = path if cannot_move(path) else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"cannot write {path}: {place} is a file; give another directory")
    try:
        with uninterrupted():
            os.rmdir(tempfile.mkdtemp(prefix=prefix(path), dir=place))
    except OSError as error:
        reason = f"{reason_of(error)}{remedy(error)}"
        raise OutputError(f"cannot write to {place}: {reason}") from error
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise OutputError(
            f"cannot write {path}: it may take {needed_bytes / 1e6:,.0f} MB, and {place} has "
            f"{free / 1e6:,.0f} MB left; make room, or give another directory"
        )


# ---- writing -----------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty directory, which takes the place of `path` once the block has succeeded.

    What was at `path` stays whole until then; if the block fails, nothing is left behind.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(ends_tidily())
            place = path if cannot_move(path) else path.parent
            place.mkdir(parents=True, exist_ok=True)
            with uninterrupted():
                run = stack.enter_context(_run_for(path, place))
            finish_killed(path)
            yield run.new
            _check_replaceable(path, overwrite)
            with uninterrupted():
                run.swap()
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {reason_of(error)}; it was left as it was{remedy(error)}"
            ) from error


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


class Run:
    """What a save is at work on, in a directory of its own.

    `place` is what that lies in: the target's parent, or the target.
    """

    def __init__(self, target: Path, place: Path) -> None:
        self.target, self.work = target, place / f"{prefix(target)}save"
        # What is written, and after an exchange what was replaced; what is being replaced, where
        # the two cannot be exchanged in one step; what goes into a target that stays, from when it
        # is empty.
        self.parts = tuple(self.work / name for name in ("new", "old", "going"))
        self.new, self.old, self.going = self.parts

    def holds_more(self) -> bool:
        """Whether there is something else in its directory, which is then someone else's."""
        return bool({*self.work.iterdir()} - {*self.parts, self.work / LOCK_FILE})

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
def _run_for(path: Path, place: Path) -> Iterator[Run]:
    """Make the directory of a save, and remove it in the end."""
    run = Run(path, place)
    run.work.mkdir(exist_ok=True)
    if run.holds_more():
        raise OutputError(f"{run.work} holds something else; move that away")
    with file_lock(run.work / LOCK_FILE, path):
        _clear(run)
        try:
            run.new.mkdir()
            yield run
        finally:
            with uninterrupted():
                _remove(run)


def finish_killed(path: Path) -> None:
    """Finish or remove what killed saves have left; what is someone else's is left alone."""
    for place in dict.fromkeys((path.parent, path)):
        run = Run(path, place)
        with suppress(OutputError):
            if run.work.is_dir() and not run.holds_more():
                with file_lock(run.work / LOCK_FILE, path), uninterrupted():
                    _remove(run)


def _remove(run: Run) -> None:
    _clear(run)
    with suppress(OSError):
        (run.work / LOCK_FILE).unlink(missing_ok=True)
        run.work.rmdir()


def _clear(run: Run) -> None:
    """Settle the target of a save, and remove what it was at work on."""
    try:
        run.finish()
    except OSError as error:
        raise OutputError(
            f"{run.target} could not be put in order: {reason_of(error)}; what belongs there lies "
            f"in {run.work}"
        ) from error
    for part in run.parts:
        shutil.rmtree(part, ignore_errors=True)


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
