"""The log of a pruning run: each committed group as a file, from which a killed run goes on.

The log is a journal beside the output.  Its manifest has the request, the versions, and
fingerprints of the model, of what it puts out, and of the calibration data.  Every group that is
committed becomes a record of its own: what stays of it, its report, and the weights as they were
written.  A run that goes on writes those weights into the dense model and walks through the rest:
nothing is solved twice, and the result is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict
from torch import Tensor, nn

from osscar import __version__
from osscar.allocation.budget import Allocated
from osscar.base.errors import JournalError, warn
from osscar.base.files import digest
from osscar.base.journal import REPORT, SavingJournal
from osscar.base.json_files import MEGABYTE, STRICT
from osscar.base.printable import are, pluralize
from osscar.data.batches import ModelInputs
from osscar.network.tensor_files import read_record, write_record
from osscar.preparation.fingerprint import Fingerprint, JournalManifest
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import GroupPlan
from osscar.request import PruningRequest
from osscar.run.target_search import TargetWalk
from osscar.walk.layer_report import LayerReport

ALLOCATION, _WALKS = "allocation.json", "walks.json"
_MOST_OF_ALLOCATION = 512 * MEGABYTE
"""Bytes: a curve has a number for each unit of the model."""


def run_manifest(
    request: PruningRequest, model: nn.Module, inputs: ModelInputs, batch_size: int
) -> JournalManifest:
    """Describe a run; the model is still dense, and left as it was."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    asked = {**request.to_json(), **versions, "osscar": __version__}
    # Through JSON, as it will be read back.
    asked = json.loads(json.dumps(asked))
    return JournalManifest("osscar.run-log/5", asked, Fingerprint.of(model, inputs, batch_size))


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """What became of one group, with the weights as the model holds them.

    These are of each consumer the refitted matrix (p, m) and, if it has one, its bias (m,).
    """

    plan: GroupPlan
    report: LayerReport
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Words:
    """The part of a record that is no tensor."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    plan: GroupPlan
    report: LayerReport


@dataclass(frozen=True)
class _Allocation:
    """What groups keep, as a run has decided it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: str
    allocated: Allocated
    digest: str

    @classmethod
    def of(cls, run: str, allocated: Allocated) -> _Allocation:
        text = json.dumps(dataclasses.asdict(allocated), sort_keys=True)
        return cls(run, allocated, digest(text))


@dataclass(frozen=True)
class _Walks:
    """The sizes that were tried to reach a target."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: str
    walks: tuple[TargetWalk, ...]


_GROUPS = "[0-9][0-9][0-9][0-9][0-9].safetensors"


class RunLog(SavingJournal[JournalManifest]):
    """The records of a run, in the order in which groups were committed.

    A run that finds a size has a log for each walk in its own.
    """

    what = "run"
    manifest_file = "log.json"
    schema = JournalManifest
    done_files = (_GROUPS, f"walk-[1-9]/{_GROUPS}")
    other_files = (
        *("walk-[1-9]/recovery/*", "walk-[1-9]/recovery", "walk-[1-9]/*", "walk-[1-9]"),
        *(REPORT, _WALKS, ALLOCATION),
    )
    otherwise = "start over with --restart"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._run = ""
        """Digest of the manifest, which each record bears."""

    @contextmanager
    def begun(self, manifest: JournalManifest) -> Iterator[tuple[LayerRecord, ...]]:
        """Begin a run, or go on with one, and hold its lock; yield what was committed before.

        Raises
        ------
        JournalError
            If the log is of a run that was asked something else, or cannot be read.
        """
        with self.held():
            first = self.begin(manifest)
            self._run = digest(json.dumps(dataclasses.asdict(first), sort_keys=True))
            yield tuple(self._read(index) for index in range(self.committed))

    def allocation(self) -> Allocated | None:
        """Return what the run has decided that groups keep; None if it has not come so far."""
        found = self.read(ALLOCATION, _Allocation, limit=_MOST_OF_ALLOCATION)
        if found is None:
            return None
        if found != _Allocation.of(self._run, found.allocated):
            raise JournalError(
                f"{self.directory / ALLOCATION} is of another run, or was changed since it was "
                "written; start over with --restart"
            )
        return found.allocated

    def note_allocation(self, allocated: Allocated) -> None:
        """Keep what was decided, so that a run that goes on decides nothing anew."""
        self.write(ALLOCATION, _Allocation.of(self._run, allocated))

    def walk(self, number: int) -> RunLog:
        """Return the log of one walk of a run that finds a size, from 1 on."""
        return RunLog(self.directory / f"walk-{number}")

    def walks(self) -> tuple[TargetWalk, ...]:
        """Return the walks that are done and measured."""
        found = self.read(_WALKS, _Walks)
        if found is None:
            return ()
        if found.run != self._run:
            raise JournalError(
                f"{self.directory / _WALKS} is of another run; start over with --restart"
            )
        return found.walks

    def note_walks(self, walks: Sequence[TargetWalk]) -> None:
        """Keep what was measured, so that a run that goes on tries the same sizes."""
        self.write(_WALKS, _Walks(self._run, tuple(walks)))

    @property
    def committed(self) -> int:
        """How many groups have been committed, those of walks aside."""
        return sum(path.parent == self.directory for path in self.done)

    @property
    def kept(self) -> str:
        """What a run that ends now leaves, in words; nothing if that is nothing."""
        groups = len(self.done)
        where = f"done and kept in {self.directory}"
        return f"{pluralize(groups, 'group')} {are(groups)} {where}" if groups else ""

    def _place(self, index: int) -> Path:
        return self.directory / f"{index:05}.safetensors"

    def append(self, index: int, record: LayerRecord) -> None:
        """Write the record of the group that was committed as number `index`."""
        weights = {f"{number:05}": one for number, one in enumerate(record.weights)}
        words = _Words(record.plan, record.report)
        write_record(self._place(index), words, weights, self._run)

    def _read(self, index: int) -> LayerRecord:
        words, weights = read_record(self._place(index), _Words, self._run)
        return LayerRecord(words.plan, words.report, tuple(weights.values()))


@contextmanager
def begun(
    log: RunLog | None, prepared: Prepared, request: PruningRequest
) -> Iterator[tuple[LayerRecord, ...]]:
    """Begin a run, or go on with one, on all ranks; yield what was committed before."""
    ranks = prepared.ranks
    if log is None and ranks.alone:
        yield ()
        return
    manifest = run_manifest(request, prepared.model, prepared.inputs, prepared.batch_size)
    manifest.check_alike(ranks)
    batches = len(prepared.batches())
    if batches < ranks.size:
        warn(
            f"{ranks.size} ranks share out {pluralize(batches, 'batch', 'batches')}, and some "
            "have nothing to do; give a smaller --batch-size, or launch fewer"
        )
    with nullcontext(()) if log is None else log.begun(manifest) as records:
        done = ranks.broadcast("how many groups are done", lambda: len(records))
        yield tuple(
            ranks.broadcast("a group that is done", partial(records.__getitem__, index))
            for index in range(done)
        )
