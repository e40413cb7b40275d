"""The commands, as the command line reads them; what each does is loaded when it runs.

Nothing here loads torch, so that help comes at once.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import App, ArgumentCollection, Parameter, Token
from cyclopts.config import Dict

from osscar import __version__
from osscar.base.errors import OptionError, first_line
from osscar.base.inputs import opened_from
from osscar.base.process import handling, unwinds
from osscar.base.timing import Stage, profiled, timed
from osscar.cli.common import err, show
from osscar.cli.common import out as screen
from osscar.cli.options import (
    SHARED,
    Backend,
    EvalOptions,
    ExportOptions,
    GapOptions,
    InspectOptions,
    Json,
    Model,
    PruneOptions,
    RecoverOptions,
    SolveOptions,
    SweepOptions,
    recovery_of,
    request_of,
    settings_of,
)
from osscar.cli.settings import (
    RECOVERY,
    as_pairs,
    check_name,
    fields_of,
    known_names,
    set_name,
)
from osscar.recovery.request import RecoveryRequest
from osscar.report.sections import longest_stages
from osscar.request import ArgumentsAlone, BudgetKind, PruningRequest
from osscar.run.jobs import SweepJob, jobs, refuse_targets

_REPORT = "osscar.prune/"


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what the file of ``--config`` says and the command line does not."""
    options = {one.name: one for one in arguments}
    tokens = options["--config"].tokens if "--config" in options else ()
    if not tokens:
        return
    path, flags, fields = Path(tokens[0].value), dict[str, Any](), dict[str, Any]()
    for name, value in _options(path).items():
        flag = f"--{name.replace('_', '-')}"
        (flags if flag in options else fields)[name] = value
    said = {set_name(token.value) for token in options["--set"].tokens}
    known = [*known_names(PruningRequest, recovers=True), *(set_name(one[2:]) for one in options)]
    flags = {name: value for name, value in flags.items() if set_name(name) not in said}
    for name, pair in as_pairs(fields).items():
        head = name.partition(".")[0]
        check_name(name if name in known else head, known, PruningRequest, str(path))
        if not {name, head} & said:
            options["--set"].append(Token(keyword="--set", value=pair, source=str(path)))
    source = {commands[-1]: {name.replace("_", "-"): value for name, value in flags.items()}}
    Dict(source, source=str(path))(app, commands[-1:], arguments)


def _options(path: Path) -> dict[str, Any]:
    """Read options by their names on the command line."""
    import yaml  # here, since help needs none

    readers: dict[str, Callable[[str], Any]] = {
        **{".toml": tomllib.loads, ".json": json.loads},
        **{".yaml": yaml.safe_load, ".yml": yaml.safe_load},
    }
    if path.suffix not in readers:
        raise OptionError(f"--config is {str(path)!r}; give a .toml, .yaml or .json file")
    try:
        found = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OptionError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise OptionError(f"{path} holds no options by name; write lines such as sparsity = 0.3")
    if str(found.get("schema", "")).startswith(_REPORT):
        try:
            found = _of_report(found, path.parent)
        except (LookupError, TypeError, AttributeError) as error:
            raise OptionError(f"{path} is no report of a run: {first_line(error)}") from error
    if "config" in found:
        raise OptionError(f"{path} names a further file with config; write all options into one")
    return dict(found)


