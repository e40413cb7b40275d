"""Where a recovery stands, kept in a directory: one that was killed goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
from pydantic import ConfigDict
from torch import Tensor

from osscar.base.errors import FileError, JournalError
from osscar.base.files import atomic_write, digest
from osscar.base.journal import REPORT, SavingJournal
from osscar.base.json_files import STRICT, parse_json
from osscar.network.modules import sha256_of
from osscar.preparation.fingerprint import JournalManifest
from solvers.storage import as_new_files

WAY = "way"
"""The entry of a manifest that has the way to train that was chosen: fields of a request."""

_WORDS = "standing"
"""The key under which a file keeps everything but its tensors."""


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
class _Words:
    """The part of a file that is no tensor."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rate: float
    points: tuple[Point, ...]
    digest: str
    """Of all that is kept, and of the manifest."""


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a training stands, with all that it goes on from.

    `rate` is the learning rate at its height; `tensors` are by name the weights, their best values,
    and what the optimizer keeps of them.
    """

    rate: float
    points: tuple[Point, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)


class RecoveryLog(SavingJournal[JournalManifest]):
    """Where a recovery stands; of what it was before nothing is kept."""

    what = "recovery"
    manifest_file = "log.json"
    schema = JournalManifest
    done_files = ("[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].safetensors",)
    other_files = (REPORT,)
    otherwise = "begin anew with --restart"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._manifest = ""

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
        way = {} if manifest is None else manifest.asked.get(WAY)
        return way if isinstance(way, dict) and way else None

    @contextmanager
    def begun(self, manifest: JournalManifest) -> Iterator[None]:
        """Begin a recovery, or go on with one, and hold its lock while the block runs."""
        with self.held():
            first = self.begin(manifest)
            self._manifest = json.dumps(dataclasses.asdict(first), sort_keys=True)
            yield

    def last(self) -> Standing | None:
        """Return where the recovery stands; None if it has not come so far."""
        if not self.done:
            return None
        place = self.done[-1]
        try:
            with safetensors.safe_open(place, "pt") as file:
                words = parse_json((file.metadata() or {}).get(_WORDS, ""), _Words, place)
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            found = Standing(words.rate, words.points, tensors)
            if not found.points or words.digest != self._digest(found):
                raise FileError(place, "it is of another recovery, or was changed")
        except (OSError, safetensors.SafetensorError, FileError) as error:
            raise JournalError(f"{place} cannot be read: {error}; {self.otherwise}") from error
        return found

    def keep(self, standing: Standing) -> None:
        """Keep where the recovery stands; what was kept before goes."""
        before = self.done
        tensors = {n: t.contiguous().cpu() for n, t in sorted(standing.tensors.items())}
        standing = dataclasses.replace(standing, tensors=tensors)
        words = _Words(standing.rate, standing.points, self._digest(standing))
        place = self.directory / f"{standing.points[-1].step:08}.safetensors"
        text = json.dumps(dataclasses.asdict(words))
        with atomic_write(place) as partial, as_new_files(partial):
            safetensors.torch.save_file(tensors, partial, {_WORDS: text})
        for old in before:
            old.unlink(missing_ok=True)

    def _digest(self, standing: Standing) -> str:
        points = [dataclasses.asdict(point) for point in standing.points]
        words = json.dumps([self._manifest, standing.rate, points])
        return digest(words + sha256_of(standing.tensors.items()))
