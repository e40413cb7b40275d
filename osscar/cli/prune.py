"""``osscar prune``: from a model to a smaller one on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osscar.base.printable import command_line
from osscar.base.timing import Profile, Stage, profiled, timed
from osscar.cli.common import (
    AllocationOption,
    AtLeastOption,
    BackendOption,
    BackendOptionsOption,
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
    SeqlenOption,
    StdOption,
    StrictOption,
    TrustOption,
    WeightsOption,
    check_json_path,
    given_options,
    limit_of,
    opened,
    parse_options,
    quiet,
    say,
    say_next,
    stated_preprocessing,
    way_back,
    write_json,
)
from osscar.cli.estimates import dry_run, read_estimate, where_it_runs
from osscar.cli.prune_screen import print_result, report_document, tell_dense

if TYPE_CHECKING:
    from osscar.base.ranks import Ranks
    from osscar.checkpoint.directory import SavedCheckpoint
    from osscar.data.batches import CalibrationData
    from osscar.models.loaded import LoadedModel
    from osscar.pruning.run_log import RunLog


def _with_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command run on all ranks of a launch, which it finds as the context's object."""

    @functools.wraps(command)
    def on_each_rank(context: typer.Context, **options: Any) -> None:
        with profiled() as spent:
            with timed(Stage.START):
                from osscar.base.ranks import together
            with together() as ranks:
                context.obj = Asked(ranks, spent)
                command(context, **options)

    return on_each_rank


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command finds as the context's object.

    Parameters
    ----------
    ranks
        The processes of a launch.
    spent
        What this one has spent since its command began.
    """

    ranks: Ranks
    spent: Profile


@_with_ranks
def command(
    context: typer.Context,
    model: ModelArgument,
    directory: Annotated[
        Path | None, typer.Option("--out", help="Where the smaller model goes.  [required]")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Budget: the share to *remove* of the parameters that heads, neurons and channels "
            "own."
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(help="Budget: parameters of the model to *keep*, a fraction or a count."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Budget: what the saved weights may take on disk, such as 200MB, or a fraction of "
            "the dense model's."
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(help="Budget: the share of its floating-point operations to *keep*."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Budget: how many times as fast as the dense model a forward pass of a "
            "calibration batch shall be, timed on this device."
        ),
    ] = None,
    allocation: AllocationOption = "curvature",
    heads: Annotated[
        str | None, typer.Option(help="Heads to *keep*: a fraction (0.7, 2/3) or a count.")
    ] = None,
    neurons: Annotated[
        str | None, typer.Option(help="Neurons to *keep*: a fraction (0.7, 2/3) or a count.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Channels to *keep*: a fraction (0.7, 2/3) or a count.")
    ] = None,
    residual: Annotated[
        str | None,
        typer.Option(
            help="Channels of residual streams to *keep*: they run through many blocks, and "
            "nothing else touches them."
        ),
    ] = None,
    round_to: RoundToOption = 1,
    at_least: AtLeastOption = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave the groups of these names alone, whatever else is asked: `*` and `?` stand "
            "for any text, a comma parts patterns; repeatable. `osscar inspect` lists the names.",
        ),
    ] = None,
    weights: WeightsOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Code that builds the dense model, where MODEL is a directory that holds a pruned "
            "model of your own code."
        ),
    ] = None,
    calibration: CalibrationOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    image_size: ImageSizeOption = None,
    no_normalize: NoNormalizeOption = False,
    samples: SamplesOption = None,
    seqlen: SeqlenOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    backend: BackendOption = "local_search",
    option: BackendOptionsOption = None,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify",
            help="Bound and verify every layer, so its gap is known: up to 32 units by branch and "
            "bound (10 s a group at most), which mostly proves what the best choice is, and "
            "beyond by the relaxation.",
        ),
    ] = False,
    damp: DampOption = None,
    target: Annotated[
        str,
        typer.Option(
            help="What a layer is to reproduce: what its dense `weights` make of its inputs, its "
            "`outputs` in the dense model, or also the `residual` stream."
        ),
    ] = "residual",
    blend: Annotated[
        float | None,
        typer.Option(
            help="How much of what --target adds to `weights` counts, 0 to 1; by default samples "
            "that are held out choose it for each layer."
        ),
    ] = None,
    batch_norm: Annotated[
        str,
        typer.Option(
            help="Batch-norm statistics: `correct` those of the dense model by what pruning "
            "changed, `estimate` them from the calibration images, or `keep` them."
        ),
    ] = "correct",
    form: Annotated[
        str,
        typer.Option(
            help="What becomes smaller: `module`, the model's own modules; `graph`, its exported "
            "program, which follows where their code cannot; `auto`, the modules, and the program "
            "where more can follow there."
        ),
    ] = "auto",
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_memory: MaxMemoryOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the checkpoint that is there.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew where a run that was killed would go on.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Also write the page that lies in the output directory as `report.html` here.",
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Tell what the run will take, stage by stage, and write nothing but --json FILE: "
            "time, memory and disk, from few samples and one layer of each class.",
        ),
    ] = False,
    estimate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What --dry-run --json wrote of this run: say in the end how far off it was.",
        ),
    ] = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune a model in one shot, prove the result, and save it.

    Give a budget (--sparsity, --params, --size, --flops or --speedup), which heads, neurons and
    channels of all layers share so that the model's outputs change least, or say with --heads,
    --neurons and --channels what every layer keeps of each.  Under grouped-query attention a head
    is a key-value head with its query heads.  What is done is kept in OUT.run until the smaller
    model is saved: a run that was killed goes on when the same command is given again.
    """
    with timed(Stage.START):
        from osscar.base.devices import resolve_device
        from osscar.base.errors import OptionError
        from osscar.base.files import resolved
        from osscar.checkpoint.directory import check_output, weight_bytes
        from osscar.checkpoint.manifest import PAGE_FILE
        from osscar.offload.device_memory import memory_of
        from osscar.offload.on_disk import is_on_disk
        from osscar.pruning.prune import prune_as_asked
        from osscar.pruning.run_log import RunLog
        from osscar.report.estimate_tables import comparison_line
        from osscar.report.prune_page import prune_page
        from osscar.request import PruningRequest

    if directory is None and not dry:
        raise typer.BadParameter(
            "give the directory that the smaller model goes to", param_hint="--out"
        )
    asked: Asked = context.obj
    ranks, spent = asked.ranks, asked.spent
    if dry and (estimate is not None or not ranks.alone):
        raise OptionError(
            "--dry-run tells what one process will take; leave --estimate and torchrun away"
        )
    read = (model, calibration, weights, estimate)
    check_json_path(json, inputs=read, written=(directory,))
    check_json_path(report, inputs=read, written=(directory, json), option="--report")
    stated = stated_preprocessing(mean, std, image_size, no_normalize)
    patterns = [part.strip() for text in skip or () for part in text.split(",")]
    request = PruningRequest(
        sparsity=sparsity,
        params=params,
        size=size,
        flops=flops,
        speedup=speedup,
        allocation=allocation,
        heads=heads,
        neurons=neurons,
        channels=channels,
        residual=residual,
        round_to=round_to,
        at_least=at_least,
        skip=patterns,
        backend=backend,
        backend_options=parse_options(option or []),
        certify=certify,
        damp=damp,
        target=target,
        blend=blend,
        batch_norm=batch_norm,
        device=device,
        batch_size=batch_size,
        seed=seed,
        form=form,
        strict=strict,
    )

    def loading(path: Path | None) -> tuple[LoadedModel, CalibrationData]:
        def room(loaded: LoadedModel) -> None:
            if path is not None and ranks.first:
                needed = weight_bytes(loaded.model, loaded.stored_dtype)
                check_output(path, overwrite=overwrite, needed_bytes=needed)

        with timed(Stage.LOAD):
            return opened(
                model,
                {"spec": calibration, "samples": samples, "seqlen": seqlen, "seed": seed},
                room,
                says=ranks.first,
                weights=weights,
                dense=against,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                max_memory=limit_of(max_memory, model, dtype, device, request),
                preprocessing=stated,
            )

    if directory is None or dry:
        with quiet():
            dry_run(*loading(None), request, spent.seconds, json)
        return
    told = read_estimate(estimate)
    path = resolved(directory)
    log, words = RunLog(_beside(path)), _asked(context)
    if ranks.broadcast(
        "whether it is saved already",
        lambda: not (overwrite or restart) and _is_saved(path, log, words, json, report),
    ):
        return
    if ranks.first:
        check_output(path, overwrite=overwrite, inputs=(*read, json, report))
    with way_back(lambda: log.kept), log.held() if ranks.first else nullcontext(), quiet():
        if restart and ranks.first:
            log.remove()
        loaded, data = loading(path)
        if told is not None:
            place = where_it_runs(loaded.model, device)
            told.check_for(
                {"model": loaded.source, **request.to_json(), **data.describe(), **place}
            )
        score = tell_dense(loaded, data) if ranks.first else None
        own_log = log if ranks.first else None
        result = prune_as_asked(loaded.model, data, request, own_log, ranks)
        if not ranks.first:
            return  # the first alone writes and prints
        with timed(Stage.REPORT):
            content = report_document(
                result, loaded.model, loaded.source, data, loaded.classes, score
            )
        if told is not None:
            peak = memory_of(resolve_device(device)).peak()
            content["estimate"] = told.against(spent.seconds, peak)
        log.note(words, content)
        tokenizer = loaded.tokenizer
        fits = not is_on_disk(loaded.model)
        del loaded  # saving holds the smaller model twice, and needs no dense one beside
        with timed(Stage.SAVE):
            saved = result.save(
                path,
                tokenizer=tokenizer,
                report=content,
                page=prune_page(content),
                overwrite=overwrite,
            )
        _write_copies(content, saved, json, report)
        log.remove()
    print_result(result, saved)
    if told is not None:
        peak = memory_of(resolve_device(device)).peak()
        say(comparison_line(told.against(spent.seconds, peak)))
    say(f"report: {saved.path / PAGE_FILE}")
    if result.form == "graph" and tokenizer is not None:
        return  # a program cannot generate, which is part of what text is scored with
    if score is not None and score.reason:
        return  # what keeps the dense model from being scored would keep the smaller one
    say_next(_to_evaluate(context, _to_score(data), fits))