def _of_report(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the options of a run that are not empty, and how its samples were drawn."""
    settings = opened_from(report["settings"], folder.absolute())
    drawn, recovery = report["calibration"], report.get("recovery")
    if others := settings.keys() - set(known_names(PruningRequest)):
        raise OptionError(
            f"the settings of the report have {', '.join(sorted(others))}, which are none of a run"
        )
    asked = {**settings, **{name: drawn.get(name) for name in ("samples", "seqlen")}}
    if recovery:
        own = {
            name: value
            for name, value in recovery["settings"].items()
            if name not in SHARED or value != settings.get(name)
        }
        asked |= {"recover": True, RECOVERY: _filled(own)}
    return _filled(asked)


def _filled(options: dict[str, Any]) -> dict[str, Any]:
    """Return options that are not empty."""
    return {n: v for n, v in options.items() if v not in (None, [], {}) and v is not False}


R = TypeVar("R", bound=PruningRequest)


def asked_points(options: SweepOptions, request: type[R]) -> tuple[R, tuple[SweepJob, ...]]:
    """Return the request (or its `ArgumentsAlone`) at the first point, and all points."""
    settings = settings_of(options, request)
    refuse_targets(settings)
    asked = {kind: settings.get(kind, getattr(options, kind)) for kind in BudgetKind}
    given = {kind: str(value) for kind, value in asked.items() if value is not None}
    lists = {kind: text for kind, text in given.items() if "," in text or len(given) == 1}
    if not given:
        raise OptionError(
            "a sweep needs a list of values for a budget, and none is given; give one, such as "
            f"--sparsity {BudgetKind.SPARSITY.examples} "
            f"({', '.join(f'--{kind}' for kind in BudgetKind)})"
        )
    if len(lists) != 1:
        named = " and ".join(f"--{kind}" for kind in lists or given)
        raise OptionError(
            f"{named}: a sweep goes over one of the budgets; give a list for one of them, such as "
            f"--sparsity {BudgetKind.SPARSITY.examples}, and single values for others"
        )
    ((budget, text),) = lists.items()
    values = tuple(part.strip() for part in text.split(",") if part.strip())
    method = settings.get("allocation", "measured")
    points = jobs(budget, values, baselines=options.baselines, allocation=method)
    fixed = {str(kind): given.get(kind) for kind in BudgetKind}
    base = request_of(options, request, **{**fixed, str(budget): points[0].value})
    for job in points:
        job.request(base)
    return base, points


_ALL = Parameter(name="*")
"""Spreads a group of options out among those of the command."""

_TIMED = ("demo", "prune", "recover", "gap", "export")
"""Modules of commands that tell how long they took, reading and saving included."""


def _run(command: str, *arguments: Any) -> None:
    """Load the module of a command, which loads torch, and call what it names (`run`)."""
    module, _, function = command.partition(".")
    began = time.perf_counter()
    with profiled() as spent:
        first = "torch" not in sys.modules
        if first:
            err.print("progress: loading torch, which takes seconds", highlight=False)
            gc.disable()  # to look through all of it again and again takes a quarter of the time
        with timed(Stage.START):
            loaded = importlib.import_module(f"osscar.cli.{module}")
        if first:
            gc.freeze()  # what was imported stays
            gc.enable()
        with handling(unwinds):
            getattr(loaded, function or "run")(*arguments)
    if module in _TIMED:
        whole = time.perf_counter() - began
        screen.print(f"took {whole:.1f} s{longest_stages(spent.of(whole))}", highlight=False)


app = App(
    name="osscar",
    help="Prune a network in one shot, and know how good the result is.\n\n"
    "Start with:\n"
    "  osscar demo\n"
    "  osscar prune MODEL --sparsity 0.3 --calibration text.txt --out smaller",
    help_format="plaintext",
    help_flags=("-h", "--help"),
    version=lambda: f"osscar {__version__} (torch {metadata.version('torch')})",
    default_parameter=Parameter(
        negative=(), json_dict=False, json_list=False, show_default=lambda default: default or None
    ),
    console=screen,
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
    config=from_file,
    result_action="return_value",
)


@app.command
def demo(
    *,
    out: Annotated[
        Path | None, Parameter(help="Directory for the smaller model.  [default: a temporary one]")
    ] = None,
    overwrite: Annotated[bool, Parameter(help="Replace an existing checkpoint.")] = False,
    backend: Backend = "local_search",
    json: Json = None,
) -> None:
    """Prune a small trained language model that ships with the package, and show what it did."""
    _run("demo", out, overwrite, backend, json)


@app.command(help_epilogue="Further fields: osscar fields prune")
def prune(model: Model, /, *, options: Annotated[PruneOptions, _ALL]) -> None:
    """Prune a model in one shot, verify the result, and save it.

    Remove 30 % of the parameters of heads, neurons and channels:
      osscar prune MODEL --sparsity 0.3 --calibration text.txt --out smaller
    Keep 70 % of the neurons of every layer:
      osscar prune MODEL --neurons 0.7 --calibration text.txt --out smaller
    Keep half of the computation, of a model that reads images:
      osscar prune MODEL --flops 0.5 --calibration images/ --out smaller

    Give budgets, or say what every layer keeps. Layers get widths such that the
    budgets hold and the model's outputs change least. --sparsity says what to
    remove; --params, --flops, --size and --memory say what to keep. If the command
    is killed, run it again to continue.
    """
    recovery_of(options, request_of(options, ArgumentsAlone))  # before anything is loaded
    _run("prune", model, options)


@app.command(help_epilogue="Further fields: osscar fields recover")
def recover(
    directory: Annotated[Path, Parameter(help="Directory that `osscar prune` wrote.")],
    /,
    *,
    options: Annotated[RecoverOptions, _ALL],
) -> None:
    """Train a pruned model to match its dense model (distillation), and save it.

    A language model:
      osscar recover smaller --dense MODEL --text training.txt
    A model that reads images, whose labels are not used:
      osscar recover smaller --dense torchvision:resnet50 --images images/

    The weights with the lowest loss on held-out samples are kept; these may be
    the weights before training. If the command is killed, run it again to
    continue.
    """
    request_of(options, RecoveryRequest)  # before anything is loaded
    _run("recover", directory, options)


@app.command(help_epilogue="Further fields: osscar fields sweep")
def sweep(model: Model, /, *, options: Annotated[SweepOptions, _ALL] = SweepOptions()) -> None:
    """Prune to several budgets in one run, and show quality against speed.

      osscar sweep MODEL --sparsity 0.1,0.2,0.3 --calibration text.txt --text test.txt

    Give a list of values for one budget: each value gives one pruned model. Other
    budgets take one value, which holds for all of them. Without data to score,
    outputs are only compared with the dense model's. Run the command again to
    continue a sweep that was stopped; more values, or --baselines, extend it.
    """
    asked_points(options, ArgumentsAlone)  # before anything is loaded
    _run("prune.sweep", model, options)


@app.command(name="eval")
def evaluate(model: Model, /, *, options: Annotated[EvalOptions, _ALL] = EvalOptions()) -> None:
    """Measure quality, speed, size and memory of a model.

    Perplexity and tokens per second of a language model:
      osscar eval smaller --text test.txt
    Accuracy of a model that reads images, beside its dense one:
      osscar eval smaller --images test/ --dense torchvision:resnet50

    With --dense the two models are timed in turns, and their outputs are
    compared, which needs no labels.
    """
    _run("eval", model, options)


@app.command
def inspect(
    model: Model, /, *, options: Annotated[InspectOptions, _ALL] = InspectOptions()
) -> None:
    """Show which units of a model (heads, neurons, channels, experts) can be removed.

    osscar inspect MODEL
    """
    _run("inspect", model, options)


@app.command
def export(
    directory: Annotated[
        Path, Parameter(help="Checkpoint to export; for gguf, a language model with its tokenizer.")
    ],
    /,
    *,
    options: Annotated[ExportOptions, _ALL] = ExportOptions(),
) -> None:
    """Write a model for llama.cpp, ONNX Runtime or torch.export.

      osscar export smaller --format gguf

    gguf takes LLaMA, Mistral, SmolLM2, Qwen2 and Qwen3; onnx and pt2 take any model
    that torch can trace. The file is kept only if what is read back from it equals
    the model.
    """
    _run("export", directory, options)


@app.command
def gap(
    *sources: Annotated[
        str,
        Parameter(
            name="MODEL_OR_PROBLEM",
            help="One model as for `osscar prune`, or problem files (.safetensors) and names or "
            "patterns of instances (`osscar instances list`).",
        ),
    ],
    options: Annotated[GapOptions, _ALL],
) -> None:
    """Study how far the selections of solvers are from optimal.

    Problems of a model, or problem files and instances:
      osscar gap MODEL --calibration text.txt --out study
      osscar gap layer.safetensors 'resnet20-*' --out study

    A model gives one problem for each group, from the activations of the dense
    model. Heuristics, lower bounds and exact solvers are run on each problem.
    Solutions of instances are also compared with the best known ones. Run the
    command again to continue an interrupted study; more sparsities or backends
    extend it.
    """
    _run("gap", sources, options)


@app.command
def solve(
    file: Annotated[Path, Parameter(help="Problem file (.safetensors).")],
    /,
    *,
    options: Annotated[SolveOptions, _ALL] = SolveOptions(),
) -> None:
    """Choose which units of one problem stay, and verify the solution.

    osscar solve layer.safetensors --backend local_search --keep 100
    """
    _run("solve", file, options)


@app.command
def backends(*, json: Json = None) -> None:
    """List all solvers (backends): the problems that each takes, and whether it runs here."""
    _run("solve.list_backends", json)


@app.command(name="fields")
def list_fields(
    command: Annotated[
        Literal["prune", "sweep", "recover"], Parameter(help="Command whose fields to list.")
    ],
    /,
) -> None:
    """List all fields that --set takes, with type and default."""
    show(*fields_of(command))


instances = App(name="instances", help="List, write and check instances: problems for solvers.")
app.command(instances)


@instances.command(name="list")
def list_instances(*, json: Json = None) -> None:
    """List all instances, with the best known loss of each."""
    _run("instances.list_instances", json)


@instances.command
def make(
    *names: Annotated[
        str, Parameter(help="Names, or patterns such as 'resnet20-*'.  [default: all]")
    ],
    out: Annotated[Path, Parameter(help="Directory for the files.")] = Path("instances"),
) -> None:
    """Write instances as problem files, for `osscar solve` and for code of your own."""
    _run("instances.make", names, out)


@instances.command
def check(
    solution: Annotated[
        Path,
        Parameter(
            help="JSON file with instance (a name), support (the units to keep), and perhaps "
            "lower_bound and by (who found it, and how)."
        ),
    ],
    /,
) -> None:
    """Recompute the loss of a solution, and compare it with the best known one."""
    _run("instances.check", solution)


for _place, _name in enumerate(
    (
        *("demo", "prune", "recover", "sweep", "eval", "inspect", "export", "gap", "solve"),
        *("instances", "backends", "fields"),
    )
):
    app[_name].sort_key = _place
