"""The directory of a sweep: each finished point as a file, from which the same command goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from osscar.base.errors import FileError, OutputError, RunError
from osscar.base.files import reason_of, resolved, write_json
from osscar.base.json_files import STRICT, read_json
from osscar.base.locks import LOCK_FILE, file_lock
from osscar.preparation.fingerprint import Fingerprint
from osscar.pruning.run_log import RunManifest
from osscar.pruning.sweep import BudgetKind, Job
from osscar.pruning.trial import LeftAlone
from osscar.shrinking.plan import Form

DENSE = "dense"
"""The method that stands for the model as it is."""

_MANIFEST = "asked.json"
_POINTS = "points"
_VARIED = frozenset(map(str, BudgetKind))
"""Of the request, what differs from point to point."""


def dense_job(budget: BudgetKind) -> Job:
    """Return the point of the dense model."""
    return Job(DENSE, budget, budget.dense)


@dataclass(frozen=True)
class SweepManifest:
    """What all points of a sweep share; they go together only where all of it is the same.

    Parameters
    ----------
    schema
        What this is, and in which version.
    asked
        The request without its budget, which budget that is, the versions, and what is scored.
    dense
        What tells the dense model and the calibration data from others.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.sweep-asked/2"]
    asked: dict[str, Any]
    dense: Fingerprint

    @classmethod
    def of(cls, run: RunManifest, budget: BudgetKind, scored: Mapping[str, Any]) -> SweepManifest:
        """Describe a sweep by the manifest of one of its runs, its budget, and what is scored."""
        request = {name: value for name, value in run.request.items() if name not in _VARIED}
        asked = {**request, "budget": str(budget), **run.versions, **scored}
        return cls("osscar.sweep-asked/2", asked, run.dense)

    def difference(self, before: SweepManifest) -> str | None:
        """Say in what it differs from an earlier one, or None."""
        for name in sorted(self.asked | before.asked):
            mine, theirs = self.asked.get(name), before.asked.get(name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} was {theirs!r:.80} and is {mine!r:.80}"
        return self.dense.difference(before.dense)


@dataclass(frozen=True)
class Point:
    """What became of the model at one budget by one method.

    Parameters
    ----------
    schema
        What this is, and in which version.
    method, budget, value
        The job.
    limit, reached
        What the whole model might cost, and what it does, in what the budget is counted in; None of
        the dense model.
    parameters, parameter_bytes, flops
        What the model takes, operations for one sample.
    form
        What became smaller; the dense model has the form of its modules.
    seconds, speedup
        Median time of a forward pass of one sample, and that of the dense model over it, timed in
        turns.
    quality
        What was scored, by the names that evaluations have for it; empty without data to score.
    divergence, predicted
        Measured and predicted divergence from the dense predictions, in nats; None where unknown.
    loss
        Sum of the relative losses of all layers.
    prune_seconds
        Wall time of the pruning, without what the points share.
    widths
        How many units each group keeps that lost some.
    left_alone
        The groups that were to be pruned and cannot follow.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.sweep-point/4"]
    method: str
    budget: str
    value: float | int
    limit: float | None
    reached: float | None
    parameters: int
    parameter_bytes: int
    flops: int
    form: Form
    seconds: float
    speedup: float
    quality: dict[str, int | float | str | dict[str, float | None] | None]
    divergence: float | None
    predicted: float | None
    loss: float
    prune_seconds: float
    widths: dict[str, int]
    left_alone: tuple[LeftAlone, ...]


class SweepDirectory:
    """Where a sweep lies.

    Parameters
    ----------
    directory
        It exists and was written by a sweep, or is empty, or does not exist.

    Raises
    ------
    OutputError
        If it is a file, or holds something else.
    """

    def __init__(self, directory: Path) -> None:
        self.path = resolved(directory)
        try:
            if self.path.exists() and not self.path.is_dir():
                raise OutputError(f"{self.path} is a file; give a directory")
            names = [file.name for file in self.path.iterdir()] if self.path.is_dir() else []
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {reason_of(error)}") from error
        if set(names) - {LOCK_FILE} and _MANIFEST not in names:
            raise OutputError(
                f"{self.path} holds something other than a sweep ({sorted(names)[0]!r}); give "
                "another directory"
            )

    @contextmanager
    def begun(self, manifest: SweepManifest) -> Iterator[None]:
        """Begin a sweep, or go on with one, and hold its lock while the block runs.

        Raises
        ------
        RunError
            If the directory holds points of something else.
        BusyError
            If another process is at work in it.
        OutputError
            If it cannot be written.
        """
        try:
            (self.path / _POINTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {reason_of(error)}") from error
        with file_lock(self.path / LOCK_FILE, self.path):
            file = self.path / _MANIFEST
            if file.exists():
                difference = manifest.difference(self._read(file, SweepManifest))
                if difference is not None:
                    raise RunError(
                        f"{self.path} holds another sweep: {difference}; ask for the same to go "
                        "on, or give another directory"
                    )
            else:
                write_json(file, dataclasses.asdict(manifest))
            yield

    def point(self, job: Job) -> Point | None:
        """Return a point that was finished; None if it was not.

        Raises
        ------
        RunError
            If its file cannot be read, or is of another point.
        """
        file = self._file(job)
        if not file.exists():
            return None
        point: Point = self._read(file, Point)
        if (point.method, point.budget, point.value) != (job.method, job.budget, job.value):
            raise RunError(f"{file} holds another point; remove it, and it is measured again")
        return point

    def write(self, point: Point) -> None:
        """Keep a point.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        job = Job(point.method, BudgetKind(point.budget), point.value)
        write_json(self._file(job), dataclasses.asdict(point))

    def _file(self, job: Job) -> Path:
        return self.path / _POINTS / f"{job.method}-{job.budget}-{job.value!r}.json"

    def _read(self, file: Path, schema: type[Any]) -> Any:
        try:
            return read_json(file, schema)
        except FileError as error:
            raise RunError(f"{error}; remove it, or give another directory") from error
