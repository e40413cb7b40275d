"""The files of a checkpoint: ``osscar.json``, and how a directory takes its place."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import with_config

from osscar import __version__
from osscar.base.errors import CheckpointError, FileError, OutputError
from osscar.base.files import (
    PARTIAL,
    fsync,
    reason_of,
    remove_abandoned,
    resolved,
    temporary_sibling,
    write_json,
)
from osscar.base.json_files import STRICT, read_json
from osscar.base.printable import listed
from osscar.base.process import uninterrupted
from osscar.proof.lineage import Lineage

MANIFEST_FILE = "osscar.json"
REPORT_FILE = "osscar_report.json"
"""For people and tools; nothing here reads it."""

PAGE_FILE = "report.html"
"""The same as a page, which is replaced only where `Manifest.files` names it."""

CONFIG_FILE = "config.json"


@with_config(STRICT)
@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    stock: Whether plain transformers reads it.
    files: What else was written into the directory.
    fresh: Whether a new process has read it back, or only the one that wrote it.
    """

    schema: Literal["osscar.checkpoint/4"]
    osscar_version: str
    stock: bool
    files: tuple[str, ...]
    lineage: Lineage
    fresh: bool

    @classmethod
    def of(cls, stock: bool, lineage: Lineage, files: tuple[str, ...] = ()) -> Manifest:
        """Describe a checkpoint that this version writes."""
        return cls("osscar.checkpoint/4", __version__, stock, files, lineage, fresh=True)

    def write(self, directory: Path) -> None:
        """Write it into a checkpoint's directory."""
        write_json(directory / MANIFEST_FILE, dataclasses.asdict(self), indent=1)


def checkpoint_directory(directory: str | os.PathLike[str]) -> Path:
    """Return the directory of a checkpoint, as far as the names of its files tell."""
    name = os.fspath(directory)
    source = os.path.expanduser(name)
    if any(os.path.isfile(os.path.join(source, one)) for one in (MANIFEST_FILE, CONFIG_FILE)):
        return Path(source).resolve()
    raise CheckpointError(
        f"{name!r} is no directory with a checkpoint; give one that `osscar prune` wrote, or one "
        "of a model of transformers"
    )


def read_manifest(directory: Path) -> Manifest | None:
    """Return what a directory says of its checkpoint; None if we did not write it (FileError)."""
    file = directory / MANIFEST_FILE
    return read_json(file, Manifest) if file.is_file() else None


# ---- where a checkpoint goes -------------------------------------------------------------


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty directory, which takes the place of `path` once the block has succeeded.

    What was at `path` stays whole until then; if the block fails, nothing is left behind.  A
    directory that is replaced has another name between two renames: a process that is killed there
    leaves it under that name, and `finish_killed` gives it its own again.

    Raises
    ------
    OutputError
        If the disk refuses, or something that must not be replaced has come to `path` meanwhile.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        finish_killed(path)
        with temporary_sibling(path) as new:
            yield new
            _check_replaceable(path, overwrite)
            for written in (*new.rglob("*"), new):
                fsync(written)
            with uninterrupted():
                _swap(new, path)
        with suppress(OSError):  # it is done, whatever a loss of power may undo
            fsync(path.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {reason_of(error)}; it was left as it was; make room there, "
            "or write elsewhere"
        ) from error


def _swap(new: Path, path: Path) -> None:
    old = kept_aside(path)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)  # fails where another process has filled it meanwhile
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def kept_aside(path: Path) -> Path:
    """Return what a directory is called while another takes its place."""
    return path.with_name(f".{path.name}.osscar-replaced")


def finish_killed(path: Path) -> None:
    """Put back or remove what killed processes have left beside an output (OSError)."""
    if remove_abandoned(path):  # whoever writes may be between its two renames
        return
    old = kept_aside(path)
    if old.is_dir() and not (path.is_dir() and any(path.iterdir())):
        if path.is_dir():
            path.rmdir()
        old.rename(path)
    elif (path / MANIFEST_FILE).is_file():  # what has taken its place is whole
        shutil.rmtree(old, ignore_errors=True)


# ---- what may be written -----------------------------------------------------------------


def check_output(
    directory: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
    needed_bytes: int = 0,
) -> Path:
    """Return the output directory if it may and can be written, with so many bytes (OutputError).

    What killed processes have left beside it is put in order first; `inputs` must not be replaced.
    """
    path = resolved(directory)
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; give a directory")
        for name in (os.curdir, *inputs):
            need = Path(os.path.realpath(os.path.expanduser(str(name))))
            if name is not None and (path == need or path in need.parents):
                raise OutputError(f"{path} would replace {need}, which is in use; give another")
        finish_killed(path)
        _check_replaceable(path, overwrite)
        # A directory beside it shows whether it can be written.
        parent = next(above for above in path.parents if above.exists())
        with uninterrupted():
            os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=parent))
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise OutputError(
            f"cannot write to {str(directory)!r}: {reason_of(error)}; give another directory"
        ) from error
    if needed_bytes > free:
        raise OutputError(
            f"cannot write {path}: it may take {needed_bytes / 1e6:,.0f} MB, and {parent} has "
            f"{free / 1e6:,.0f} MB left; make room, or give another directory"
        )
    return path


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse a directory that holds anything, or anything that must not go."""
    there = list(path.iterdir()) if path.is_dir() else []
    if not there:
        return
    try:
        manifest = read_manifest(path)
    except FileError:
        manifest = None
    written = {MANIFEST_FILE, REPORT_FILE, *(() if manifest is None else manifest.files)}
    foreign = sorted(
        one.name
        for one in there
        # Tokenizers write no other directory.
        if one.name not in written or (one.is_dir() and one.name != "additional_chat_templates")
    )
    if foreign or manifest is None:
        lost = f", which would be lost: {listed(foreign)}" if foreign else ""
        raise OutputError(
            f"{path} is not empty: it has files that are not a checkpoint of OSSCAR{lost}; "
            "give another directory, or move that away"
        )
    if not overwrite:
        raise OutputError(
            f"{path} is not empty: a checkpoint is there; give another directory, or replace it "
            "(`--overwrite`, or overwrite=True in Python)"
        )
