"""``osscar sweep``: quality against speed, over budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osscar.cli.common import (
    AllocationOption,
    AtLeastOption,
    BackendOption,
    BatchSizeOption,
    CalibrationOption,
    DampOption,
    DeviceOption,
    DtypeOption,
    ImageSizeOption,
    JsonOption,
    MaxMemoryOption,
    MeanOption,
    ModelArgument,
    NoNormalizeOption,
    RoundToOption,
    SamplesOption,
    SeedOption,
    StdOption,
    StrictOption,
    TrustOption,
    WeightsOption,
    check_json_path,
    document,
    limit_of,
    opened,
    out,
    quiet,
    say,
    stated_preprocessing,
    way_back,
    write_json,
)
from osscar.cli.prune_screen import budget_line, tell_dense

if TYPE_CHECKING:
    from torch import nn

    from osscar.data.batches import Batch, CalibrationData
    from osscar.models.loaded import LoadedModel
    from osscar.pruning.result import PruningResult
    from osscar.pruning.sweep import BudgetKind, Job
    from osscar.pruning.sweep_points import Point, SweepDirectory
    from osscar.request import PruningRequest

PAGE_FILE, DOCUMENT_FILE = "report.html", "sweep.json"


def command(
    model: ModelArgument,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Shares to *remove* of the parameters that heads, neurons and channels own, "
            "separated by commas."
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            help="Or parameters of the model to *keep*: fractions, or counts, separated by commas."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Or shares to *keep* of what its weights take on disk."),
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(help="Or shares of its floating-point operations to *keep*."),
    ] = None,
    speedup: Annotated[
        str | None,
        typer.Option(
            help="Or how many times as fast as the dense model a forward pass of a calibration "
            "batch shall be, timed on this device."
        ),
    ] = None,
    directory: Annotated[
        Path, typer.Option("--out", help="Where the sweep lies, or goes on.")
    ] = Path("osscar-sweep"),
    text: Annotated[
        str | None, typer.Option(help="Plain text to score; by default the built-in held-out text.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Images to score, as for `osscar eval`; without, only divergence is."),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(help="Samples of any other kind to score, as for `osscar eval`."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first N windows; by default the full text.")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also prune with equal shares of every group, each layer by itself, by "
            "`multistage` (the choice of OSSCAR as published), `greedy`, `wanda` and `magnitude`.",
        ),
    ] = False,
    allocation: AllocationOption = "curvature",
    weights: WeightsOption = None,
    calibration: CalibrationOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    image_size: ImageSizeOption = None,
    no_normalize: NoNormalizeOption = False,
    samples: SamplesOption = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in a window, of calibration and scoring.")
    ] = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    round_to: RoundToOption = 1,
    at_least: AtLeastOption = None,
    backend: BackendOption = "local_search",
    damp: DampOption = None,
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_memory: MaxMemoryOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune to several budgets in one run, and show quality against speed.

    Give a list of one sort of budget: --sparsity, --params, --size, --flops or --speedup.  What is
    measured of the dense model serves all of them.  Each point is kept once it is done: the same
    command goes on where it was stopped, and more budgets, or --baselines, extend it.
    """
    from osscar.base.files import write_text
    from osscar.data.batches import as_inputs
    from osscar.preparation.repeatable import check_repeatable
    from osscar.pruning.memory import check_can_stream
    from osscar.pruning.run_log import run_manifest
    from osscar.pruning.sweep import jobs
    from osscar.pruning.sweep_points import SweepDirectory, sweep_manifest
    from osscar.report.run_tables import left_alone_table
    from osscar.report.sweep_page import sweep_page, sweep_table
    from osscar.request import PruningRequest

    read = (model, calibration, weights, text, images, inputs)
    check_json_path(json, inputs=read, written=(directory,))
    budget, values = _asked(
        sparsity=sparsity, params=params, size=size, flops=flops, speedup=speedup
    )
    stated = stated_preprocessing(mean, std, image_size, no_normalize)
    points = jobs(budget, values, baselines=baselines, allocation=allocation)
    first: dict[str, Any] = {str(budget): points[0].value}
    base = PruningRequest(
        **first,
        allocation=allocation,
        round_to=round_to,
        at_least=at_least,
        backend=backend,
        damp=damp,
        device=device,
        batch_size=batch_size,
        seed=seed,
        strict=strict,
    )
    place = SweepDirectory(directory)

    def can_stream(loaded: LoadedModel) -> None:
        for job in points:
            check_can_stream(loaded.model, job.request(base))

    with quiet():
        loaded, data = opened(
            model,
            {"spec": calibration, "samples": samples, "seqlen": seqlen, "seed": seed},
            can_stream,
            weights=weights,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_memory=limit_of(max_memory, model, dtype, device, base),
            preprocessing=stated,
        )
        scorer = _Scorer.of(
            loaded, data, text=text, images=images, inputs=inputs, windows=windows, seqlen=seqlen
        )
        wrapped = as_inputs(loaded.model, data)
        rows = wrapped.batch_size if batch_size is None else batch_size
        run = run_manifest(base, loaded.model, wrapped, rows)
        check_repeatable(loaded.model, wrapped.example(loaded.model))
        manifest = sweep_manifest(run, budget, scorer.scored)
        sample = wrapped.batches(loaded.model, 1)[0]
        with (
            place.begun(manifest),
            way_back(lambda: f"finished points are kept in {place.directory}"),
        ):
            dense = tell_dense(loaded, data)
            found = _measured(place, loaded.model, data, base, points, scorer, sample)
            content = {
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
            content = document("sweep", 3, content)
            write_json(place.directory / DOCUMENT_FILE, content)
            write_text(place.directory / PAGE_FILE, sweep_page(content))
    out.print(sweep_table(content))
    if found[-1].left_alone:
        out.print(left_alone_table(found[-1].left_alone))
    say(f"report: {place.directory / PAGE_FILE}")
    write_json(json, content)


def _entry(point: Point) -> dict[str, Any]:
    entry = dataclasses.asdict(point)
    del entry["schema"], entry["budget"], entry["left_alone"]  # the same for all points
    return entry


def _asked(**lists: str | None) -> tuple[BudgetKind, tuple[float | int, ...]]:
    """Return the one budget that is given a list, and what is in that.

    Raises
    ------
    OptionError
        If there is none or another, or it is no list of numbers.
    """
    from osscar.base.errors import OptionError
    from osscar.pruning.sweep import EXAMPLES, BudgetKind

    given = {BudgetKind(name): text for name, text in lists.items() if text is not None}
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
            f"--{budget} {text!r:.80} is not a list such as {EXAMPLES[budget]}"
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
    from osscar.pruning.sweep import sweep
    from osscar.pruning.sweep_points import dense_job

    unpruned = dense_job(points[0].budget)
    if place.point(unpruned) is None:
        place.keep(_dense_point(unpruned, dense, scorer, sample))
    todo = [job for job in points if place.point(job) is None]
    for number, (job, result) in enumerate(sweep(dense, data, base, todo), 1):
        place.keep(_point(job, result, dense, scorer, sample))
        say(f"{job}: done, {number} of {len(todo)}")
        if result.budget is not None:
            say(budget_line(result.budget))
    found = (place.point(job) for job in (unpruned, *points))
    return [point for point in found if point is not None]


def _dense_point(job: Job, dense: nn.Module, scorer: _Scorer, sample: Batch) -> Point:
    from osscar.evaluation.forward import measure_forward
    from osscar.pruning.sweep_points import Point
    from osscar.shrinking.plan import Form

    (forward,) = measure_forward([dense], sample)
    return Point(
        "osscar.sweep-point/4",
        job.method,
        str(job.budget),
        job.value,
        limit=None,
        reached=None,
        **dataclasses.asdict(forward),
        form=Form.MODULE,
        speedup=1.0,
        quality=scorer.score(dense),
        divergence=0.0,
        predicted=None,
        loss=0.0,
        prune_seconds=0.0,
        widths={},
        left_alone=(),
    )


def _point(
    job: Job, result: PruningResult, dense: nn.Module, scorer: _Scorer, sample: Batch
) -> Point:
    from osscar.evaluation.forward import measure_forward
    from osscar.pruning.sweep_points import Point

    before, after = measure_forward([dense, result.model], sample)
    return Point(
        "osscar.sweep-point/4",
        job.method,
        str(job.budget),
        job.value,
        limit=None if result.budget is None else result.budget.limit,
        reached=None if result.budget is None else result.budget.reached,
        **dataclasses.asdict(after),
        form=result.form,
        speedup=before.seconds / after.seconds,
        quality=scorer.score(result.model),
        divergence=result.divergence,
        predicted=None if result.budget is None else result.budget.predicted,
        loss=result.loss,
        prune_seconds=result.seconds,
        widths={layer.name: layer.kept for layer in result.layers},
        left_alone=result.left_alone,
    )


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Measures quality.

    Parameters
    ----------
    scored
        On what, as JSON-able data.
    score
        Returns the numbers of a model by name.
    """

    scored: Mapping[str, Any]
    score: Callable[[nn.Module], dict[str, Any]]

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        data: CalibrationData,
        *,
        text: str | None,
        images: str | None,
        inputs: str | None,
        windows: int | None,
        seqlen: int | None,
    ) -> _Scorer:
        """Take what the model reads; what calibrated it scores nothing."""
        from osscar.base.files import digest
        from osscar.data.text import TextSet
        from osscar.evaluation.quality import score

        found = loaded.held_out(
            text=text, images=images, inputs=inputs, windows=windows, seqlen=seqlen
        )
        if found is None:
            return cls({"images": None}, lambda _: {})
        found.refuse_overlap(_calibrations(loaded.model, data))

        def numbers(model: nn.Module) -> dict[str, Any]:
            return dataclasses.asdict(
                score([model], found, dense=loaded.model, classes=loaded.classes)[0]
            )

        if isinstance(found, TextSet):
            given = {"text": text or "builtin", "windows": windows}
            return cls({**given, "scored_sha256": found.text_digest}, numbers)
        given = {"images": images} if inputs is None else {"inputs": inputs}
        return cls({**given, "scored_sha256": digest("".join(found.fingerprints()))}, numbers)


def _calibrations(model: nn.Module, data: Any) -> Iterator[Any]:
    """Yield all that the pruned models will have been calibrated on."""
    from osscar.shrinking.lineage import Calibration, lineage_of

    yield from lineage_of(model).calibration
    yield Calibration.of(data.describe())
