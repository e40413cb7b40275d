"""The directory of a sweep: each finished point as a file, from which the same command goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from osscar.base.errors import RunError
from osscar.base.files import resolved
from osscar.base.journal import Journal
from osscar.base.json_files import STRICT
from osscar.preparation.fingerprint import Manifest
from osscar.pruning.sweep import Job
from osscar.pruning.trial import LeftAlone
from osscar.request import BudgetKind
from osscar.shrinking.plan import Form

DENSE = "dense"
"""The method that stands for the model as it is."""

_POINTS = "points"


def dense_job(budget: BudgetKind) -> Job:
    """Return the point of the dense model."""
    return Job(DENSE, budget, budget.dense)


def sweep_manifest(run: Manifest, budget: BudgetKind, scored: Mapping[str, Any]) -> Manifest:
    """Describe what all points of a sweep share.

    Parameters
    ----------
    run
        That of one of its runs.
    budget
        In what the points differ.
    scored
        What quality is measured on.
    """
    varied = {str(kind) for kind in BudgetKind}
    shared = {name: value for name, value in run.asked.items() if name not in varied}
    return Manifest("osscar.sweep-asked/3", {**shared, "budget": str(budget), **scored}, run.dense)


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

    schema: Literal["osscar.sweep-point/5"]
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


class SweepDirectory(Journal[Manifest]):
    """The points of a sweep.

    Parameters
    ----------
    directory
        It was written by a sweep, or is empty, or does not exist.

    Raises
    ------
    RunError
        If it is a file, or holds something else.
    """

    what = "sweep"
    manifest_file = "asked.json"
    schema = Manifest
    done_files = (f"{_POINTS}/*.json",)
    other_files = (_POINTS,)
    error = RunError
    otherwise = "give another --out"

    def __init__(self, directory: Path) -> None:
        super().__init__(resolved(directory))
        self.refuse_foreign()

    @contextmanager
    def begun(self, manifest: Manifest) -> Iterator[None]:
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
        with self.held():
            self.begin(manifest)
            self.make(_POINTS)
            yield

    def point(self, job: Job) -> Point | None:
        """Return a point that was finished; None if it was not.

        Raises
        ------
        RunError
            If its file cannot be read, or is of another point.
        """
        again = "remove it, and it is measured again"
        point = self.read(_file(job), Point, otherwise=again)
        if point is not None and (point.method, point.budget, point.value) != (
            (job.method, job.budget, job.value)
        ):
            raise RunError(f"{self.directory / _file(job)} holds another point; {again}")
        return point

    def keep(self, point: Point) -> None:
        """Keep a point.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        self.write(_file(Job(point.method, BudgetKind(point.budget), point.value)), point)


def _file(job: Job) -> str:
    return f"{_POINTS}/{job.method}-{job.budget}-{job.value!r}.json"
