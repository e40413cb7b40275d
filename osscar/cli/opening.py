"""How commands open models and draw data, run if they save a model, and what people are told."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from osscar.base.errors import OptionError
from osscar.base.files import resolved
from osscar.base.memory import in_words
from osscar.base.printable import pluralize
from osscar.base.ranks import Ranks
from osscar.checkpoint.directory import SavedCheckpoint, weight_bytes
from osscar.checkpoint.files import check_output
from osscar.cli.common import err, named_files, say, say_aside, way_back, write_json
from osscar.cli.options import (
    DataOptions,
    EvalOptions,
    InspectOptions,
    OpenOptions,
    PruneOptions,
    RecoverOptions,
    RunOptions,
    SweepOptions,
    refuse,
)
from osscar.data.batches import CalibrationData
from osscar.data.images import ImageSet
from osscar.data.loaders import DEFAULT_WINDOWS
from osscar.data.preprocessing import Preprocessing
from osscar.data.samples import SampleSet
from osscar.data.text import DEFAULT_SEQLEN, CalibrationSet, TextSet
from osscar.models.load import fitting_memory, load_model
from osscar.models.loaded import LoadedModel
from osscar.models.names import ModelKind, kind_of
from osscar.proof.lineage import Computed
from osscar.recovery.training import RecoveryLog
from osscar.request import PruningRequest
from osscar.run.memory import needs_memory
from osscar.run.run_log import RunLog
from osscar.walk.targets import Target

_SHOWN_WARNINGS = 3


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the chatter of libraries, and sum up warnings once the block has ended."""
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
        more = pluralize(len(messages) - _SHOWN_WARNINGS, "warning")
        err.print(f"... and {more} more", style="yellow")


def stated_preprocessing(options: OpenOptions | InspectOptions) -> Preprocessing | None:
    """Return what options state of images; None if they state nothing."""
    known: dict[str, Any] = {}
    if isinstance(options, OpenOptions):
        for name, text in (("mean", options.mean), ("std", options.std)):
            if text is not None:
                known[name] = _numbers(text, f"--{name}", float, ",", "0.5 or 0.49,0.48,0.45")
        if options.no_normalize:
            refuse(options, ("mean", "std"), "omit it, or --no-normalize")
            known = {"mean": 0.0, "std": 1.0}
    if options.image_size is not None:
        found = _numbers(options.image_size, "--image-size", int, "x", "32, 24x32 or 1x28x28")
        *channels, height, width = found * 2 if len(found) == 1 else found
        known["crop"] = height, width
        if channels:
            known["channels"] = channels[0]
    return Preprocessing(**known) if known else None


def _numbers(
    text: str, option: str, kind: type[Any], separator: str, example: str
) -> tuple[Any, ...]:
    found: tuple[Any, ...] = ()
    with suppress(ValueError):
        found = tuple(map(kind, text.split(separator)))
    if not 1 <= len(found) <= 3 or (kind is int and min(found) < 1):
        raise OptionError(f"{option} is {text!r:.60}; give numbers such as {example}")
    return found


def opened(model: str, options: DataOptions, **more: Any) -> LoadedModel:
    """Open a model; `more` is for `osscar.load_model`.  Warnings come before the work."""
    with quiet():
        return load_model(
            model,
            weights=options.weights,
            dense=options.dense,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            preprocessing=stated_preprocessing(options),
            **more,
        )


def calibration(
    loaded: LoadedModel, options: DataOptions, seed: int, **more: Any
) -> CalibrationData:
    """Draw what a model is calibrated on, and tell it; `more` is for `LoadedModel.calibration`."""
    asked = {"samples": options.samples, "seqlen": options.seqlen, "seed": seed}
    with quiet():
        data = loaded.calibration(options.calibration, **{**asked, **more})
    tell_data("calibration", loaded, data, always=False)
    return data


def held_out(
    loaded: LoadedModel, options: EvalOptions | SweepOptions
) -> TextSet | SampleSet | None:
    """Find the test data that options name."""
    names = ("text", "images", "inputs", "windows", "seqlen")
    return loaded.held_out(**{name: getattr(options, name) for name in names})


