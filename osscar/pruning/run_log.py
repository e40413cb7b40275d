"""The log of a pruning run: each committed group as a file, from which a killed run goes on.

The log is a directory beside the output.  Its manifest says what is being made of what: the
request, the versions, and fingerprints of the model and of the calibration data.  Every group that
is committed becomes a record of its own: what stays of it, its report, and the weights as they were
written.  A run that goes on writes those weights into the dense model and walks through the rest:
nothing is solved twice, and the result is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from osscar.core.errors import FileError, OutputError, RunError
from osscar.core.files import (
    LOCK_FILE,
    PARTIAL,
    STRICT,
    digest,
    hold,
    parse_json,
    read_json,
    reason_of,
    whole,
    write_json,
)
from osscar.core.version import VERSION
from osscar.pruning.request import PruningRequest
from osscar.pruning.result import LayerReport
from osscar.shrinking.plan import GroupPlan

MANIFEST = "log.json"
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
    model, calibration
        SHA-256 of the model's classes, the code of their forward passes, its config and all its
        tensors, and of the calibration data.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.run-log/1"]
    request: dict[str, Any]
    versions: dict[str, str]
    model: str
    calibration: str

    @classmethod
    def of(
        cls, request: PruningRequest, model: nn.Module, batches: Sequence[Mapping[str, Any]]
    ) -> RunManifest:
        """Describe a run; the model is still dense."""
        versions = {name: version(name) for name in ("torch", "transformers")}
        named = (
            (f"{index}.{name}", value)
            for index, batch in enumerate(batches)
            for name, value in batch.items()
        )
        return cls(
            schema="osscar.run-log/1",
            # Through JSON, as it will be read back.
            request=json.loads(json.dumps(request.to_json())),
            versions={**versions, "osscar": VERSION},
            model=_fingerprint(
                [*_described(model), *model.named_buffers(), *model.named_parameters()]
            ),
            calibration=_fingerprint(named),
        )

    def difference(self, other: RunManifest) -> str | None:
        """Say in what the two differ, or None."""
        for name in ("request", "versions"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key in sorted(mine | theirs):
                if mine.get(key) != theirs.get(key):
                    option = key.replace("_", "-")
                    return f"{option} was {theirs.get(key)!r} and is {mine.get(key)!r}"
        if self.model != other.model:
            return "the model's weights are others"
        return None if self.calibration == other.calibration else "the calibration data are others"


def _described(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what makes two models of the same weights compute other things."""
    for name, module in model.named_modules():
        kind = type(module)
        code = getattr(kind.forward, "__code__", None)
        yield f"module {name}", (kind.__qualname__, module.extra_repr(), _instructions(code))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        yield "config", config.to_json_string()


def _instructions(code: CodeType | None) -> tuple[Any, ...]:
    """Return what a function does, in a form that is the same in every process."""
    if code is None:
        return ()
    consts = [_instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return code.co_code.hex(), code.co_names, consts


def _fingerprint(tensors: Any) -> str:
    """Return the SHA-256 of named tensors: their names, formats, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            found.update(repr((name, tensor)).encode())
            continue
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        bytes_: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
        found.update(bytes_)
    return found.hexdigest()


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
        The refitted weights as the model holds them, one matrix (p, m) a consumer.
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
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.directory}: {reason_of(error)}") from error
        with hold(self.directory / LOCK_FILE, self.directory):
            file = self.directory / MANIFEST
            if file.exists():
                before = self._manifest(file)
                difference = manifest.difference(before)
                if difference is not None:
                    raise RunError(
                        f"{self.directory} is the log of another run: {difference}; ask for the "
                        "same to go on, or begin anew with --restart"
                    )
            elif self.committed:
                raise RunError(f"{self.directory} has lost {MANIFEST}; remove it, or change --out")
            else:
                write_json(file, dataclasses.asdict(manifest))
            self._run = digest(json.dumps(dataclasses.asdict(manifest), sort_keys=True))
            yield tuple(self._records())

    @property
    def committed(self) -> int:
        """How many groups have been committed."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        return sum(_RECORD_FILE.fullmatch(name) is not None for name in names)

    def remove(self) -> None:
        """Forget the run; what is none of ours stays.

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
        with hold(self.directory / LOCK_FILE, self.directory):
            for name in names:
                partial = name.startswith(".") and name.endswith(PARTIAL)
                if name == MANIFEST or partial or _RECORD_FILE.fullmatch(name):
                    (self.directory / name).unlink(missing_ok=True)
        (self.directory / LOCK_FILE).unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()

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
        }
        tensors = {str(i): W.contiguous().cpu() for i, W in enumerate(record.weights)}
        with whole(self._place(index)) as partial:
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
            return SiteRecord(words.plan, words.report, weights)
        except (OSError, safetensors.SafetensorError, FileError) as error:
            raise RunError(f"{place} cannot be read: {error}; begin anew with --restart") from error
