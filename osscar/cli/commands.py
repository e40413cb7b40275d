"""The commands, as the command line reads them; what each does is loaded when it runs.

Nothing here loads torch, so that help comes at once.
"""

from __future__ import annotations

import importlib
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from cyclopts import App, Parameter

from osscar import __version__
from osscar.base.process import handling, unwinds
from osscar.base.timing import Stage, profiled, timed
from osscar.cli.common import err
from osscar.cli.common import out as screen
from osscar.cli.options import (
    Backend,
    BackendOptions,
    Dense,
    Device,
    EvalOptions,
    GapOptions,
    ImageSize,
    Json,
    Model,
    PruneOptions,
    RecoverOptions,
    SweepOptions,
    Trust,
    request_options,
)
from osscar.recovery.request import RecoveryRequest
from osscar.report.sections import longest_stages
from osscar.request import BOUND_ROUNDS, PruningRequest

if TYPE_CHECKING:
    Asked: TypeAlias = Any
    Shared: TypeAlias = Any
    Trained: TypeAlias = Any
else:
    Asked = request_options(PruningRequest, *{*PruningRequest.__dataclass_fields__} - {"groups"})
    Trained = request_options(RecoveryRequest, *{*RecoveryRequest.__dataclass_fields__} - {"loss"})
    Shared = request_options(
        PruningRequest,
        *("allocation", "seed", "batch_size", "round_to", "at_least", "backend", "damp"),
        *("experts", "skip", "form", "batch_norm", "strict", "device"),
    )

_ALL = Parameter(name="*")
"""Spreads a group of options out among those of the command."""


_TIMED = ("demo", "prune", "recover", "sweep", "gap", "export")
"""Commands that tell how long they took, reading and saving included."""


def _run(command: str, *arguments: Any) -> None:
    """Load the module of a command, which loads torch, and call what it names (by default `run`).

    From then on there is something to clean up where a signal ends the process.
    """
    module, _, function = command.partition(".")
    began = time.perf_counter()
    with profiled() as spent:
        if "torch" not in sys.modules:
            err.print("progress: loading torch, which takes seconds", highlight=False)
        with timed(Stage.START):
            loaded = importlib.import_module(f"osscar.cli.{module}")
        with handling(unwinds):
            getattr(loaded, function or "run")(*arguments)
    if command in _TIMED:
        whole = time.perf_counter() - began
        screen.print(f"took {whole:.1f} s{longest_stages(spent.of(whole))}", highlight=False)


def _version() -> str:
    return f"osscar {__version__} (torch {metadata.version('torch')})"


