"""What the commands share: options, errors, warnings, and what ``--json`` writes."""

from __future__ import annotations

import json as jsonlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import osscar
from osscar.base.printable import counted, printable

if TYPE_CHECKING:
    from osscar.data.batches import CalibrationData
    from osscar.data.preprocessing import Preprocessing
    from osscar.models.loaded import LoadedModel
    from osscar.request import PruningRequest

_PIPE_WIDTH = 140
"""Columns where the output is not a terminal, which has no width of its own."""


class _PlainConsole(Console):
    """A console that takes text as it is: what is in a name neither marks up nor moves anything.

    What goes to a file is cut nowhere, and a sentence stays in its line.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.is_terminal:
            texts = all(isinstance(one, str) for one in objects)
            options = {"crop": False, **({"soft_wrap": True} if texts else {}), **options}
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        plain = {"markup": False, "emoji": False}
        return super().render_str(printable(text, keep="\n"), **{**options, **plain})


out = _PlainConsole(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = _PlainConsole(stderr=True)

_SHOWN_WARNINGS = 3

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write what is printed, as JSON, to this file.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16 or float16.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Model id, directory, `demo`, `smollm2-135m`, `torchvision:NAME`, or code of your own "
        "that is imported and called: `module:function` or `file.py:function`."
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        help="Weights for a torchvision model or code of your own: .safetensors, or a state dict."
    ),
]
MeanOption = Annotated[
    str | None,
    typer.Option(
        help="Mean of pixels / 255 that is subtracted from images: one number a channel, separated "
        "by commas, or one for all.  [default: what the model brings]"
    ),
]
StdOption = Annotated[
    str | None, typer.Option(help="Deviation of pixels / 255 by which images are divided, alike.")
]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS",
        help="Size of images: pixels of a square, HxW, or CxHxW.  [default: what the model brings, "
        "or the size of its example]",
    ),
]
NoNormalizeOption = Annotated[
    bool, typer.Option("--no-normalize", help="Images are pixels / 255 as they are.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a checkpoint brings along.")
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="Plain text file or Hugging Face dataset (by default built-in text); for images "
        "a directory or an .npz file; for anything else FILE.npz or FILE.safetensors, with an "
        "entry for each argument of the model's `forward`."
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        max=10**6, help="Calibration windows (default 32), images or samples (default 256)."
    ),
]
SeqlenOption = Annotated[
    int | None,
    typer.Option(help="Tokens in a calibration window (default 512, or the context if less)."),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything that is drawn.")
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(help="Windows (default 8), images or samples (default 64) that run at once."),
]
AllocationOption = Annotated[
    str,
    typer.Option(
        help="How a budget is shared out: by `curvature`, so that the outputs of the model "
        "change least, `uniform`, the same share of every group, or `fluctuation`, by the "
        "scores of FLAP."
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory of a run, such as 8GB, for a language model in a directory that is "
        "larger: its weights stay on disk, and each is read when it is needed.  With --device "
        "cuda it is the card's memory.  [default: what is free there, if the model does not "
        "fit in it]",
    ),
]
RoundToOption = Annotated[
    int, typer.Option(help="Round kept widths to a multiple of this, for the hardware.")
]
AtLeastOption = Annotated[
    str | None,
    typer.Option(
        help="What every group that shares the budget keeps at least: a fraction of its units "
        "(0.1), or a count."
    ),
]
BackendOption = Annotated[str, typer.Option(help="`osscar backends` lists them.")]
BackendOptionsOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the backend, as NAME=VALUE; repeatable."),
]
DampOption = Annotated[
    float | None,
    typer.Option(
        help="Pull towards the dense weights, relative to diag(H).  [default: what serves "
        "held-out samples best, layer by layer]"
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="End with an error where a group that is to be pruned cannot follow, such as one "
        "whose size is written in the model's code. By default such groups are left alone and "
        "named, and all others are pruned.",
    ),
]


def stated_preprocessing(
    mean: str | None, std: str | None, image_size: str | None, no_normalize: bool
) -> Preprocessing | None:
    """Return what the options of a command state of images; None if they state nothing.

    Raises
    ------
    OptionError
        If they contradict each other, or cannot be read.
    ImageError
        If a number makes no sense.
    """
    from osscar.base.errors import OptionError
    from osscar.data.preprocessing import Preprocessing

    if mean is None and std is None and image_size is None and not no_normalize:
        return None
    if no_normalize and (mean, std) != (None, None):
        raise OptionError("--no-normalize is given with --mean or --std; give one or the other")
    known: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)} if no_normalize else {}
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            known[name] = _numbers(text, f"--{name}", float, ",", "0.5 or 0.49,0.48,0.45")
    if image_size is not None:
        *channels, height, width = _size(image_size)
        known["channels"] = channels[0] if channels else None
        known["crop"] = height, width
    return Preprocessing(**known)


def _size(text: str) -> tuple[int, ...]:
    """Return height and width, and channels before them where they are given."""
    from osscar.base.errors import OptionError

    found = _numbers(text, "--image-size", int, "x", "32, 24x32 or 1x28x28")
    if len(found) > 3 or min(found) < 1:
        raise OptionError(
            f"--image-size is {text!r:.60}; give pixels, such as 32, 24x32 or 1x28x28"
        )
    return found * 2 if len(found) == 1 else found


def _numbers(
    text: str, option: str, kind: type[Any], separator: str, example: str
) -> tuple[Any, ...]:
    from osscar.base.errors import OptionError

    try:
        return tuple(map(kind, text.split(separator)))
    except ValueError:
        raise OptionError(f"{option} {text!r:.60} is not numbers such as {example}") from None


def opened(
    model: str,
    calibration: Mapping[str, Any],
    check: Callable[[Any], None] = lambda loaded: None,
    says: bool = True,
    **options: Any,
) -> tuple[LoadedModel, CalibrationData]:
    """Open a model and draw what it is calibrated on; what there is to warn of comes before work.

    Parameters
    ----------
    model
        As of `osscar.load_model`, which takes the options.
    calibration
        What is drawn, as the model's `calibration` takes it.
    check
        What else to refuse of the model, before data are read.
    says
        Whether to print what that is, and how it is prepared.

    Raises
    ------
    OsscarError
        What these raise.
    """
    from osscar.models.load import load_model

    with quiet():
        loaded = load_model(model, **options)
        check(loaded)
        data = loaded.calibration(**calibration)
    if says:
        say_preprocessing(data)
        say_calibration(loaded, data)
    return loaded, data


def say_preprocessing(data: Any) -> None:
    """Print what is done to an image, where data are images."""
    from osscar.data.images import ImageSet

    if isinstance(data, ImageSet):
        say(f"images: {data.preprocessing.sentence()}")


def limit_of(
    given: str | None, model: str, dtype: str, device: str, request: PruningRequest
) -> str | int | None:
    """Return the memory to stay within: what is given, or what there is if the model is larger."""
    from osscar.base.memory import in_words
    from osscar.models.load import fitting_memory
    from osscar.models.names import Sort, sort_of
    from osscar.pruning.memory import needs_memory

    if given is not None:
        return given
    if sort_of(model) is not Sort.LANGUAGE or needs_memory(request) is not None:
        return None
    limit = fitting_memory(model, dtype, device)
    if limit is not None:
        say(f"the weights stay on disk, since they do not fit: --max-memory {in_words(limit)}")
    return limit


@contextmanager
def guard() -> Iterator[None]:
    """Turn the errors that a user can cause into one line on standard error and status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        say_aside("error", str(error), "bold red")
        sys.exit(2)


