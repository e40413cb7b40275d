"""``osscar sweep``: quality against speed, over budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from osscar.base.errors import OptionError
from osscar.base.files import digest, write_text
from osscar.cli.common import check_json_path, document, out, say, way_back, write_json
from osscar.cli.opening import limit_of, opened, quiet, tell_dense
from osscar.cli.options import SweepOptions, asked_with
from osscar.data.batches import Batch, CalibrationData, as_inputs
from osscar.data.text import TextSet
from osscar.evaluation.forward import measure_forward
from osscar.evaluation.quality import score
from osscar.models.loaded import LoadedModel
from osscar.preparation.repeatable import check_repeatable
from osscar.pruning.memory import check_can_stream
from osscar.pruning.result import PruningResult
from osscar.pruning.run_log import run_manifest
from osscar.pruning.sweep import Job, jobs, sweep
from osscar.pruning.sweep_points import Point, SweepDirectory, dense_job, sweep_manifest
from osscar.report.prune_page import budget_line
from osscar.report.run_tables import left_alone_table
from osscar.report.sweep_page import sweep_page, sweep_table
from osscar.request import BudgetKind, PruningRequest
from osscar.shrinking.lineage import Calibration, lineage_of
from osscar.shrinking.plan import Form

PAGE_FILE, DOCUMENT_FILE = "report.html", "sweep.json"


def run(model: str, options: SweepOptions, shared: Any) -> None:
    """Prune to several budgets, and show quality against speed."""
    read = (model, options.calibration, options.weights, options.text, options.images)
    check_json_path(options.json, inputs=(*read, options.inputs), written=(options.out,))
    budget, values = _asked(options)
    points = jobs(budget, values, baselines=options.baselines, allocation=shared.allocation)
    base = asked_with(shared, **{str(budget): points[0].value})
    place = SweepDirectory(options.out)

    def can_stream(loaded: LoadedModel) -> None:
        for job in points:
            check_can_stream(loaded.model, job.request(base))

    with quiet():
        loaded, data = opened(
            model,
            options,
            base.seed,
            can_stream,
            device=base.device,
            dtype=options.dtype,
            max_memory=limit_of(model, options, base),
        )
        scorer = _Scorer.of(loaded, data, options)
        wrapped = as_inputs(loaded.model, data)
        rows = wrapped.batch_size if base.batch_size is None else base.batch_size
        manifest = run_manifest(base, loaded.model, wrapped, rows)
        check_repeatable(loaded.model, wrapped.example(loaded.model))
        sample = wrapped.batches(loaded.model, 1)[0]
        kept = way_back(lambda: f"finished points are kept in {place.directory}")
        with place.begun(sweep_manifest(manifest, budget, scorer.scored)), kept:
            dense = tell_dense(loaded, data)
            found = _measured(place, loaded.model, data, base, points, scorer, sample)
            content: dict[str, Any] = {
                "model": loaded.source,
                "calibration": {**wrapped.settings, **data.describe()},
                "dense": None if dense is None else dataclasses.asdict(dense),
                "scored": scorer.scored,
                "settings": {**base.to_json(), str(budget): None},
                "shapes": {name: list(tensor.shape) for name, tensor in sample.items()},
                "budget": str(budget),
                "points": [_entry(point) for point in found],
                "left_alone": [dataclasses.asdict(group) for group in found[-1].left_alone],
            }
            content = document("sweep", 4, content)
            write_json(place.directory / DOCUMENT_FILE, content)
            write_text(place.directory / PAGE_FILE, sweep_page(content))
    out.print(sweep_table(content))
    if found[-1].left_alone:
        out.print(left_alone_table(content["left_alone"]))
    say(f"report: {place.directory / PAGE_FILE}")
    write_json(options.json, content)


def _entry(point: Point) -> dict[str, Any]:
    entry = dataclasses.asdict(point)
    del entry["schema"], entry["budget"], entry["left_alone"]  # the same for all points
    return entry


def _asked(options: SweepOptions) -> tuple[BudgetKind, tuple[float | int, ...]]:
    """Return the one budget that is given a list, and what is in that.

    Raises
    ------
    OptionError
        If there is none or another, or it is no list of numbers.
    """
    lists = {budget: getattr(options, budget) for budget in BudgetKind}
    given = {budget: text for budget, text in lists.items() if text is not None}
    if len(given) != 1:
        named = [f"--{budget}" for budget in given or BudgetKind]
        raise OptionError(
            f"{' and '.join(named)} are budgets, of which a sweep has one sort; give a list "
            "for one of them"
        )
    ((budget, text),) = given.items()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        counts = budget is BudgetKind.PARAMS and all(part.isdecimal() for part in parts)
        return budget, tuple(map(int if counts else float, parts))
    except ValueError:
        raise OptionError(
            f"--{budget} {text!r:.80} is not a list such as {budget.examples}"
        ) from None


# ---- measuring ---------------------------------------------------------------------------


def _measured(
    place: SweepDirectory,
    dense: nn.Module,
    data: CalibrationData,
    base: PruningRequest,
    points: Sequence[Job],
    scorer: _Scorer,
    sample: Batch,
) -> list[Point]:
    """Return all points, the dense model first; those that were not finished are measured."""
    unpruned = dense_job(points[0].budget)
    if place.point(unpruned) is None:
        place.keep(_point(unpruned, None, dense, scorer, sample))
    todo = [job for job in points if place.point(job) is None]
    for number, (job, result) in enumerate(sweep(dense, data, base, todo), 1):
        place.keep(_point(job, result, dense, scorer, sample))
        say(f"{job}: done, {number} of {len(todo)}")
        if result.budget is not None:
            say(": ".join(budget_line(vars(result.budget))))
    found = (place.point(job) for job in (unpruned, *points))
    return [point for point in found if point is not None]


def _point(
    job: Job, result: PruningResult | None, dense: nn.Module, scorer: _Scorer, sample: Batch
) -> Point:
    """Measure the model of a job; without a result, the dense one."""
    model = dense if result is None else result.model
    forwards = measure_forward([dense] if result is None else [dense, model], sample)
    before, after = forwards[0], forwards[-1]
    budget = None if result is None else result.budget
    return Point(
        "osscar.sweep-point/5",
        job.method,
        str(job.budget),
        job.value,
        limit=None if budget is None else budget.limit,
        reached=None if budget is None else budget.reached,
        **dataclasses.asdict(after),
        form=Form.MODULE if result is None else result.form,
        speedup=before.seconds / after.seconds,
        quality=scorer.score(model),
        divergence=0.0 if result is None else result.divergence,
        predicted=None if budget is None else budget.predicted,
        loss=0.0 if result is None else result.loss,
        prune_seconds=0.0 if result is None else result.seconds,
        widths={} if result is None else {one.name: one.kept for one in result.layers},
        left_alone=() if result is None else result.left_alone,
    )


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Measures quality.

    Parameters
    ----------
    scored
        On what, as JSON-able data.
    measure
        Returns the numbers of a model, as a dataclass; None where there is nothing to score.
    """

    scored: Mapping[str, Any]
    measure: Callable[[Any], Any] | None

    def score(self, model: nn.Module) -> dict[str, Any]:
        """Return the numbers of a model by name."""
        return {} if self.measure is None else dataclasses.asdict(self.measure(model))

    @classmethod
    def of(cls, loaded: LoadedModel, data: CalibrationData, options: SweepOptions) -> _Scorer:
        """Take what the model reads; what calibrated it scores nothing."""
        calibrated = [*lineage_of(loaded.model).calibration, Calibration.of(data.describe())]
        text, images, inputs = options.text, options.images, options.inputs
        how: dict[str, Any] = {"windows": options.windows, "seqlen": options.seqlen}
        found = loaded.held_out(text=text, images=images, inputs=inputs, **how)
        if found is None:
            return cls({"images": None}, None)
        found.refuse_overlap(calibrated)
        if isinstance(found, TextSet):
            given: dict[str, Any] = {"text": text or "builtin", "windows": options.windows}
            given["scored_sha256"] = found.text_digest
        else:
            given = {"images": images} if inputs is None else {"inputs": inputs}
            given["scored_sha256"] = digest("".join(found.fingerprints()))
        dense, classes = loaded.model, loaded.classes
        return cls(given, lambda model: score([model], found, dense=dense, classes=classes)[0])
