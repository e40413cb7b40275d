"""The log of a pruning run: each committed group as a file, from which a killed run goes on.

The log is a directory beside the output.  Its manifest says what is being made of what: the
request, the versions, and fingerprints of the model, of what it puts out, and of the calibration
data.  Every group that
is committed becomes a record of its own: what stays of it, its report, and the weights as they were
written.  A run that goes on writes those weights into the dense model and walks through the rest:
nothing is solved twice, and the result is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors
import safetensors.torch
from pydantic import ConfigDict
from torch import Tensor, nn

from osscar.allocation.budget import Allocated, Budget
from osscar.base.errors import FileError, OutputError, RunError
from osscar.base.files import PARTIAL, atomic_write, digest, reason_of, remedy, write_json
from osscar.base.json_files import MEGABYTE, STRICT, parse_json, read_json
from osscar.base.locks import LOCK_FILE, file_lock
from osscar.base.printable import are, counted
from osscar.base.signals import uninterrupted
from osscar.base.version import VERSION
from osscar.data.batches import ModelInputs
from osscar.offload.on_disk import values_of
from osscar.preparation.fingerprint import Fingerprint, sha256_of
from osscar.pruning.result import LayerReport
from osscar.request import PruningRequest
from osscar.shrinking.plan import GroupPlan

MANIFEST = "log.json"
ALLOCATION = "allocation.json"
_MOST_OF_ALLOCATION = 512 * MEGABYTE
"""Bytes: a curve has a number for each unit of the model."""
REPORT = "report.json"
"""What a run is about to save, and how it was asked for."""
_RECORD_FILE = re.compile(r"\d{5}\.safetensors")
_RECORD = "record"
"""The key under which a record file keeps everything but its tensors."""


@dataclass(frozen=True)
class RunManifest:
    """What a run makes of what; a run goes on only where all of it is the same.

    Parameters
    ----------
    schema
        What this is, and in which version.
    request
        As `PruningRequest.to_json` returns it.
    versions
        Of what computes the result, by package.
    dense
        What tells the dense model and the calibration data from others.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.run-log/2"]
    request: dict[str, Any]
    versions: dict[str, str]
    dense: Fingerprint

    @classmethod
    def of(
        cls, request: PruningRequest, model: nn.Module, inputs: ModelInputs, batch_size: int
    ) -> RunManifest:
        """Describe a run; the model is still dense, and left as it was.

        Raises
        ------
        CalibrationError
            If it fails on the calibration data.
        EquivalenceError
            If it puts out no tensor.
        """
        versions = {name: version(name) for name in ("torch", "transformers")}
        return cls(
            schema="osscar.run-log/2",
            # Through JSON, as it will be read back.
            request=json.loads(json.dumps(request.to_json())),
            versions={**versions, "osscar": VERSION},
            dense=Fingerprint.of(model, inputs, batch_size),
        )

    def difference(self, other: RunManifest) -> str | None:
        """Say in what the two differ, or None."""
        for name in ("request", "versions"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key in sorted(mine | theirs):
                if mine.get(key) != theirs.get(key):
                    option = key.replace("_", "-")
                    return f"{option} was {theirs.get(key)!r} and is {mine.get(key)!r}"
        return self.dense.difference(other.dense)


@dataclass(frozen=True, eq=False)
class SiteRecord:
    """What became of one group.

    Parameters
    ----------
    plan
        What stays.
    report
        What is known of its solution.
    weights
        What was written, as the model holds it: of each consumer the refitted matrix (p, m) and,
        if it has one, its bias (m,).
    """

    plan: GroupPlan
    report: LayerReport
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Words:
    """The part of a record that is no tensor."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: str
    index: int
    plan: GroupPlan
    report: LayerReport
    weights: int
    digest: str


@dataclass(frozen=True)
class _Allocation:
    """What groups keep, as a run has decided it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: str
    keep: dict[str, int]
    budget: Budget | None
    digest: str

    @classmethod
    def of(cls, run: str, allocated: Allocated) -> _Allocation:
        text = json.dumps(dataclasses.asdict(allocated), sort_keys=True)
        return cls(run, dict(allocated.keep), allocated.budget, digest(text))


@dataclass(frozen=True)
class _Noted:
    """What a run has noted before its save."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    asked: dict[str, str]
    report: dict[str, Any]


class RunLog:
    """The records of a run, in the order in which groups were committed.

    Parameters
    ----------
    directory
        Where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._run = ""
        """Digest of the manifest, which each record bears."""
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep all other runs away while the block runs; `begun` and `remove` do so themselves.

        A log in which nothing has been recorded goes again.

        Raises
        ------
        BusyError
            If another process is at work on it.
        OutputError
            If it cannot be written.
        """
        if self._held:
            yield
            return
        made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        try:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = f"{reason_of(error)}{remedy(error)}"
                raise OutputError(f"cannot write {self.directory}: {reason}") from error
            with file_lock(self.directory / LOCK_FILE, self.directory):
                self._held = True
                try:
                    self._clear()
                    yield
                finally:
                    self._held = False
                    with uninterrupted():
                        self._tidy()
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()

    def _clear(self) -> None:
        """Remove what a run was killed in before it had a name."""
        if (self.directory / MANIFEST).exists():
            for path in self._partial():
                path.unlink(missing_ok=True)

    def _partial(self) -> list[Path]:
        return [path for path in self.directory.glob(".*") if path.name.endswith(PARTIAL)]

    def _tidy(self) -> None:
        """Remove a log in which nothing is recorded; what is none of ours stays."""
        if self.committed:
            return
        ours = (REPORT, ALLOCATION, MANIFEST) if self._run else ()  # else they were not found to be
        for name in (*ours, LOCK_FILE):
            with suppress(OSError):
                (self.directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()

    @contextmanager
    def begun(self, manifest: RunManifest) -> Iterator[tuple[SiteRecord, ...]]:
        """Begin a run, or go on with one, and hold its lock while the block runs.

        Yields
        ------
        tuple of SiteRecord
            What has been committed before.

        Raises
        ------
        RunError
            If the log is of a run that was asked something else, or cannot be read.
        BusyError
            If another process is at work on it.
        OutputError
            If it cannot be written.
        """
        with self.held():
            file = self.directory / MANIFEST
            if file.exists():
                before = self._manifest(file)
                difference = manifest.difference(before)
                if difference is not None:
                    raise RunError(
                        f"{self.directory} is the log of another run: {difference}; ask for the "
                        "same to go on, or begin anew with --restart"
                    )
                manifest = before  # to the bit, as records bear its digest
            elif self.committed:
                raise RunError(f"{self.directory} has lost {MANIFEST}; remove it, or change --out")
            else:
                write_json(file, dataclasses.asdict(manifest))
            self._run = digest(json.dumps(dataclasses.asdict(manifest), sort_keys=True))
            yield tuple(self._records())

    def allocation(self) -> Allocated | None:
        """Return what the run has decided that groups keep; None if it has not come so far.

        Raises
        ------
        RunError
            If that cannot be read, or is of another run.
        """
        file = self.directory / ALLOCATION
        if not file.exists():
            return None
        try:
            found = read_json(file, _Allocation, limit=_MOST_OF_ALLOCATION)
        except FileError as error:
            raise RunError(f"{error}; begin anew with --restart") from error
        if found.run != self._run:
            raise RunError(f"{file} is of another run; begin anew with --restart")
        allocated = Allocated(found.keep, found.budget)
        if found != _Allocation.of(self._run, allocated):
            raise RunError(f"{file} was changed since it was written; begin anew with --restart")
        return allocated

    def note_allocation(self, allocated: Allocated) -> None:
        """Keep what was decided, so that a run that goes on decides nothing anew.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        found = _Allocation.of(self._run, allocated)
        write_json(self.directory / ALLOCATION, dataclasses.asdict(found))

    @property
    def committed(self) -> int:
        """How many groups have been committed."""
        return len(self._record_files())

    @property
    def kept(self) -> str:
        """What a run that ends now leaves, in words."""
        return (
            f"{counted(self.committed, 'group')} {are(self.committed)} done and "
            f"kept in {self.directory}"
            if self.committed
            else "no group was done yet"
        )

    def _record_files(self) -> list[Path]:
        there = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted(path for path in there if _RECORD_FILE.fullmatch(path.name))

    def remove(self) -> None:
        """Forget the run; what is none of ours stays.

        A removal that was killed leaves a log from which a run goes on, or which can be removed:
        the last records go first, and the manifest goes last.

        Raises
        ------
        RunError
            If the directory holds something, and no manifest of a run.
        BusyError
            If another process is at work on it.
        """
        if not self.directory.is_dir():
            return
        names = [path.name for path in self.directory.iterdir()]
        if MANIFEST not in names and set(names) - {LOCK_FILE}:
            raise RunError(f"{self.directory} is no log of a run; move it, or change --out")
        with self.held():
            partial = [path.name for path in self._partial()]
            records = [path.name for path in reversed(self._record_files())]
            for name in (*partial, *records, REPORT, ALLOCATION, MANIFEST):
                (self.directory / name).unlink(missing_ok=True)

    def note(self, asked: Mapping[str, str], report: Mapping[str, Any]) -> None:
        """Write down what is about to be saved, so that `saved` knows it again.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        write_json(self.directory / REPORT, {"asked": dict(asked), "report": dict(report)})

    def saved(self, asked: Mapping[str, str], report: Path) -> Mapping[str, Any] | None:
        """Return the report of a run that was ended between its save and the end of its log.

        Parameters
        ----------
        asked
            As it was noted.
        report
            The file that the run has saved; it tells seconds, so that no two are alike.

        Returns
        -------
        Mapping or None
            None where that is not how things are.
        """
        try:
            noted = read_json(self.directory / REPORT, _Noted)
            found = read_json(report, dict[str, Any])
        except (FileError, OSError):  # whatever is wrong with the path is said when it is written
            return None
        return found if (noted.asked, noted.report) == (dict(asked), found) else None

    def _manifest(self, file: Path) -> RunManifest:
        try:
            return read_json(file, RunManifest)
        except FileError as error:
            raise RunError(
                f"{error}; if it is the log of a run, begin anew with --restart"
            ) from error

    def _records(self) -> Iterator[SiteRecord]:
        return (self._read(index) for index in range(self.committed))

    def _place(self, index: int) -> Path:
        return self.directory / f"{index:05}.safetensors"

    def append(self, index: int, record: SiteRecord) -> None:
        """Write the record of the group that was committed as number `index`.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        words = {
            "run": self._run,
            "index": index,
            "plan": dataclasses.asdict(record.plan),
            "report": dataclasses.asdict(record.report),
            "weights": len(record.weights),
            "digest": sha256_of((str(i), W) for i, W in enumerate(record.weights)),
        }
        tensors = {str(i): values_of(W).contiguous().cpu() for i, W in enumerate(record.weights)}
        with atomic_write(self._place(index)) as partial:
            safetensors.torch.save_file(tensors, partial, {_RECORD: json.dumps(words)})

    def _read(self, index: int) -> SiteRecord:
        place = self._place(index)
        try:
            with safetensors.safe_open(place, "pt") as file:
                text = (file.metadata() or {}).get(_RECORD, "")
                words = parse_json(text, _Words, place)
                if (words.run, words.index) != (self._run, index):
                    raise FileError(place, "it is a record of another run, or of another group")
                weights = tuple(file.get_tensor(str(i)) for i in range(words.weights))
                if words.digest != sha256_of((str(i), W) for i, W in enumerate(weights)):
                    raise FileError(place, "its weights are not those that were written")
            return SiteRecord(words.plan, words.report, weights)
        except (OSError, safetensors.SafetensorError, FileError) as error:
            raise RunError(f"{place} cannot be read: {error}; begin anew with --restart") from error