_AS_OPENED = ("weights", "seqlen", "device", "dtype", "trust_remote_code")
"""Options of `osscar prune` without which `osscar eval` would open or score another model."""


def _to_score(data: CalibrationData) -> dict[str, str]:
    """Return the option of `osscar eval` for data like those of calibration."""
    from osscar.data.images import ImageSet
    from osscar.data.tensors import TensorSet

    if isinstance(data, TensorSet):
        return {"inputs": "FILE"}
    return {"images": "PATH"} if isinstance(data, ImageSet) else {"text": "FILE"}


def _to_evaluate(context: typer.Context, scored: Mapping[str, str], fits: bool) -> str:
    """Return the command that compares what was written with the dense model, if that fits."""
    asked, options = context.params, dict(scored)
    if fits:
        options["against"] = asked["against"] or asked["model"]
    if asked["against"] is not None:
        options["weights"] = "FILE"  # of the dense model, of which this run has read none
    options |= given_options(context, _AS_OPENED)
    return command_line("osscar", "eval", asked["directory"], options=options)


_OF_THIS_TIME = (
    *("directory", "max_memory", "overwrite", "restart", "json", "report"),
    *("estimate", "dry"),
)
"""Parameters that change nothing of what is saved."""


def _asked(context: typer.Context) -> dict[str, str]:
    """Return how a run was asked for, as its log keeps it."""
    return {name: str(v) for name, v in context.params.items() if name not in _OF_THIS_TIME}


