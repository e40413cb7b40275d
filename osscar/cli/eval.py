"""``osscar eval``: what a model is worth, alone or beside its dense original."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osscar.base.printable import counted
from osscar.cli.common import (
    DeviceOption,
    DtypeOption,
    ImageSizeOption,
    JsonOption,
    MeanOption,
    ModelArgument,
    NoNormalizeOption,
    StdOption,
    TrustOption,
    WeightsOption,
    chat_template_unused,
    check_json_path,
    document,
    out,
    quiet,
    say,
    say_preprocessing,
    stated_preprocessing,
    write_json,
)

_NO_MODEL = 0.5
"""Share of a dense model's parameters beyond which, drawn anew, they are compared with nothing."""

if TYPE_CHECKING:
    from torch import nn

    from osscar.data.preprocessing import Preprocessing
    from osscar.evaluation.result import Comparison, Evaluation
    from osscar.evaluation.tensors import TensorQuality
    from osscar.shrinking.lineage import Computed


def command(
    model: ModelArgument,
    text: Annotated[
        str | None, typer.Option(help="Plain text to score; by default the built-in held-out text.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Images to score: a directory, with a folder for each class if they have labels, "
            "or FILE.npz with `images` and `labels` (FILE.npz:test for `test_images`)."
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Samples to score of any other kind, fed as they are: FILE.npz or "
            "FILE.safetensors, with an entry for each argument of the model's `forward`, and "
            "perhaps `labels`."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Score only so many of these, drawn at random.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="The dense model, to be measured side by side; code of your own also rebuilds "
            "the pruned one."
        ),
    ] = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    image_size: ImageSizeOption = None,
    no_normalize: NoNormalizeOption = False,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first N windows; by default the full text.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Windows (default 4), images or samples (default 32) at once."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure quality, speed, size and memory.

    Language models: perplexity over non-overlapping windows of the text; speed is told apart for
    reading a prompt (prefill) and writing token by token (decode).  Models that read images: top-1
    and top-5 where there are labels, and images per second.  With --against the models take turns,
    and for images agreement and divergence are measured, which need no labels.  Models that read
    anything else: the same where they put out scores of classes, and how far each output is from
    the dense model's.
    """
    from osscar.base.errors import OptionError
    from osscar.data.preprocessing import OPTIONS
    from osscar.models.open import check_directory, is_vision

    check_json_path(json, inputs=(model, against, text, images, inputs, weights))
    stated = stated_preprocessing(mean, std, image_size, no_normalize)
    check_directory(model)
    load: dict[str, Any] = {"device": device, "dtype": dtype}
    if is_vision(model):
        if text is not None or windows is not None or seqlen is not None:
            raise OptionError(f"{model} reads no text: leave --text, --windows and --seqlen away")
        batch = 32 if batch_size is None else batch_size
        found = _samples(model, images, inputs, samples, against, weights, batch, stated, load)
    else:
        if any(one is not None for one in (images, inputs, samples, weights, stated)):
            raise OptionError(
                f"{model} reads text, not images: leave --images, --inputs, --samples, --weights, "
                f"{OPTIONS} away"
            )
        batch = 4 if batch_size is None else batch_size
        options = {"windows": windows, "seqlen": seqlen, "batch_size": batch}
        load["trust_remote_code"] = trust_remote_code
        found = _language(model, text, against, options, load)
    _print(found, model)
    compared = None if found.comparison is None else against
    content = {
        **{"name": model, "against": compared, **found.source},
        **{"computed": dataclasses.asdict(found.computed), **found.numbers()},
    }
    write_json(json, document("eval", 2, content))


@dataclasses.dataclass(frozen=True)
class _Found:
    """What was measured, on what and how, and how much that was in words."""

    evaluation: Evaluation[Any, Any]
    comparison: Comparison[Any, Any] | None
    source: dict[str, Any]
    scored: str
    computed: Computed

    def numbers(self) -> dict[str, Any]:
        """Return `model`, and `dense` and `ratios` if there is a dense model."""
        if self.comparison is not None:
            return dataclasses.asdict(self.comparison)
        return {"model": dataclasses.asdict(self.evaluation)}


def _language(
    model: str, text: str | None, against: str | None, options: dict[str, Any], load: dict[str, Any]
) -> _Found:
    """Measure a language model."""
    from osscar.data.prose import Part, builtin_text
    from osscar.data.text import (
        as_words,
        check_same_tokens,
        read_text,
        refuse_overlap,
        special_tokens,
    )
    from osscar.evaluation.language import compare, evaluate
    from osscar.models.language import load_model
    from osscar.shrinking.lineage import Computed, lineage_of

    with quiet():
        content = builtin_text(Part.HELD_OUT) if text is None else read_text(text)
        loaded = load_model(model, **load)
        refuse_overlap(content, lineage_of(loaded.model).calibration)
        scored = (loaded.tokenizer, content)
        options = {**options, "path": loaded.path}
        comparison = None
        if against is None:
            evaluation = evaluate(loaded.model, *scored, **options)
        else:
            dense = load_model(against, **load)
            _warn_of_another(loaded.model, dense.model, against)
            check_same_tokens(loaded.tokenizer, dense.tokenizer, content)
            options["dense_path"] = dense.path
            comparison = compare(loaded.model, dense.model, *scored, **options)
            evaluation = comparison.model
    quality = evaluation.quality
    windows = f"{counted(quality.windows, 'window')} of {quality.seqlen}"
    before = as_words(loaded.tokenizer, special_tokens(loaded.tokenizer)[0])
    special = f"each begins with {before}" if before else "without special tokens"
    scored_text = "built-in held-out text" if text is None else text
    how_much = (
        f"{counted(quality.tokens, 'token')} of {scored_text} scored in {windows}, {special}"
        f"{chat_template_unused(loaded.tokenizer)}"
    )
    source = {"text": text or "builtin"}
    return _Found(evaluation, comparison, source, how_much, Computed.of(loaded.model))


def _samples(
    model: str,
    images: str | None,
    tensors: str | None,
    samples: int | None,
    against: str | None,
    weights: Path | None,
    batch_size: int,
    stated: Preprocessing | None,
    load: dict[str, Any],
) -> _Found:
    """Measure a model that reads no text; weights are for whichever model brings none."""
    from osscar.base.errors import ImageError, OptionError
    from osscar.data.images import refuse_overlap
    from osscar.evaluation.images import compare_images, evaluate_images
    from osscar.evaluation.tensors import compare_tensors, evaluate_tensors
    from osscar.models.names import sort_of
    from osscar.models.vision import load_vision_model
    from osscar.shrinking.lineage import Computed, lineage_of

    if images is None and tensors is None:
        raise ImageError(
            f"{model} reads no text: give --images a directory or an .npz file of images, or "
            "--inputs a file of whatever else it reads"
        )
    filled = {name for name in (model, against) if name and sort_of(name).takes_weights}
    if weights is not None and not filled:
        raise OptionError(f"{model} has weights of its own; leave --weights away")
    with quiet():
        own = weights if model in filled else None
        loaded = load_vision_model(model, weights=own, dense=against, preprocessing=stated, **load)
        options: dict[str, Any] = {"batch_size": batch_size, "path": loaded.path}
        evaluate: Any = evaluate_tensors
        compare: Any = compare_tensors
        data: Any = loaded.held_out(images, tensors)
        say_preprocessing(data)
        if images is not None:
            options["classes"] = loaded.classes
            evaluate, compare = evaluate_images, compare_images
        data = data if samples is None else data.sample(samples, seed=0)
        refuse_overlap(data, lineage_of(loaded.model).calibration)
        comparison = None
        if against is None:
            evaluation = evaluate(loaded.model, data, **options)
        else:
            own = weights if against in filled else None
            dense = load_vision_model(against, weights=own, **load)
            if dense.drawn > _NO_MODEL:  # numbers beside it would say nothing
                evaluation = evaluate(loaded.model, data, **options)
                warnings.warn(
                    f"no comparison: {against} without weights is no dense model, and numbers "
                    "beside its own would say nothing",
                    stacklevel=2,
                )
            else:
                _warn_of_another(loaded.model, dense.model, against)
                options["dense_path"] = dense.path
                comparison = compare(loaded.model, dense.model, data, **options)
                evaluation = comparison.model
    labels = "" if data.labels is not None else " without labels"
    name = data.sample_name if labels else f"labelled {data.sample_name}"
    how_much = f"{counted(len(data), name)}{labels} scored"
    computed = Computed.of(loaded.model)
    if images is not None:
        source = {"images": images, "preprocessing": data.preprocessing.record()}
        return _Found(evaluation, comparison, source, how_much, computed)
    how_much = f"{how_much}, {_as_what(evaluation)}"
    return _Found(evaluation, comparison, {"inputs": tensors}, how_much, computed)


def _as_what(evaluation: Evaluation[TensorQuality, Any]) -> str:
    """Say what the outputs were taken for."""
    found = evaluation.quality.classes_in
    return "no output as scores of classes" if found is None else f"{found!r} as scores of classes"


def _warn_of_another(model: nn.Module, dense: nn.Module, against: str) -> None:
    """Warn where the weights that a model was pruned from are known, and are others."""
    from osscar.shrinking.lineage import may_come_from

    if not may_come_from(model, dense):
        warnings.warn(
            f"{against} is not the dense model that this one was pruned from: its weights are "
            "others; give the same weights to measure what pruning changed",
            stacklevel=2,
        )


def _print(found: _Found, name: str) -> None:
    """Print the numbers of a model, beside those of the dense one if there is one."""
    from osscar.report.evaluation_tables import comparison_table, evaluation_table

    evaluation = found.evaluation
    if found.comparison is None:
        out.print(evaluation_table(evaluation, name))
    else:
        out.print(comparison_table(found.comparison, Path(name).name))
    say(f"{found.scored}; {found.computed.sentence()}")
    numbers = evaluation.numbers()
    if found.comparison is None and numbers.get("top1", numbers.get("perplexity")) is None:
        say("nothing is known of its quality: that takes labels, or --against the dense model")
