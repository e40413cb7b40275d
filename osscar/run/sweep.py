"""A sweep from budgets to its page: each point is pruned, measured, kept, and shown."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import with_config
from torch import nn

from osscar import __version__
from osscar.allocation.task import SkippedGroup
from osscar.base.devices import default_torch
from osscar.base.errors import DataError, OptionError
from osscar.base.files import digest, resolved, write_json, write_text
from osscar.base.json_files import STRICT
from osscar.base.printable import pluralize, published
from osscar.base.timing import Stage, profiled, progress_bar, timed
from osscar.data.batches import as_inputs
from osscar.data.images import ImageSet
from osscar.data.loaders import read_once
from osscar.data.reader import Batch
from osscar.data.samples import SampleSet
from osscar.data.text import TextSet
from osscar.distance.distance import Compared
from osscar.evaluation.quality import score as score_quality
from osscar.evaluation.speed import measure_forward
from osscar.preparation.failures import check_repeatable
from osscar.preparation.journal import Journal, JournalManifest
from osscar.proof.lineage import data_record, lineage_of
from osscar.proof.plan import Form
from osscar.proof.seen import Calibration, refuse_overlap
from osscar.report.sections import Section
from osscar.report.shown import Shown
from osscar.request import BudgetKind, PruningRequest
from osscar.run.chain import prepare, prune_prepared
from osscar.run.jobs import SweepJob, jobs, refuse_targets
from osscar.run.memory import check_can_stream
from osscar.run.prune_page import budget_facts
from osscar.run.result import PruningResult
from osscar.run.run_log import run_manifest
from osscar.run.sweep_page import sections, sweep_page


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
    return JournalManifest("osscar.sweep-asked/5", asked, run.dense)


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
    prune_seconds: Of pruning.
    widths: Units kept, by group.
    """

    method: str
    value: float
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
    prune_seconds: float
    widths: dict[str, int]
    skipped: tuple[SkippedGroup, ...]
    stages: dict[str, float] = field(default_factory=dict)


class SweepDirectory(Journal):
    """The points of a sweep, in a directory of its own."""

    what, part = "sweep", "point"
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

    def point(self, job: SweepJob) -> SweepPoint | None:
        """Return a point; None if it is not finished."""
        again = "remove it, and it is measured again"
        return self.read(_file(job), SweepPoint, otherwise=again)

    def keep(self, job: SweepJob, point: SweepPoint) -> None:
        """Keep a point."""
        self.write(_file(job), point)


def _file(job: SweepJob) -> str:
    return f"{_POINTS}/{job.method}-{job.budget}-{job.value!r}.json"


# ---- sweeps ------------------------------------------------------------------------------


PAGE_FILE, _DOCUMENT_FILE = "report.html", "sweep.json"


class SweepResult(Shown, dict[str, Any]):
    """What ``sweep.json`` holds, as ``docs/json.md`` describes it."""

    def sections(self) -> Iterator[Section]:
        """Return what its page shows."""
        return sections(self)

    def __repr__(self) -> str:
        points = pluralize(len(self["points"]), "point")
        return f"SweepResult({self['model']!r}, {points} over {self['budget']})"


