"""Where a recovery stands, kept in a directory: one that was killed goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict
from torch import Tensor

from osscar.base.journal import REPORT, SavingJournal
from osscar.base.json_files import STRICT
from osscar.network.records import read_record, write_record
from osscar.preparation.fingerprint import JournalManifest

WAY = "way"
"""The entry of a manifest that has the way to train that was chosen: fields of a request."""


@dataclass(frozen=True)
class Point:
    """A look at the held-out samples.

    Parameters
    ----------
    step
        Of the optimizer; 0 is the model as it came.
    loss
        The mean of the training steps since the last look; None before the first.
    held_out
        The distance from the dense model on the samples that train nothing.  Of both, None stands
        for what is not finite.
    seconds
        Since the training began.
    """

    step: int
    loss: float | None
    held_out: float | None
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a training is: the learning rate at its height, and the looks so far."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rate: float
    points: tuple[Point, ...]


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a training stands, with all that it goes on from.

    Tensors are by name the weights, their best values, and what the optimizer keeps of them.
    """

    progress: Progress
    tensors: Mapping[str, Tensor] = field(repr=False)


class RecoveryLog(SavingJournal[JournalManifest]):
    """Where a recovery stands; of what it was before nothing is kept."""

    what = "recovery"
    manifest_file = "log.json"
    schema = JournalManifest
    done_files = ("[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].safetensors",)
    other_files = (REPORT,)
    otherwise = "begin anew with --restart"

    _run = ""
    """The manifest as it was first written, in JSON."""

    def begin(self, manifest: JournalManifest, *, anew: bool = False) -> JournalManifest:
        """Begin a recovery, or go on with one; records bear what was asked at first."""
        first = super().begin(manifest, anew=anew)
        self._run = json.dumps(dataclasses.asdict(first), sort_keys=True)
        return first

    @property
    def kept(self) -> str:
        """What a recovery that ends now leaves, in words; nothing if that is nothing."""
        if not self.done:
            return ""
        steps = int(self.done[-1].stem)
        words = "step is" if steps == 1 else f"{steps} steps are"
        return f"the first {words} kept in {self.directory}"

    def way(self) -> dict[str, Any] | None:
        """Return the way to train that was chosen when the recovery began; None if it has not."""
        manifest = self.manifest()
        way = None if manifest is None else manifest.asked.get(WAY)
        return way if isinstance(way, dict) else None

    def last(self) -> Standing | None:
        """Return where the recovery stands; None if it has not come so far."""
        if not self.done:
            return None
        return Standing(*read_record(self.done[-1], Progress, self._run))

    def keep(self, standing: Standing) -> None:
        """Keep where the recovery stands; what was kept before goes."""
        before = self.done
        step = standing.progress.points[-1].step
        place = self.directory / f"{step:08}.safetensors"
        write_record(place, standing.progress, standing.tensors, self._run)
        for old in before:
            old.unlink(missing_ok=True)