def say(text: str) -> None:
    """Print one line to standard output."""
    out.print(printable(text), highlight=False)


def say_next(*commands: str) -> None:
    """Print commands to go on with, each in one line, however narrow a terminal is."""
    out.print("next:", style="bold")
    for command in commands:
        out.print(f"  {command}", highlight=False, soft_wrap=True)


def given_options(context: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    """Return those of a command's options that were given, as `command_line` takes them."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return {
        name: context.params[name]
        for name, source in sources.items()
        if source is not None and source.name != "DEFAULT"
    }


def chat_template_unused(tokenizer: Any) -> str:
    """Say, at the end of a sentence, that a chat template is not used, where there is one."""
    return ", no chat template" if getattr(tokenizer, "chat_template", None) else ""


def say_calibration(loaded: Any, data: Any) -> None:
    """Print what a language model is calibrated on, and how it computes."""
    from osscar.data.tokens import CalibrationSet
    from osscar.shrinking.lineage import Computed

    if not isinstance(data, CalibrationSet):
        return
    plain = chat_template_unused(loaded.tokenizer)
    say(f"calibration: {data.sentence()}{plain}; {Computed.of(loaded.model).sentence()}")


def say_aside(label: str, message: str, style: str) -> None:
    """Print one message to standard error, in one line that terminals wrap."""
    message = re.sub(r"\s*[\r\n]\s*", " ", message.strip())
    err.print(f"{label}:", style=style, end=" ")
    err.print(message, highlight=False, soft_wrap=True)


def _expected_errors() -> tuple[type[Exception], ...]:
    # Imported late: an error of a package can only come once it is loaded.
    trees = {"osscar.base.errors": "OsscarError", "solvers.errors": "SolverError"}
    trees["graph.errors"] = "GraphError"
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in trees.items()
        if module in sys.modules
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the chatter of libraries, and sum up warnings once the block has ended."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not err.is_terminal:
        transformers_logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    messages = list(
        dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    )
    for message in messages[:_SHOWN_WARNINGS]:
        say_aside("warning", message, "yellow")
    if len(messages) > _SHOWN_WARNINGS:
        more = counted(len(messages) - _SHOWN_WARNINGS, "warning")
        err.print(f"... and {more} more", style="yellow")


def document(kind: str, version: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with its schema, as ``docs/json.md`` describes it."""
    return {
        "schema": f"osscar.{kind}/{version}",
        "osscar_version": osscar.__version__,
        **content,
    }


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a document whole or not at all; nothing if `path` is None.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    from osscar.base import files

    if path is not None:
        files.write_json(path, content)


def check_json_path(
    path: Path | None,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
    written: Sequence[Path | None] = (),
    option: str = "--json",
) -> None:
    """Refuse a file that could not or must not be written, before any work is done.

    Parameters
    ----------
    path
        What was asked for, as with ``--json``; None is fine.
    inputs
        Files and directories that the command reads; names that are no paths do no harm.
    written
        What else the command writes: a directory, other files.
    option
        Which names the file.

    Raises
    ------
    OutputError
        If its directory does not exist, if it is a directory itself, or is or lies in what the
        command reads or writes, or if a file of another sort is there; as of a name that is not
        UTF-8, or a link that leads nowhere.
    """
    from osscar.base.errors import OutputError
    from osscar.base.files import resolved

    if path is None:
        return
    try:
        place = resolved(path)
        for used, verb in [
            *((name, "reads") for name in inputs),
            *((name, "writes") for name in written),
        ]:
            if used is not None and _covers(Path(used), place):
                raise OutputError(
                    f"{option} {path} would write to {used}, which the command {verb}; give another"
                )
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise OutputError(f"cannot write {path}: give a file in a directory that exists")
        if path.is_file() and path.open("rb").read(1) not in (b"", b"{", b"<"):
            raise OutputError(f"{path} is no JSON or SVG, and would be lost; give another name")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from error


def check_input(file: Path) -> None:
    """Refuse a file that a command is to read if reading it may never end.

    Raises
    ------
    OptionError
        If it is a pipe or a device; whoever reads it will say what else is wrong.
    """
    from osscar.base.errors import OptionError
    from osscar.base.inputs import check_regular

    try:
        check_regular(file)
    except OSError as error:
        raise OptionError(f"cannot read {str(file)!r}: {error.strerror}; copy it first") from error


def _covers(used: Path, place: Path) -> bool:
    """Return whether `place` is `used`, under whatever name, or lies in it."""
    with suppress(OSError, RuntimeError):
        resolved = used.resolve()
        if resolved == place or resolved in place.parents:
            return True
        return used.exists() and place.exists() and used.samefile(place)
    return False


@contextmanager
def way_back(kept: Callable[[], str]) -> Iterator[None]:
    """Say how to go on where someone interrupts the block, or where it cannot write.

    Parameters
    ----------
    kept
        Says what is kept by then, and where.
    """
    from osscar.base.errors import BusyError, OutputError, RanksError

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        say_aside("interrupted", f"{kept()}; give the same command again to go on", "yellow")
        raise
    except BusyError:
        raise
    except (OutputError, RanksError) as error:
        raise type(error)(
            f"{error}. {_begun(kept())}; give the same command again to go on"
        ) from error


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` pairs; a value is JSON where it can be, else text.

    Raises
    ------
    OptionError
        If a pair has no ``=``, or a value is nested too deeply to be read.
    """
    from osscar.base.errors import OptionError
    from osscar.base.inputs import shown

    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--option {shown(pair)} is not NAME=VALUE")
        try:
            options[name.strip()] = jsonlib.loads(value, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise OptionError(
                f"--option {shown(pair)} is nested too deeply; give a number, a text, or a list"
            ) from error
        except ValueError:
            options[name.strip()] = value
    return options


def _refuse_constant(text: str) -> Any:
    from osscar.base.errors import OptionError

    raise OptionError(f"--option cannot be {text}; give a finite number")