@default_torch()
def sweep(
    model: nn.Module,
    calibration: Any,
    out: str | os.PathLike[str],
    *,
    score: TextSet | SampleSet | None = None,
    baselines: bool = False,
    **asked: Any,
) -> SweepResult:
    """Prune to several budgets, and show quality against speed on a page.

    Each point is kept once it is done: the same call goes on where it was stopped, and more
    values, or `baselines`, extend the sweep.  Pruned models are not kept.

    Parameters
    ----------
    model, calibration
        As `osscar.prune` takes them; the model is not changed.
    out
        The directory: ``report.html`` shows every point, ``sweep.json`` holds the numbers, and
        ``points/`` what is done.
    score
        Held-out data that quality is measured on; without any, only divergence is.
    baselines
        Whether also to prune with equal shares of every group, each layer by itself, by
        ``multistage``, ``greedy``, ``wanda`` and ``magnitude``.
    asked
        Fields of `osscar.PruningRequest`, of which one budget is a list: ``sparsity=[0.1, 0.2]``.
        Other budgets hold at every point.

    Returns
    -------
    SweepResult
        A dictionary of what ``sweep.json`` holds, as ``docs/json.md`` describes it.

    Raises
    ------
    OsscarError
        What `osscar.prune` and `osscar.evaluate` raise; OptionError if no budget is a list.
    JournalError
        If the directory holds something else, or a sweep of something else.
    """
    lists = [kind for kind in BudgetKind if isinstance(asked.get(kind), list | tuple)]
    if len(lists) != 1:
        raise OptionError("a sweep has one list of budgets; give one, such as sparsity=[0.1, 0.2]")
    [budget] = lists
    place = Path(out)
    score = None if score is None else read_once(model, score, whole=True)
    if not isinstance(score, TextSet | SampleSet | None):
        raise DataError(
            f"the data to score are a {type(score).__name__}; give what osscar.load_text, "
            "osscar.load_images, osscar.load_tensors or osscar.load_batches returns"
        )
    allocation = asked.get("allocation", "measured")
    points = jobs(budget, asked[budget], baselines=baselines, allocation=allocation)
    refuse_targets(asked)
    base = PruningRequest(**{**asked, str(budget): points[0].value})
    return Sweep(SweepDirectory(place), base, points, score).run(model, calibration)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The requests of a sweep, and its directory."""

    place: SweepDirectory
    base: PruningRequest
    points: Sequence[SweepJob]
    score: TextSet | SampleSet | None
    tell: Callable[[str], None] = lambda line: None

    def run(
        self,
        model: nn.Module,
        calibration: Any,
        *,
        source: str | None = None,
    ) -> SweepResult:
        """Measure what is not done yet, write the page, and return the document."""
        check_can_stream(model, self.base)
        calibration = read_once(model, calibration)
        data = as_inputs(model, calibration)
        told = data_record(calibration)
        lineage = lineage_of(model)
        if self.score is not None:
            known = [Calibration.of(told)] if told else []
            refuse_overlap(self.score, [*lineage.calibration, *known])
        budget, scored = self.points[0].budget, _scored(self.score)
        run = run_manifest(self.base, model, data)
        manifest = sweep_manifest(run, budget, scored)
        check_repeatable(model, data.example())
        sample = data.first()
        with self.place.begun(manifest):
            found = self._measured(model, calibration, sample)
            entries = [dataclasses.asdict(point) for point in found]
            for entry in entries:
                del entry["skipped"]  # the same for all points
            document = {
                "schema": "osscar.sweep/8",
                "osscar_version": __version__,
                "model": published(source or "") or lineage.source or type(model).__name__,
                "calibration": {**data.settings, **told},
                "scored": scored,
                "settings": {**self.base.to_json(), str(budget): None},
                "shapes": {name: list(tensor.shape) for name, tensor in sample.items()},
                "budget": str(budget),
                "points": entries,
                "skipped": [dataclasses.asdict(group) for group in found[-1].skipped],
            }
            write_json(self.place.directory / _DOCUMENT_FILE, document)
            write_text(self.place.directory / PAGE_FILE, sweep_page(document))
        return SweepResult(document)

    def _measured(self, dense: nn.Module, calibration: Any, sample: Batch) -> list[SweepPoint]:
        """Return all points, the dense model first; those that are not finished are measured."""
        budget = self.points[0].budget
        every = (SweepJob("dense", budget, budget.dense), *self.points)
        todo = [job for job in every if self.place.point(job) is None]
        pruned = [job for job in todo if job is not every[0]]
        done = [job for job in self.points if job not in todo]
        pruning = prune_points(dense, calibration, self.base, self.points, self.tell, done)
        with progress_bar("sweep", total=len(pruned)) as bar, closing(pruning) as results:
            for job in todo:
                began = time.perf_counter()
                with profiled() as spent:
                    result = next(results)[1] if job in pruned else None
                    point = self._point(job, result, dense, sample)
                stages = spent.of(time.perf_counter() - began)
                self.place.keep(job, dataclasses.replace(point, stages=stages))
                if result is None:
                    continue
                self.tell(f"{job}: done, {pruned.index(job) + 1} of {len(pruned)}")
                if result.budget is not None:
                    for fact in budget_facts([*map(vars, result.budget.limits)]):
                        self.tell(": ".join(fact))
                bar.advance()
        return [one for job in every if (one := self.place.point(job)) is not None]

    def _point(
        self,
        job: SweepJob,
        result: PruningResult | None,
        dense: nn.Module,
        sample: Batch,
    ) -> SweepPoint:
        """Measure the model of a job; without a result, the dense one."""
        model, quality = dense if result is None else result.model, dict[str, Any]()
        with timed(Stage.FORWARD):
            forwards = measure_forward([dense] if result is None else [dense, model], sample)
        if self.score is not None:
            with timed(Stage.SCORE):
                (one,) = score_quality([model], self.score, dense=dense)
                quality = dataclasses.asdict(one)
        before, after = forwards[0], forwards[-1]
        budget = None if result is None else result.budget
        limit = None if budget is None else budget.of(job.budget)
        return SweepPoint(
            job.method,
            job.value,
            limit=None if limit is None else limit.limit,
            reached=None if limit is None else limit.reached,
            **after,
            form=Form.EAGER if result is None else result.form,
            speedup=before["seconds"] / after["seconds"],
            quality=quality,
            distance=None if result is None else result.distance,
            divergence=0.0 if result is None else result.divergence,
            agreement=1.0 if result is None else result.agreement,
            predicted=None if budget is None else budget.predicted,
            prune_seconds=0.0 if result is None else result.seconds,
            widths={} if result is None else {one.name: one.kept for one in result.layers},
            skipped=() if result is None else result.skipped,
        )


def _scored(score: TextSet | SampleSet | None) -> dict[str, Any]:
    """Return what quality is measured on, as JSON-able data."""
    if score is None:
        return {"images": None}
    if isinstance(score, TextSet):
        given: dict[str, Any] = {"text": published(score.source), "windows": score.windows}
        return {**given, "seqlen": score.seqlen, "scored_sha256": digest(score.text)}
    what = "images" if isinstance(score, ImageSet) else "inputs"
    return {what: published(score.source), "scored_sha256": digest(repr(score.fingerprints()))}
