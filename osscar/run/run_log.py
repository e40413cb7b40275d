"""The log of a pruning run: a record for each committed group, from which a killed run goes on.

The log is a journal beside the output.  Its manifest has the request, the versions, and
fingerprints of the model, its outputs and the calibration data.  A record has what stays of a
group, its report, and its refitted weights.  A run that goes on writes these into the dense model
and solves the other groups; the result is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from pydantic import with_config
from torch import Tensor, nn

from osscar import __version__
from osscar.base.files import atomic_write
from osscar.base.json_files import STRICT
from osscar.data.batches import ModelInputs
from osscar.network.modules import weights_of
from osscar.network.tensor_files import read_header, read_record, write_record, write_tensors
from osscar.offload.on_disk import written
from osscar.preparation.journal import Fingerprint, Journal, JournalManifest, own_code
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import GroupPlan
from osscar.request import PruningRequest
from osscar.walk.layer_report import LayerReport

ALLOCATION, ATTEMPTS, TIMES = "allocation.json", "attempts.json", "times.json"
"""What a run has decided, so that one that goes on decides nothing anew."""


def run_manifest(request: PruningRequest, model: nn.Module, inputs: ModelInputs) -> JournalManifest:
    """Describe a run by its request and its dense model, which is not changed."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    # Through JSON, as it will be read back.
    asked = json.loads(json.dumps({**request.to_json(), **versions, "osscar": __version__}))
    asked |= own_code(*vars(request).values())
    return JournalManifest("osscar.run-log/9", asked, Fingerprint.of(model, inputs))


@with_config({**STRICT, "arbitrary_types_allowed": True})
@dataclass(frozen=True, eq=False)
class LayerRecord:
    """What became of one group.

    The weights are, of each consumer, the refitted matrix (p, m) and, if it has one, its bias (m,).
    """

    plan: GroupPlan
    report: LayerReport
    weights: tuple[Tensor, ...]


_TESTED = "tested.safetensors"

_GROUPS = "[0-9][0-9][0-9][0-9][0-9].safetensors"


class RunLog(Journal):
    """The records of a run, in the order of their groups; attempts to a target have logs inside."""

    what, part = "run", "group"
    manifest_file = "log.json"
    done_files = (_GROUPS, f"attempt-[1-9]/{_GROUPS}")
    other_files = (
        *("attempt-[1-9]/recovery/*", "attempt-[1-9]/recovery", "attempt-[1-9]/*", "attempt-[1-9]"),
        *(ATTEMPTS, ALLOCATION, TIMES),
    )
    otherwise = "start over with --restart"

    @contextmanager
    def begun(self, manifest: JournalManifest) -> Iterator[tuple[LayerRecord, ...]]:
        """Begin a run, or go on with one, and hold its lock; yield what was committed before."""
        with self.locked():
            self.begin(manifest)
            yield tuple(self._read(index) for index in range(self.committed))

    def attempt(self, number: int) -> RunLog:
        """Return the log of one attempt of a run with a quality target, from 1 on."""
        return RunLog(self.directory / f"attempt-{number}")

    @property
    def committed(self) -> int:
        """The number of committed groups, without those of attempts."""
        return sum(path.parent == self.directory for path in self.done)

    def _place(self, index: int) -> Path:
        return self.directory / f"{index:05}.safetensors"

    def append(self, index: int, record: LayerRecord) -> None:
        """Write the record of the group with this number."""
        weights = {f"{number:05}": one for number, one in enumerate(record.weights)}
        words = dataclasses.replace(record, weights=())
        write_record(self._place(index), words, weights)

    def keep_tested(self, model: nn.Module) -> None:
        """Write the weights of the attempt's model, which has passed its test."""
        self.make(".")
        with atomic_write(self.directory / _TESTED) as partial:
            write_tensors(partial, weights_of(model), {})

    def put_back_tested(self, model: nn.Module) -> None:
        """Give the attempt's model, which was made again, the weights that were tested."""
        for name, stored in read_header(self.directory / _TESTED).items():
            module, _, tensor = name.rpartition(".")
            with written(model.get_submodule(module), tensor) as values:
                values.copy_(stored.read((), values.device))

    def _read(self, index: int) -> LayerRecord:
        words, weights = read_record(self._place(index), LayerRecord)
        return dataclasses.replace(words, weights=tuple(weights.values()))


@contextmanager
def begun(
    log: RunLog | None, prepared: Prepared, request: PruningRequest
) -> Iterator[tuple[LayerRecord, ...]]:
    """Begin a run, or go on with one, on all ranks; yield what was committed before."""
    ranks = prepared.ranks
    if log is None and ranks.alone:
        yield ()
        return
    manifest = run_manifest(request, prepared.model, prepared.inputs)
    manifest.check_alike(ranks)
    with nullcontext(()) if log is None else log.begun(manifest) as records:
        done = ranks.broadcast("how many groups are done", lambda: len(records))
        yield tuple(
            ranks.broadcast("a group that is done", partial(records.__getitem__, index))
            for index in range(done)
        )
