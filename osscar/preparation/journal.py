"""Journals: directories of what a command has done, from which the same command goes on.

A manifest says what is being made, and from what; each thing that is done is a file, written whole
and put on the disk as soon as it is known.  A command that is killed at any moment leaves a journal
that goes on, and one that has done nothing leaves none.
It goes on with the same model and data alone, which a fingerprint tells.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import JsonValue, with_config
from pydantic_core import to_jsonable_python
from torch import nn

from osscar.base.devices import this_device
from osscar.base.errors import FileError, JournalError, RanksError
from osscar.base.files import LOCK_FILE, PARTIAL, file_lock, make_directory, write_json
from osscar.base.json_files import STRICT, read_json
from osscar.base.printable import are, pluralize
from osscar.base.process import uninterrupted
from osscar.base.ranks import Ranks
from osscar.data.batches import ModelInputs
from osscar.network.model_state import model_state
from osscar.network.modules import device_of, named_tensors, sha256_of
from osscar.offload.on_disk import room_for_pass
from osscar.preparation.failures import failures_named
from osscar.proof.equivalence import proof_outputs
from osscar.proof.lineage import lineage_of
from solvers.own_code import source_digests


def own_code(*code: Any) -> dict[str, str]:
    """Return the digests of files of a user's own code, of a backend, a model or a function."""
    found: dict[str, set[str]] = {}
    for one in code:
        for name, digest in source_digests(getattr(one, "function", one)).items():
            found.setdefault(f"the content of {name}", set()).add(digest[:16])
    return {name: " ".join(sorted(digests)) for name, digests in found.items()}


@with_config(STRICT)
@dataclass(frozen=True)
class Fingerprint:
    """What something is made of, so that it goes on only with the same: digests, and outputs.

    The code of a model is not all in its file: what it does may lie in a helper, a constant, a
    default, a hook.  What it returns on given inputs tells, where the same processor computed both
    in as many threads: others round otherwise, and graphics cards add up in any order.
    """

    code: Mapping[str, str]
    """Files of the user's own that the model was built by."""
    weights: str
    calibration: str
    outputs: str
    """Of the first calibration sample and of the example inputs."""
    device: dict[str, str]
    """What computed them, as `osscar.base.devices.this_device` tells it."""

    @classmethod
    def of(cls, model: nn.Module, inputs: ModelInputs) -> Fingerprint:
        """Read a dense model, which is left as it was, and its data; run it on few samples."""
        inputs = inputs.on(model)
        batches = enumerate(inputs.batches(inputs.batch_size))
        data = ((f"{i}.{name}", x) for i, batch in batches for name, x in batch.items())
        # Of these a divergence is measured.
        labelled = torch.tensor([-1] if inputs.predictions is None else [1, *inputs.predictions])
        sample = inputs.first()
        with (
            model_state(model),
            failures_named(model, sample, inputs.source),
            room_for_pass(model, max(x.numel() for x in sample.values())),
        ):
            found = proof_outputs(model, [sample, inputs.example()])
        return cls(
            own_code(lineage_of(model).source),
            sha256_of(named_tensors(model)),
            sha256_of(chain([("labelled", labelled)], data)),
            sha256_of((str(index), one) for index, one in enumerate(found)),
            this_device(device_of(model)),
        )

    def difference(self, before: Fingerprint) -> str | None:
        """Say in what it differs from an earlier one, or None."""
        for name, _ in sorted(self.code.items() ^ before.code.items()):
            return f"{name} has changed"
        if self.weights != before.weights:
            return "the model's weights differ"
        if self.calibration != before.calibration:
            return "the calibration data differ"
        same_device = self.device == before.device and bool(self.device["threads"])
        if same_device and self.outputs != before.outputs:
            return "the dense model returns other values on the same inputs: its code has changed"
        return None


# ---- journals ----------------------------------------------------------------------------


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
                was, now = f"{theirs!r:.80}", f"{mine!r:.80}"
                return f"{name} was {was} and is {now}" if was != now else f"other {name}"
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

    part: ClassVar[str] = "part"
    """What one file of what is done has: ``"group"``."""

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

    @property
    def kept(self) -> str:
        """What a command that ends now leaves, in words; empty if nothing."""
        done = len(self.done)
        kept = f"{pluralize(done, self.part)} {are(done)} done and kept in {self.directory}"
        return kept * bool(done)

    def refuse_foreign(self) -> None:
        """Refuse a place that holds something else; what a killed command leaves is none."""
        what, place = self.what, self.directory
        names = list[str]()
        with suppress(OSError):  # nothing can be written there either, which says why
            names = sorted(path.name for path in place.iterdir())
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
        """Write dataclasses, arrays among their fields; once this returns, it is on the disk."""
        plain = to_jsonable_python(content, fallback=np.ndarray.tolist)
        write_json(self.directory / name, plain, indent=1)

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
