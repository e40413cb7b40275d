"""``osscar gap``: how far from optimal selections are, problem by problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osscar.cli.common import (
    CalibrationOption,
    ImageSizeOption,
    JsonOption,
    MeanOption,
    NoNormalizeOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    StdOption,
    TrustOption,
    WeightsOption,
    check_input,
    check_json_path,
    document,
    opened,
    out,
    quiet,
    say,
    stated_preprocessing,
    way_back,
    write_json,
)

if TYPE_CHECKING:
    from torch import nn

    from osscar.data.preprocessing import Preprocessing
    from osscar.report.summary import Summary
    from osscar.study.directory import Study
    from solvers import SubsetProblem

_PROBLEM_SUFFIXES = (".npz", ".safetensors")
_OF_MODELS = (
    *("groups", "query_heads", "calibration", "samples", "seqlen", "damp"),
    *("weights", "device", "trust_remote_code"),
    *("mean", "std", "image_size", "no_normalize"),
)
"""Parameters that say how a model's problems are posed, and mean nothing to problem files."""


def command(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_PROBLEM...",
            help="One model as for `osscar prune`, or problem files (.npz, .safetensors).",
        ),
    ],
    directory: Annotated[Path, typer.Option("--out", help="Where the study lies, or goes on.")],
    sparsity: Annotated[
        str, typer.Option(help="Shares of the units to remove, separated by commas.")
    ] = "0.25,0.5,0.75",
    backends: Annotated[
        str | None,
        typer.Option(
            help="Backends, separated by commas; by default the heuristics, the root bound and "
            "`branch_and_bound`."
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Only groups of the model that match one of these patterns (`*.heads`)."),
    ] = None,
    exact_units: Annotated[
        int, typer.Option(help="Give problems of at most this many units to exact backends.")
    ] = 64,
    units: Annotated[
        int | None,
        typer.Option(help="Draw windows of this many units from larger problems, the rest held."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows for each problem and sparsity.")] = 3,
    time_limit: Annotated[float, typer.Option(help="Seconds for one exact solve.")] = 60.0,
    gap_tolerance: Annotated[
        float, typer.Option(help="Relative gap at which an exact solve may stop.")
    ] = 1e-6,
    query_heads: Annotated[
        bool,
        typer.Option(
            "--query-heads",
            help="Let single query heads be units, where only groups of them can be removed.",
        ),
    ] = False,
    calibration: CalibrationOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    image_size: ImageSizeOption = None,
    no_normalize: NoNormalizeOption = False,
    samples: SamplesOption = None,
    seqlen: SeqlenOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    damp: Annotated[
        float, typer.Option(help="Pull towards the dense weights, relative to diag(H).")
    ] = 0.01,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that solve at once; by default one for each core, fewer where problems "
            "are so large that half of the memory would not hold them.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Solve on a Ray cluster: `auto` for the one that this machine belongs to, "
            "HOST:PORT, or `local`.  [default: processes of this machine]",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="Where the model runs: auto, cpu or cuda. Solves run on the CPU."),
    ] = "auto",
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Solve, bound and verify every problem with every backend, and report the gaps.

    The problems of a model are posed on its dense activations, group by group. Run the same command
    again to go on with a study that was interrupted, or with more sparsities or backends to extend
    it.
    """
    from osscar.base.errors import OptionError
    from osscar.report.html import write_report
    from osscar.report.summary import summarize
    from osscar.study.cluster import connected
    from osscar.study.design import DEFAULT_BACKENDS, StudyDesign
    from osscar.study.directory import Study

    check_json_path(json, inputs=(*sources, calibration, weights), written=(directory,))
    if ray is not None and jobs is not None:
        raise OptionError("--jobs are processes of this machine, and --ray has others; give one")
    design = StudyDesign(
        sparsities=_numbers(sparsity),
        backends=DEFAULT_BACKENDS if backends is None else _names(backends),
        exact_units=exact_units,
        window_units=units,
        windows=windows,
        time_limit=time_limit,
        gap_tolerance=gap_tolerance,
        seed=seed,
    )
    stated = stated_preprocessing(mean, std, image_size, no_normalize)
    are_files = _are_problems(sources)
    source: dict[str, Any]
    if are_files:
        _refuse_options_of_models(context)
        source = {"problems": [_fingerprint(Path(file)) for file in sources]}
    else:
        source = {
            **{"model": sources[0], "calibration": calibration or "built-in text"},
            **{"samples": samples, "seqlen": seqlen, "seed": seed, "damp": damp},
            **{"groups": groups, "query_heads": query_heads},
            "weights": None if weights is None else str(weights),
        }
        if stated is not None:
            source["preprocessing"] = stated.record()
    study = Study(directory, source)
    with way_back(lambda: study.kept):
        with (
            quiet(),
            study.locked(),
            nullcontext() if ray is None else connected(ray) as cluster,
        ):
            if not are_files:
                _capture_model(
                    study, groups, stated, device=device, trust_remote_code=trust_remote_code
                )
            elif not study.instances:
                study.capture(_file_problems(sources))
            jobs = cluster.workers if cluster else jobs or study.affordable_jobs()
            records = study.run(design, jobs, executor=cluster)
            summary = summarize(records, study.trivial)
            report = write_report(study, design, records, summary, jobs=jobs)
        _print(summary)
        say(f"report: {report}")
        content = {
            **{"directory": str(directory), "source": source, "design": dataclasses.asdict(design)},
            "answer": summary.answer,
            "headline": list(summary.headline),
            "records": [dataclasses.asdict(record) for record in records],
            "trivial": [instance.name for instance in study.trivial],
        }
        write_json(json, document("gap", 2, content))


def _print(summary: Summary) -> None:
    from osscar.report.gap_tables import cases_table, scores_table

    out.print(cases_table(summary))
    out.print(scores_table(summary))
    say(summary.answer)
    for sentence in summary.headline:
        say(f"- {sentence}")


def _capture_model(
    study: Study,
    groups: str | None,
    stated: Preprocessing | None,
    *,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Capture the problems of a model; of a study that goes on, check that they are its own."""
    from osscar.data.batches import as_inputs
    from osscar.preparation.fingerprint import Fingerprint

    source = study.source
    given = source["calibration"]
    drawn = {name: source[name] for name in ("samples", "seqlen", "seed")}
    loaded, data = opened(
        source["model"],
        {**drawn, "spec": None if given == "built-in text" else given},
        weights=source["weights"],
        device=device,
        trust_remote_code=trust_remote_code,
        preprocessing=stated,
    )
    inputs = as_inputs(loaded.model, data)
    dense = Fingerprint.of(loaded.model, inputs, inputs.batch_size)
    if study.instances:
        study.check_dense(dense)
    else:
        study.capture(_model_problems(loaded.model, data, source, groups), dense)


def _model_problems(
    model: nn.Module, data: Any, source: Mapping[str, Any], groups: str | None
) -> Iterator[tuple[str, SubsetProblem]]:
    from osscar.study.problems import model_problems

    patterns = _names(groups) if groups is not None else ("*",)
    for group, problem in model_problems(
        model,
        data,
        damp=source["damp"],
        wanted=lambda name: any(fnmatchcase(name, pattern) for pattern in patterns),
        query_heads=source["query_heads"],
    ):
        yield str(group.kind), problem.to("cpu")


def _refuse_options_of_models(context: typer.Context) -> None:
    from osscar.base.errors import OptionError

    for name in _OF_MODELS:
        given = context.get_parameter_source(name)
        asks = given is not None and given.name != "DEFAULT"
        if asks and (name, context.params[name]) not in (("device", "cpu"), ("device", "auto")):
            raise OptionError(
                f"--{name.replace('_', '-')} is for models; leave it away: problem files are "
                "solved as they are, on the CPU"
            )


def _are_problems(sources: list[str]) -> bool:
    from osscar.base.errors import OptionError

    files = [source.endswith(_PROBLEM_SUFFIXES) for source in sources]
    if any(files) and not all(files):
        raise OptionError("give either one model or problem files, not both")
    if not any(files) and len(sources) > 1:
        raise OptionError(f"give one model, not {len(sources)}: {', '.join(sources)}")
    return all(files)


def _file_problems(sources: list[str]) -> Iterator[tuple[str, SubsetProblem]]:
    import solvers

    for source in sources:
        problem = solvers.SubsetProblem.load(source)
        named = dataclasses.replace(problem, name=problem.name or Path(source).stem)
        yield "units", named


def _fingerprint(file: Path) -> dict[str, str]:
    """Return a problem file's name and what tells whether it is still the same."""
    from osscar.base.files import file_digest

    check_input(file)
    return {"file": file.name, "sha256": file_digest(file)}


def _numbers(text: str) -> tuple[float, ...]:
    from osscar.base.errors import OptionError

    try:
        return tuple(dict.fromkeys(float(part) for part in _names(text)))
    except ValueError:
        raise OptionError(f"--sparsity {text!r} is not a list such as 0.25,0.5,0.75") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
