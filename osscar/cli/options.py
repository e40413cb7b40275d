"""What commands are given: groups of options, which the command line reads, and commands take."""

import dataclasses
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Group, Parameter, validators

from osscar.base.errors import OptionError
from osscar.base.inputs import bare, safe_repr
from osscar.recovery.request import RecoveryRequest
from osscar.request import BOUND_ROUNDS, PruningRequest, is_keep

T = TypeVar("T")

Model = Annotated[
    str,
    Parameter(
        help="Model id, directory, `demo`, `smollm2-135m`, `torchvision:NAME`, `timm:NAME`, or "
        "code of your own that is imported and called: `module:function` or `file.py:function`."
    ),
]
Json = Annotated[Path | None, Parameter(help="Also write what is printed, as JSON, to this file.")]
Report = Annotated[
    Path | None,
    Parameter(help="Also write `report.html`, the page in the output, to this file."),
]
Dense = Annotated[
    str | None,
    Parameter(
        help="Code that builds the dense model, where MODEL is a directory that holds a pruned "
        "model of your own code."
    ),
]
Trust = Annotated[bool, Parameter(help="Run the code that a checkpoint brings along.")]
Device = Annotated[str, Parameter(help="auto, cpu or cuda.")]
Backend = Annotated[
    str, Parameter(help="`osscar backends` lists them; or file.py:Class of your own.")
]
BackendOptions = Annotated[
    list[str],
    Parameter(name="--option", help="Option of the backend, as NAME=VALUE; repeatable."),
]
ImageSize = Annotated[
    str | None,
    Parameter(
        help="Size of images: pixels of a square, HxW, or CxHxW.  [default: what the model brings, "
        "or the size of its example]"
    ),
]
_Count = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]

_GROUPS = {
    "Budget": "sparsity params size flops speedup allocation round_to at_least",
    "What to keep": "heads neurons channels residual experts skip groups query_heads",
    "Solver": "backend backend_options backends certify bound_rounds damp target correction_weight "
    "batch_norm baselines exact_units time_limit gap_tolerance jobs ray",
    "Training": "steps learning_rate lora micro_batch_size checkpointing mixed_precision augment "
    "recover recover_text recover_steps",
    "Data": "calibration text images inputs samples units windows held_out seqlen batch_size seed",
    "Images": "mean std image_size no_normalize",
    "Model": "weights dtype device max_memory form strict dense prove trust_remote_code",
    "Output": "out overwrite restart report json dry_run",
}
"""Under which titles help shows the options of commands that have many, in this order."""

_GROUP_OF = {
    name: Parameter(group=Group(title, sort_key=place))
    for place, (title, names) in enumerate(_GROUPS.items())
    for name in names.split()
}


def _in_groups(options: type[T]) -> type[T]:
    """Let help show the fields of a class under the titles of `_GROUPS`."""
    for name, annotation in options.__annotations__.items():
        if name in _GROUP_OF:
            options.__annotations__[name] = Annotated[annotation, _GROUP_OF[name]]
    return options


@dataclass(frozen=True, kw_only=True)
@_in_groups
class OpenOptions:
    """How a model is opened, and what is done to images."""

    mean: str | None = None
    """Mean of pixels / 255 that is subtracted from images: one number a channel, separated by
    commas, or one for all.  [default: what the model brings]"""
    std: str | None = None
    """Standard deviation of pixels / 255 by which images are divided, given as --mean is."""
    image_size: ImageSize = None
    no_normalize: bool = False
    """Feed pixels / 255 as they are, without --mean and --std."""
    weights: Path | None = None
    """Weights for a model of torchvision or timm, or code of your own: .safetensors, or a state
    dict, alone or as the only one among the entries of a file."""
    dtype: Annotated[
        str, Parameter(help="auto (float32 on a CPU), float32, bfloat16 or float16.")
    ] = "auto"
    trust_remote_code: Trust = False


@dataclass(frozen=True, kw_only=True)
@_in_groups
class DataOptions(OpenOptions):
    """How a model is opened and calibrated."""

    dense: Dense = None
    calibration: str | None = None
    """What the model will read: a plain text file or a Hugging Face dataset (the demo has its own
    text); for images a directory or an .npz file; for anything else FILE.npz or FILE.safetensors,
    with an entry for each argument of the model's `forward`."""
    samples: Annotated[int | None, Parameter(validator=validators.Number(lte=10**6))] = None
    """Calibration windows (default 32), images or samples (default 256)."""
    seqlen: int | None = None
    """Tokens in a calibration window (default 512, or the context if less); of a sweep also in a
    window that is scored."""


@dataclass(frozen=True, kw_only=True)
@_in_groups
class RunOptions(DataOptions):
    """What runs that prune have in common."""

    json: Json = None
    max_memory: str | None = None
    """Most memory that a run may take, such as 8GB.  The weights of a language model in a directory
    then stay on disk, and each is read when it is needed.  With --device cuda it is the card's
    memory.  [default: what is free there, if the model does not fit in it]"""


