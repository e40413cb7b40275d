"""Journals: directories of what a command has done, from which the same command goes on.

A manifest says what is being made of what; each thing that is done is a file, written whole and put
on the disk as soon as it is known.  One process at a time is at work in a journal.  A command that
is killed at any moment leaves a journal that goes on, and one that has done nothing leaves none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from osscar.base.errors import FileError, OsscarError, OutputError
from osscar.base.files import LOCK_FILE, PARTIAL, file_lock, reason_of, remedy, write_json
from osscar.base.json_files import MEGABYTE, read_json
from osscar.base.signals import uninterrupted

T = TypeVar("T")

_PARTIAL_FILE = re.compile(rf".+\.\d+{re.escape(PARTIAL)}")
"""What `atomic_write` and the solvers call a file that is being written; it has the process."""


class _Manifest(Protocol):
    """What is being made of what: a dataclass, in JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def difference(self: M, before: M, /) -> str | None:
        """Say in what it differs from an earlier one, or None."""


M = TypeVar("M", bound=_Manifest)


@dataclass(frozen=True)
class JournalKind(Generic[M]):
    """What all journals of one command have in common.

    Parameters
    ----------
    what
        What is kept: ``"run"``.
    manifest, schema
        The name of the manifest's file, and what it holds.
    done
        Which files each say of something that it is done, as patterns.
    others
        Patterns of all else that the command writes there, in the order in which it can go.
    error
        What is raised about a journal of something else, or one that cannot be read.
    otherwise
        What to do instead of going on.
    """

    what: str
    manifest: str
    schema: type[M]
    done: tuple[str, ...]
    others: tuple[str, ...]
    error: type[OsscarError]
    otherwise: str


class Journal(Generic[M]):
    """What a command has done, in a directory.

    Parameters
    ----------
    directory
        Where it lies, or will.
    kind
        Whose it is.
    """

    def __init__(self, directory: Path, kind: JournalKind[M]) -> None:
        self.directory, self.kind = directory, kind
        self._held = self._known = False

    @property
    def done(self) -> list[Path]:
        """The files of what is done, in order."""
        return sorted(path for pattern in self.kind.done for path in self.directory.glob(pattern))

    def refuse_foreign(self) -> None:
        """Refuse a place that holds something else; what a killed command leaves is none.

        Raises
        ------
        OsscarError
            Of this kind.
        """
        what, place = self.kind.what, self.directory
        try:
            names = sorted(path.name for path in place.iterdir()) if place.exists() else []
        except NotADirectoryError as error:
            raise self.kind.error(
                f"{place} is a file and holds no {what}; give another --out"
            ) from error
        except OSError as error:
            raise self.kind.error(f"cannot look into {place}: {reason_of(error)}") from error
        foreign = [n for n in names if n != LOCK_FILE and not _PARTIAL_FILE.fullmatch(n)]
        if foreign and self.kind.manifest not in names:
            raise self.kind.error(
                f"{place} holds {foreign[0]!r} and no {what}; move that away, or give another --out"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep all other processes away while the block runs; a block inside adds nothing.

        Raises
        ------
        OsscarError
            Of this kind, if the directory holds something else.
        BusyError
            If another process is at work in it.
        OutputError
            If it cannot be written.
        """
        if self._held:
            yield
            return
        self.refuse_foreign()
        made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            self.make(".")
            with file_lock(self.directory / LOCK_FILE, self.directory):
                self._held = True
                try:
                    self._remove_partial()
                    yield
                finally:
                    self._held = False
                    with uninterrupted():
                        self._tidy()
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()

    def make(self, name: str) -> None:
        """Make the directory, or one in it.

        Raises
        ------
        OutputError
            If it cannot be made.
        """
        try:
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{reason_of(error)}{remedy(error)}"
            raise OutputError(f"cannot write {self.directory / name}: {reason}") from error

    def manifest(self) -> M | None:
        """Return what is kept here; None if nothing is yet.

        Raises
        ------
        OsscarError
            Of this kind, if it cannot be read.
        """
        file = self.directory / self.kind.manifest
        if not file.exists():
            return None
        try:
            return read_json(file, self.kind.schema)
        except FileError as error:
            raise self.kind.error(
                f"{file} is not the manifest of a {self.kind.what}: {error.reason}; "
                f"{self.kind.otherwise}"
            ) from error

    def check(self, manifest: M) -> M | None:
        """Refuse to go on with something else; return what is kept here, None if nothing is yet.

        Raises
        ------
        OsscarError
            Of this kind, saying in what they differ; or if that cannot be read.
        """
        before = self.manifest()
        difference = None if before is None else manifest.difference(before)
        if difference is not None:
            raise self.kind.error(
                f"{self.directory} holds another {self.kind.what}: {difference}; ask for the same "
                f"to go on, or {self.kind.otherwise}"
            )
        self._known = self._known or before is not None
        return before

    def begin(self, manifest: M, *, anew: bool = False) -> M:
        """Say what is kept here, or check that it is the same; return it as it was first written.

        Parameters
        ----------
        manifest
            What is asked for.
        anew
            Whether it takes the place of what stands there, unseen.

        Raises
        ------
        OsscarError
            As `check` does.
        OutputError
            If it cannot be written.
        """
        before = None if anew else self.check(manifest)
        if before is None:
            self.write(self.kind.manifest, manifest)
            self._known = True
        return manifest if before is None else before

    def read(
        self, name: str, schema: type[T], *, limit: int = 16 * MEGABYTE, otherwise: str = ""
    ) -> T | None:
        """Return what a file holds; None if there is none.

        Parameters
        ----------
        name
            Of the file.
        schema
            What it has to hold, as for `read_json`.
        limit
            Bytes that it may have at most.
        otherwise
            What to do about a file that cannot be read.

        Raises
        ------
        OsscarError
            Of this kind, if it cannot be read.
        """
        file = self.directory / name
        if not file.exists():
            return None
        try:
            return read_json(file, schema, limit=limit)
        except FileError as error:
            raise self.kind.error(f"{error}; {otherwise or self.kind.otherwise}") from error

    def write(self, name: str, content: Any) -> None:
        """Write a dataclass; once this returns, it is on the disk.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        write_json(self.directory / name, dataclasses.asdict(content), indent=1)

    def remove(self) -> None:
        """Forget all that was done; what is none of ours stays.

        A removal that is killed leaves a journal that goes on, or can be removed: what was done
        last goes first, and the manifest goes last.

        Raises
        ------
        OsscarError
            Of this kind, if the directory holds something else.
        BusyError
            If another process is at work in it.
        """
        if not self.directory.is_dir():
            return
        with self.held():
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
        for pattern in (*self.kind.others, self.kind.manifest):
            for path in self.directory.glob(pattern):
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        self._known = False

    def _remove_partial(self) -> None:
        for path in self.directory.rglob(f"*{PARTIAL}"):
            if _PARTIAL_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)