def _write_copies(
    content: Mapping[str, Any], saved: SavedCheckpoint, json: Path | None, report: Path | None
) -> None:
    """Write what a run is asked to write beside its output."""
    from osscar.base.files import write_text
    from osscar.report.prune_page import prune_page

    write_json(json, {**content, "saved": _saved(saved)})
    if report is not None:
        write_text(report, prune_page(content))


def _is_saved(
    path: Path, log: RunLog, asked: dict[str, str], json: Path | None, report: Path | None
) -> bool:
    """Finish a run that was ended after its save, while it removed its log; whether it was."""
    from osscar.checkpoint.directory import describe
    from osscar.checkpoint.manifest import REPORT_FILE
    from osscar.checkpoint.runs import recover

    if log.saved(asked, path / REPORT_FILE) is None:
        return False
    with log.held():
        content = log.saved(asked, path / REPORT_FILE)
        if content is None:
            return False
        recover(path)
        saved = describe(path)
        _write_copies(content, saved, json, report)
        log.remove()
    say(f"saved: {saved.path}, before this run began, by one that was ended just then")
    return True


def _beside(path: Path) -> Path:
    """Return where the log of a run lies: beside its output, or in it if nothing can be there."""
    from osscar.checkpoint.runs import cannot_move, prefix

    return path / f"{prefix(path)}log" if cannot_move(path) else path.with_name(f"{path.name}.run")


def _saved(saved: SavedCheckpoint) -> dict[str, Any]:
    return {**dataclasses.asdict(saved), "path": str(saved.path)}