@dataclass(frozen=True, kw_only=True)
@_in_groups
class PruneOptions(RunOptions):
    """What `osscar prune` takes beside the request."""

    out: Path | None = None
    """Where the smaller model goes.  [required]"""
    overwrite: bool = False
    """Replace the checkpoint that is there."""
    restart: bool = False
    """Begin anew instead of going on with a run that was killed."""
    report: Report = None
    dry_run: bool = False
    """Estimate the time, memory and disk of the run, stage by stage, from one pass of the dense
    model and one group that is solved.  Writes nothing but --json FILE."""
    recover: bool = False
    """Train the smaller model towards the dense one before it is saved, as `osscar recover` does:
    on the calibration data, without labels."""
    recover_text: str | None = None
    """With --recover: train on this text or dataset.  [default: the calibration data]"""
    recover_steps: _Count = None
    """With --recover: optimizer steps.  [default: as many as `osscar recover`]"""


@dataclass(frozen=True, kw_only=True)
@_in_groups
class RecoverOptions(OpenOptions):
    """What `osscar recover` takes beside the request."""

    json: Json = None
    text: str | None = None
    """Plain text file or Hugging Face dataset to train on, like what the model will read."""
    images: str | None = None
    """Images to train on, whose labels are not used: a directory, or FILE.npz with `images`
    (FILE.npz:train for `train_images`)."""
    inputs: str | None = None
    """Samples of any other kind to train on: FILE.npz or FILE.safetensors, with an entry for each
    argument of the model's `forward`."""
    samples: _Count = None
    """Windows (by default as many as the steps take, each once), images or samples (by default
    all), drawn at random."""
    seqlen: int | None = None
    """Tokens in a window.  [default: as many as when it was pruned]"""
    out: Path | None = None
    """Where the recovered model goes.  [default: beside DIRECTORY, as DIRECTORY-recovered]"""
    overwrite: bool = False
    """Replace the checkpoint that is there."""
    restart: bool = False
    """Begin anew instead of going on with a run that was killed."""
    report: Report = None


@dataclass(frozen=True, kw_only=True)
@_in_groups
class SweepOptions(RunOptions):
    """What `osscar sweep` takes beside what its points share."""

    sparsity: str | None = None
    """Shares to *remove* of the parameters that heads, neurons and channels own, separated by
    commas."""
    params: str | None = None
    """Parameters of the model to *keep*: fractions, or counts, separated by commas."""
    size: str | None = None
    """Shares to *keep* of the bytes that the weights take on disk."""
    flops: str | None = None
    """Shares to *keep* of the floating-point operations on one sample."""
    speedup: str | None = None
    """Speeds of a forward pass of one calibration batch, as multiples of the dense model's, timed
    on this device."""
    out: Path = Path("osscar-sweep")
    """Directory of the sweep; an existing sweep goes on."""
    text: str | None = None
    """Plain text to score; the demo has its own."""
    images: str | None = None
    """Images to score, as for `osscar eval`; without them only divergence is measured."""
    inputs: str | None = None
    """Samples of any other kind to score, as for `osscar eval`."""
    windows: int | None = None
    """Score only the first N windows; by default the full text."""
    baselines: bool = False
    """Also prune with equal shares of every group, each layer by itself, by `multistage` (the
    choice of OSSCAR as published), `greedy`, `wanda` and `magnitude`."""
    recover: bool = False
    """Also train each pruned model towards the dense one, on the calibration data, and measure it
    before and after."""
    recover_steps: _Count = None
    """With --recover: optimizer steps.  [default: as many as `osscar recover`]"""