app = App(
    name="osscar",
    help="Prune a network in one shot, and know how good the result is.\n\nStart with `osscar "
    "demo`; then `osscar prune MODEL --sparsity 0.3 --calibration FILE --out DIR`.",
    help_format="markdown",
    help_flags=("-h", "--help"),
    version=_version,
    default_parameter=Parameter(
        negative=(),
        allow_repeating=True,
        json_dict=False,
        json_list=False,
        show_default=lambda default: default or None,
    ),
    console=screen,
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


@app.command
def demo(
    *,
    out: Annotated[
        Path | None,
        Parameter(help="Where the smaller model goes; by default into a temporary directory."),
    ] = None,
    backend: Backend = "local_search",
    json: Json = None,
) -> None:
    """Prune a small trained OPT model that ships with the package, and show what it did."""
    _run("demo", out, backend, json)


@app.command
def prune(
    model: Model,
    /,
    *,
    asked: Annotated[Asked, _ALL] = Asked(),
    options: Annotated[PruneOptions, _ALL] = PruneOptions(),
) -> None:
    """Prune a model in one shot, prove the result, and save it.

    Give a budget (--sparsity, --params, --size, --flops or --speedup): heads, neurons and channels
    of all layers share it so that the model's outputs change least.  Or say what every layer keeps
    (--heads, --neurons, --channels), and every mixture of its experts (--experts).  --sparsity says
    what to remove, all others say what to keep; a line tells it in numbers before the work
    begins.  Under grouped-query attention a head is a key-value head with its query heads.  Groups
    that are done are kept in OUT.run until the smaller model is saved: give the same command again
    to go on with a run that was killed.
    """
    with profiled() as spent:
        _run("prune", model, options, asked, spent)


@app.command
def recover(
    directory: Annotated[Path, Parameter(help="What `osscar prune` wrote.")],
    /,
    *,
    dense: Annotated[
        str,
        Parameter(
            help="The dense model that it was pruned from, as `osscar prune` takes it; code of "
            "your own also builds the smaller one."
        ),
    ],
    asked: Annotated[Trained, _ALL] = Trained(),
    options: Annotated[RecoverOptions, _ALL] = RecoverOptions(),
) -> None:
    """Train a pruned model for some minutes towards the outputs of its dense one, and save it.

    Shapes do not change, and labels are not used.  Held-out samples decide which step is kept, so
    that the model is never worse on them.  A command that was killed goes on if it is given again:
    the state of the training is kept in OUT.recover until the model is saved.
    """
    _run("recover", directory, dense, options, asked)


@app.command
def sweep(
    model: Model,
    /,
    *,
    options: Annotated[SweepOptions, _ALL] = SweepOptions(),
    shared: Annotated[Shared, _ALL] = Shared(),
) -> None:
    """Prune to several budgets in one run, and show quality against speed.

    Give a list for one kind of budget: --sparsity, --params, --size, --flops or --speedup.  The
    dense model is measured once for all of them.  Each point is kept once it is done: the same
    command goes on where it was stopped, and more budgets, or --baselines, extend the sweep.  With
    --recover each point is measured in one shot, and again after training on the calibration data.
    """
    _run("sweep", model, options, shared)


@app.command(name="eval")
def evaluate(model: Model, /, *, options: Annotated[EvalOptions, _ALL] = EvalOptions()) -> None:
    """Measure quality, speed, size and memory.

    Language models: perplexity over non-overlapping windows of the text, and the speed of reading a
    prompt (prefill) and of writing token by token (decode).  Models that read images: top-1 and
    top-5 where there are labels, and images per second.  All other models: the same, if they put
    out scores of classes.  With --dense the two models are timed in turns, and of all but language
    models agreement, divergence and the distance of each output are measured, without labels.
    """
    _run("eval", model, options)


@app.command
def inspect(
    model: Model,
    /,
    *,
    svg: Annotated[Path | None, Parameter(help="Draw the groups to this SVG file.")] = None,
    all_groups: Annotated[
        bool,
        Parameter(name="--all", help="Also list frozen groups inside the units of others."),
    ] = False,
    dense: Dense = None,
    image_size: ImageSize = None,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show the coupling groups of a model as a table."""
    _run("inspect", model, svg, all_groups, dense, image_size, json, trust_remote_code)


@app.command
def export(
    directory: Annotated[
        Path, Parameter(help="A checkpoint: for gguf of a language model, with its tokenizer.")
    ],
    /,
    *,
    format: Annotated[
        str,
        Parameter(help="gguf, of llama.cpp; onnx, of ONNX Runtime; or pt2, of torch.export."),
    ] = "gguf",
    out: Annotated[
        Path | None,
        Parameter(help="The file; by default beside the directory, such as smaller-f16.gguf."),
    ] = None,
    dtype: Annotated[
        str | None,
        Parameter(help="Number format of the matrices in gguf: f16 (the default), f32 or bf16."),
    ] = None,
    dense: Annotated[
        str | None,
        Parameter(
            help="For onnx and pt2: code that builds the dense model, where the directory holds a "
            "pruned model of your own code."
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        Parameter(
            help="For onnx and pt2: an .npz or .safetensors file of what the model reads, two "
            "samples or more, where it is not known what it was pruned with."
        ),
    ] = None,
    overwrite: Annotated[bool, Parameter(help="Replace a file of that format.")] = False,
    json: Json = None,
) -> None:
    """Write a model for llama.cpp, ONNX Runtime or torch.export, whatever its layers' widths.

    To gguf LLaMA, Mistral, SmolLM2, Qwen2, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE are
    written; to onnx and pt2 any model that torch can trace. The file is read back and compared with
    the model before it takes its place.
    """
    _run("export", directory, format, out, dtype, dense, inputs, overwrite, json)


@app.command
def gap(
    *sources: Annotated[
        str,
        Parameter(
            name="MODEL_OR_PROBLEM",
            help="One model as for `osscar prune`, or problem files (.safetensors) and names "
            "or patterns of instances (`osscar instances list`).",
        ),
    ],
    out: Annotated[Path, Parameter(help="Directory of the study; an existing study goes on.")],
    options: Annotated[GapOptions, _ALL] = GapOptions(),
) -> None:
    """Solve, bound and verify every problem with every backend, and report the gaps.

    The problems of a model are posed on its dense activations, group by group. Answers to instances
    are also compared with the best that is known. Run the same command again to go on with a study
    that was interrupted, or with more sparsities or backends to extend it.
    """
    _run("gap", sources, out, options)


@app.command
def solve(
    file: Annotated[Path, Parameter(help="A problem file (.safetensors).")],
    /,
    *,
    backend: Backend = "local_search",
    keep: Annotated[
        int | None, Parameter(help="How many units stay, instead of what the file says.")
    ] = None,
    option: BackendOptions = (),  # type: ignore[assignment]
    bound: Annotated[
        bool, Parameter(help="Add a lower bound where the backend gives none.")
    ] = False,
    bound_rounds: Annotated[
        int, Parameter(help="Rounds of the search for that bound; never a worse one than with 0.")
    ] = BOUND_ROUNDS,
    list_problem: Annotated[
        bool, Parameter(help="Show what the file holds and who can take it.")
    ] = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Solve one problem, verify the answer from the problem alone, and show both."""
    if list_problem:
        _run("solve.list_problem", file, keep, device, json)
    else:
        _run("solve", file, backend, keep, list(option), bound, bound_rounds, device, json)


@app.command
def backends(*, json: Json = None) -> None:
    """List every backend: its kind, what it can take, and whether it is available here."""
    _run("solve.list_backends", json)


instances = App(name="instances", help="A library of problems for solvers, and what is known.")
app.command(instances)


@instances.command(name="list")
def list_instances(*, json: Json = None) -> None:
    """List all instances, and the best that is known of each."""
    _run("instances.list_instances", json)


@instances.command
def make(
    *names: Annotated[str, Parameter(help="Names, or patterns such as 'resnet20-*'.")],
    out: Annotated[Path, Parameter(help="The directory to write to.")] = Path("instances"),
    json: Json = None,
) -> None:
    """Write instances as problem files, which `osscar solve` and anybody's code can read."""
    _run("instances.make", names, out, json)


@instances.command
def check(
    solution: Annotated[Path, Parameter(help="A JSON file: instance, support, lower_bound, by.")],
    /,
    *,
    json: Json = None,
) -> None:
    """Recompute a solution's loss, and compare it with the best that is known."""
    _run("instances.check", solution, json)


for _place, _name in enumerate(
    (
        *("demo", "prune", "recover", "sweep", "eval", "inspect", "export", "gap", "solve"),
        *("instances", "backends"),
    )
):
    app[_name].sort_key = _place