def tell_data(what_for: str, loaded: LoadedModel, data: CalibrationData, always: bool) -> None:
    """Print what is done to images, and which text it is; or which data, where `always` is set."""
    if isinstance(data, ImageSet):
        say(f"images: {data.sentence()}")
    if isinstance(data, CalibrationSet):
        what = f"{data.sentence()}{chat_template_unused(loaded.tokenizer)}"
    elif always:
        what = f"{pluralize(len(data), data.sample_name)} of {data.source}"
    else:
        return
    say(f"{what_for}: {what}; {Computed.of(loaded.model).sentence()}")


def limit_of(model: str, options: RunOptions, request: PruningRequest) -> str | int | None:
    """Return the memory to stay within: what is given, or what there is if the model is larger."""
    of_text = kind_of(model) is ModelKind.LANGUAGE
    if options.max_memory is not None or not of_text or needs_memory(request) is not None:
        return options.max_memory
    tokens = (options.samples or DEFAULT_WINDOWS) * (options.seqlen or DEFAULT_SEQLEN)
    positions = tokens * (2 if Target(request.target).needs_dense else 1)
    limit = fitting_memory(model, options.dtype, request.device, positions=positions)
    if limit is not None:
        say(f"the weights stay on disk, since they do not fit: --max-memory {in_words(limit)}")
    return limit


def chat_template_unused(tokenizer: Any) -> str:
    """Say, at the end of a sentence, that a chat template is not used, where there is one."""
    return ", no chat template" if getattr(tokenizer, "chat_template", None) else ""


# ---- saving ------------------------------------------------------------------------------


def beside(output: Path, name: str) -> Path:
    """Return a directory beside an output, called like it."""
    path = resolved(output)
    return path.with_name(f"{path.name}.{name}")


@contextmanager
def saving(
    options: PruneOptions | RecoverOptions,
    where: Path,
    used: Sequence[str | Path],
    ranks: Ranks,
    logs: Sequence[RunLog | RecoveryLog],
) -> Iterator[bool]:
    """Let each rank make a model in the block, which the first saves; yield whether to overwrite.

    The logs have what is done so far, and go when the block has ended, the first last.  What is
    `used` must not be replaced.
    """
    # What is there where a run was ended is what it has saved, or was asked to replace.
    overwrite = options.overwrite or (logs[0].exists and not options.restart)

    def kept() -> str:
        return ", and ".join(filter(None, (log.kept for log in logs)))

    def remove() -> None:
        for log in reversed(logs):
            log.remove()

    if ranks.first:
        inputs = [*used, *named_files(options), options.json]
        check_output(resolved(where), overwrite=overwrite, inputs=inputs)
    with ExitStack() as stack:
        with way_back(kept, restarts=options.restart):
            if ranks.first:
                for log in logs:
                    stack.enter_context(log.locked())
            stack.enter_context(quiet())
            if options.restart and ranks.first:
                remove()
            yield overwrite
        if ranks.first:
            remove()


def check_room(loaded: LoadedModel, where: Path, overwrite: bool) -> None:
    """Refuse an output that has no room for a model's weights."""
    needed = weight_bytes(loaded.model, loaded.stored_dtype)
    check_output(resolved(where), overwrite=overwrite, needed_bytes=needed)


def write_copy(
    options: PruneOptions | RecoverOptions, content: Mapping[str, Any], saved: SavedCheckpoint
) -> None:
    """Write the report where ``--json`` wants it, too."""
    where = {**dataclasses.asdict(saved), "path": str(saved.path)}
    write_json(options.json, {**content, "saved": where})


def saved_line(saved: SavedCheckpoint, where: Path) -> str:
    """Say where a model was saved, as it was asked for, and who reads it."""
    reader = "osscar.load reads it"
    if saved.stock:
        reader = "from_pretrained of transformers reads it"
    elif saved.with_code:
        reader += ", and so does from_pretrained(..., trust_remote_code=True)"
    here = "" if saved.fresh else "; read back in this process alone"
    return f"saved: {where} ({saved.bytes / 1e6:.1f} MB of weights; {reader}{here})"