@dataclass(frozen=True, kw_only=True)
@_in_groups
class EvalOptions(OpenOptions):
    """What `osscar eval` takes."""

    json: Json = None
    text: str | None = None
    """Plain text to score; the demo has its own."""
    images: str | None = None
    """Images to score: a directory, with a folder for each class if they have labels, or FILE.npz
    with `images` and `labels` (FILE.npz:test for `test_images`)."""
    inputs: str | None = None
    """Samples to score of any other kind, fed as they are: FILE.npz or FILE.safetensors, with an
    entry for each argument of the model's `forward`, and perhaps `labels`."""
    samples: _Count = None
    """Score only so many of these, drawn at random."""
    dense: str | None = None
    """The dense model, to be measured side by side; code of your own also rebuilds the pruned
    one."""
    prove: bool = False
    """Prove again that the model's code computes what that of --dense does without the units that
    were removed."""
    windows: int | None = None
    """Score only the first N windows; by default the full text."""
    seqlen: int | None = None
    """Tokens in a window."""
    batch_size: int | None = None
    """Windows (default 4), images or samples (default 32) at once."""
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
@_in_groups
class GapOptions(DataOptions):
    """How `osscar gap` poses the problems of a model, and what it does with each."""

    groups: str | None = None
    """Only groups of the model that match one of these patterns (`*.heads`)."""
    query_heads: bool = False
    """Let single query heads be units, where only groups of them can be removed."""
    damp: float = 0.01
    """Pull towards the dense weights, relative to diag(H)."""
    device: str = "auto"
    """Where the model runs: auto, cpu or cuda. Solves run on the CPU."""
    json: Json = None
    sparsity: str | None = None
    """Shares of the units to remove, separated by commas; by default what a problem itself says, or
    0.25,0.5,0.75 where it does not say, as problems of models do not."""
    backends: str | None = None
    """Backends, separated by commas, also file.py:Class; by default the heuristics, the root bound
    and `branch_and_bound`."""
    exact_units: int = 64
    """Give problems of at most this many units to exact backends."""
    units: int | None = None
    """Draw windows of this many units from larger problems; all others stay or go as `local_search`
    has them."""
    windows: int = 3
    """Windows for each problem and sparsity."""
    bound_rounds: int = BOUND_ROUNDS
    """Rounds of the search for the root bound.  More rounds usually give a better bound, and never
    a worse one than no rounds."""
    time_limit: float = 60.0
    """Seconds for one exact solve."""
    gap_tolerance: float = 1e-6
    """Relative gap at which an exact solve may stop."""
    seed: Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**63))] = 0
    """Seed of everything that is drawn."""
    jobs: _Count = None
    """Processes that solve at once; by default one for each core, fewer where problems are so
    large that half of the memory would not hold them."""
    ray: str | None = None
    """Solve on a Ray cluster: `auto` (the cluster of this machine), HOST:PORT, or
    `local`.  [default: processes of this machine]"""


def given(options: Any) -> dict[str, Any]:
    """Return those of a group of options that are not as by default."""
    return {
        one.name: value
        for one in dataclasses.fields(options)
        if (value := getattr(options, one.name)) != one.default
    }


# ---- of a request ------------------------------------------------------------------------


def request_options(request: type[Any], *names: str) -> type[Any]:
    """Return a class of options for fields of a request, with their types, defaults and words.

    Nothing in it is checked: `asked_with` does that.
    """
    said = _help(request)
    changed: dict[str, tuple[Any, Any]] = {
        "backend": (Backend, "local_search"),
        "backend_options": (BackendOptions, ()),
        "skip": (Annotated[list[str], Parameter(help=f"{said.get('skip')}  Repeatable.")], ()),
    }
    options = dataclasses.make_dataclass(
        "RequestOptions",
        [
            (one.name, *changed.get(one.name, (_option(one, said[one.name]), one.default)))
            for one in dataclasses.fields(request)
            if one.name in names
        ],
        namespace={"_request": request},
        frozen=True,
        kw_only=True,
    )
    options.__module__ = __name__  # for Python 3.11, which names the module of dataclasses
    return _in_groups(options)


def asked_with(options: Any, **more: Any) -> Any:
    """Return the request that options of `request_options` ask for."""
    asked = {**vars(options), **more}
    if "skip" in asked:
        asked["skip"] = [part.strip() for text in asked["skip"] for part in text.split(",")]
    if "backend_options" in asked:
        asked["backend_options"] = parse_options(asked["backend_options"])
    return options._request(**asked)


def recovery_asked_with(
    options: PruneOptions | SweepOptions, request: PruningRequest
) -> RecoveryRequest | None:
    """Return what is asked of the recovery that follows a pruning; None if none does.

    Raises
    ------
    OptionError
        If something is asked of it, and not the recovery itself.
    """
    steps = options.recover_steps
    if options.recover:
        asked = RecoveryRequest(device=request.device, seed=request.seed)
        return asked if steps is None else dataclasses.replace(asked, steps=steps)
    told = {name: value for name, value in given(options).items() if name.startswith("recover_")}
    for name, value in told.items():
        raise OptionError(
            f"--{name.replace('_', '-')} is {safe_repr(value)} without --recover; give both, or "
            "neither"
        )
    return None


def _option(one: dataclasses.Field[Any], words: str) -> Any:
    return Annotated[str | None if is_keep(one.type) else bare(one.type), Parameter(help=words)]


def _help(documented: type) -> dict[str, str]:
    """Return what the docstring of a class says of each parameter, which it names as options."""
    _, _, text = (inspect.getdoc(documented) or "").partition("Parameters\n----------\n")
    entries = re.findall(r"^(\w[\w, ]*)\n((?:    .*\n|\n(?=    ))+)", text, re.MULTILINE)
    said = {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}
    option = re.compile(rf"(?<!`)`({'|'.join(said)})`(?!`)")
    return {
        name: option.sub(lambda found: f"--{found[1].replace('_', '-')}", words)
        for name, words in said.items()
    }


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` pairs; a value is JSON where it can be, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--option {safe_repr(pair)} is not NAME=VALUE")
        try:
            options[name.strip()] = json.loads(value, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise OptionError(
                f"--option {safe_repr(pair)} is nested too deeply; give a number, a text, or a list"
            ) from error
        except ValueError:
            options[name.strip()] = value
    return options


def _refuse_constant(text: str) -> Any:
    raise OptionError(f"--option cannot be {text}; give a finite number")
