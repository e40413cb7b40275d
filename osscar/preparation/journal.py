"""Journals: directories of what a command has done, from which the same command goes on.

A manifest says what is being made, and from what; each thing that is done is a file, written whole
and put on the disk as soon as it is known.  A command that is killed at any moment leaves a journal
that goes on, and one that has done nothing leaves none.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import JsonValue, with_config

from osscar.base.errors import FileError, JournalError, RanksError
from osscar.base.files import LOCK_FILE, PARTIAL, file_lock, make_directory, reason_of, write_json
from osscar.base.json_files import STRICT, read_json
from osscar.base.process import uninterrupted
from osscar.base.ranks import Ranks
from osscar.preparation.fingerprint import Fingerprint

T = TypeVar("T")

_PARTIAL = re.compile(rf"\..+-\d+{re.escape(PARTIAL)}")
"""What `atomic_write` calls a directory in which something is being written."""


@with_config(STRICT)
@dataclass(frozen=True)
class JournalManifest:
    """What a journal records, and what it is made from; only the same can be continued."""

    schema: str
    asked: dict[str, JsonValue]
    """Options, versions, files: whatever decides the result, by name."""
    dense: Fingerprint | None
    """None where there is no model, or it has not been read yet."""

    def difference(self, before: JournalManifest) -> str | None:
        """Say in what it differs from an earlier one, or None."""
        if self.schema != before.schema:
            return f"it is {before.schema!r:.80}, and this version writes {self.schema!r}"
        for name in sorted(self.asked | before.asked):
            mine, theirs = self.asked.get(name), before.asked.get(name)
            if mine != theirs:
                label = name.replace("_", "-") if name.isidentifier() else name
                was, now = f"{theirs!r:.80}", f"{mine!r:.80}"
                return f"{label} was {was} and is {now}" if was != now else f"other {label}"
        if self.dense is None or before.dense is None:
            return None
        return self.dense.difference(before.dense)

    def check_alike(self, ranks: Ranks) -> None:
        """Refuse to go on where a rank has other options, files or versions than the first."""
        first, *others = ranks.all_gather("what each is asked", self)
        for rank, other in enumerate(others, 1):
            difference = other.difference(first)
            if difference is not None:
                raise RanksError(
                    f"rank {rank} differs from rank 0: {difference}; give all ranks the same "
                    "options, files and versions"
                )


class Journal:
    """What a command has done, in a directory, which need not exist yet.

    Each command has a subclass, that says what all its journals have in common.  Whatever is wrong
    with a journal is a JournalError; what cannot be written, an OutputError; and a journal in which
    another process is at work, a BusyError.
    """

    what: ClassVar[str]
    """What is kept: ``"run"``."""

    manifest_file: ClassVar[str]
    done_files: ClassVar[tuple[str, ...]]
    """Which files each say of something that it is done, as patterns."""

    other_files: ClassVar[tuple[str, ...]]
    """Patterns of all else that the command writes there, in the order in which it can go."""

    otherwise: ClassVar[str]
    """What to do instead of going on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._locked = self._known = False

    @property
    def exists(self) -> bool:
        """Whether a command has begun, and has not ended."""
        return os.path.exists(self.directory / self.manifest_file)

    @property
    def done(self) -> list[Path]:
        """The files of what is done, in order."""
        return sorted(path for pattern in self.done_files for path in self.directory.glob(pattern))

    def refuse_foreign(self) -> None:
        """Refuse a place that holds something else; what a killed command leaves is none."""
        what, place = self.what, self.directory
        try:
            names = sorted(path.name for path in place.iterdir()) if place.exists() else []
        except OSError as error:
            raise JournalError(
                f"cannot look into {place}: {reason_of(error)}; give another directory (`--out`)"
            ) from error
        foreign = [n for n in names if n != LOCK_FILE and not _PARTIAL.fullmatch(n)]
        if foreign and self.manifest_file not in names:
            raise JournalError(
                f"{place} holds {foreign[0]!r} and no {what}; move that away, or give another "
                "directory (`--out`)"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other processes away while the block runs; a block inside adds nothing."""
        if self._locked:
            yield
            return
        self.refuse_foreign()
        made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            self.make(".")
            with file_lock(self.directory / LOCK_FILE, self.directory):
                self._locked = True
                try:
                    self._remove_partial()
                    yield
                finally:
                    self._locked = False
                    with uninterrupted():
                        self._tidy()
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()

    def make(self, name: str) -> None:
        """Make the directory, or one in it."""
        make_directory(self.directory / name)

    def manifest(self) -> JournalManifest | None:
        """Return what is kept here; None if nothing is yet."""
        return self.read(self.manifest_file, JournalManifest)

    def check(self, manifest: JournalManifest) -> JournalManifest | None:
        """Refuse to go on with something else; return what is kept here, None if nothing is yet."""
        before = self.manifest()
        difference = None if before is None else manifest.difference(before)
        if difference is not None:
            raise JournalError(
                f"{self.directory} holds another {self.what}: {difference}; give the same "
                f"options, files and versions to continue it, or {self.otherwise}"
            )
        self._known = self._known or before is not None
        return before

    def begin(self, manifest: JournalManifest, *, anew: bool = False) -> JournalManifest:
        """Say what is kept here, or check that it is the same; return it as first written."""
        before = None if anew else self.check(manifest)
        if before is None:
            self.write(self.manifest_file, manifest)
            self._known = True
        return before or manifest

    def read(self, name: str, schema: type[T], *, otherwise: str = "") -> T | None:
        """Return what a file holds, as `read_json` does; None if there is none."""
        file = self.directory / name
        if not os.path.exists(file):
            return None
        try:
            return read_json(file, schema)
        except FileError as error:
            raise JournalError(f"{error}; {otherwise or self.otherwise}") from error

    def write(self, name: str, content: Any) -> None:
        """Write a dataclass; once this returns, it is on the disk."""
        write_json(self.directory / name, dataclasses.asdict(content), indent=1)

    def remove(self) -> None:
        """Forget all that was done, and leave what is none of ours.

        What was done last goes first and the manifest last, so that a kill leaves a journal.
        """
        if not self.directory.is_dir():
            return
        with self.locked():
            for path in reversed(self.done):
                path.unlink(missing_ok=True)
            self._remove_rest()

    def _tidy(self) -> None:
        """Remove a journal in which nothing is done."""
        self._remove_partial()
        if self.done:
            return
        if self._known:
            self._remove_rest()
        with suppress(OSError):
            (self.directory / LOCK_FILE).unlink(missing_ok=True)
            self.directory.rmdir()

    def _remove_rest(self) -> None:
        """Remove what is left when all that was done is gone; what is none of ours stays."""
        for pattern in (*self.other_files, self.manifest_file):
            for path in self.directory.glob(pattern):
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        self._known = False

    def _remove_partial(self) -> None:
        for path in self.directory.rglob("*"):
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
