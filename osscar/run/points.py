"""The points of a sweep: one model pruned to several budgets, and the directory of the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config
from torch import nn

from osscar.allocation.task import SkippedGroup
from osscar.base.files import resolved
from osscar.base.json_files import STRICT
from osscar.base.printable import are, pluralize
from osscar.distance.distance import Compared
from osscar.preparation.journal import Journal, JournalManifest
from osscar.proof.plan import Form
from osscar.request import BudgetKind, PruningRequest
from osscar.run.chain import prepare, prune_prepared
from osscar.run.jobs import SweepJob
from osscar.run.result import PruningResult


def prune_points(
    model: nn.Module,
    calibration: Any,
    base: PruningRequest,
    points: Sequence[SweepJob],
    tell: Callable[[str], None] = lambda line: None,
    done: Collection[SweepJob] = (),
) -> Generator[tuple[SweepJob, PruningResult]]:
    """Prune a model once for each point that is not `done`, one after the other.

    The given model is not changed.  It is traced, tried and run dense once; loss curves are
    measured once, too, at the widths of all points, so that a sweep which goes on has the same.
    Divergences are all measured on the samples that the base request holds out; baselines whose
    damping is given hold out none, and are fitted to these as well.
    """
    if all(job in done for job in points):
        return
    requests = [job.request(base) for job in points]
    with prepare(model, calibration, base, others=requests, tell=tell) as prepared:
        for job, request in zip(points, requests, strict=True):
            if job in done:
                continue

            def tell_of(line: str, job: SweepJob = job) -> None:
                tell(f"{job}: {line}")

            yield job, prune_prepared(dataclasses.replace(prepared, tell=tell_of), request)


_POINTS = "points"


def sweep_manifest(
    run: JournalManifest,
    budget: BudgetKind,
    scored: Mapping[str, Any],
) -> JournalManifest:
    """Describe what all points of a sweep share."""
    shared = {name: value for name, value in run.asked.items() if name != budget}
    asked = {**shared, "budget": str(budget), **scored}
    return JournalManifest("osscar.sweep-asked/3", asked, run.dense)


Quality = dict[str, int | float | str | dict[str, float | None] | None]


@with_config(STRICT)
@dataclass(frozen=True)
class SweepPoint:
    """What became of the model at one budget by one method, as ``docs/json.md`` describes it.

    `stages` are the seconds since the point before, so that the first point of a run has what its
    points share.

    method: ``dense``, ``measured``, ``uniform``, or the backend of a baseline.
    value: Of the budget.
    limit, reached: What the budget allowed, and what came out.
    flops: Of one sample.
    seconds: Of a forward pass, median.
    seconds_between: Its quartiles.
    speedup: Over the dense model.
    distance, divergence, agreement, predicted: As in a document of one run.
    loss: Summed relative loss of the layers.
    prune_seconds: Of pruning.
    widths: Units kept, by group.
    """

    schema: Literal["osscar.sweep-point/10"]
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
    seconds_between: list[float]
    speedup: float
    quality: Quality
    distance: Compared | None
    divergence: float | None
    agreement: float | None
    predicted: float | None
    loss: float
    prune_seconds: float
    widths: dict[str, int]
    skipped: tuple[SkippedGroup, ...]
    stages: dict[str, float] = field(default_factory=dict)


class SweepDirectory(Journal):
    """The points of a sweep, in a directory of its own."""

    what = "sweep"
    manifest_file = "asked.json"
    done_files = (f"{_POINTS}/*.json",)
    other_files = (_POINTS,)
    otherwise = "give another directory (`--out`)"

    def __init__(self, directory: Path) -> None:
        super().__init__(resolved(directory))
        self.refuse_foreign()

    @contextmanager
    def begun(self, manifest: JournalManifest) -> Iterator[None]:
        """Begin a sweep, or go on with one, and hold its lock while the block runs."""
        with self.locked():
            self.begin(manifest)
            self.make(_POINTS)
            yield

    @property
    def kept(self) -> str:
        """What a sweep that ends now leaves, in words."""
        points = len(self.done)
        where = f"kept in {self.directory}"
        return f"{pluralize(points, 'point')} {are(points)} {where}" if points else ""

    def point(self, job: SweepJob) -> SweepPoint | None:
        """Return a point; None if it is not finished."""
        again = "remove it, and it is measured again"
        return self.read(_file(job), SweepPoint, otherwise=again)

    def keep(self, point: SweepPoint) -> None:
        """Keep a point."""
        self.write(_file(SweepJob(point.method, BudgetKind(point.budget), point.value)), point)


def _file(job: SweepJob) -> str:
    return f"{_POINTS}/{job.method}-{job.budget}-{job.value!r}.json"
