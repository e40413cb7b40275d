"""``osscar eval``: what a model is worth, alone or beside its dense original."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osscar.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    WeightsOption,
    check_json_path,
    document,
    out,
    quiet,
    write_json,
)

if TYPE_CHECKING:
    from osscar.shrinking.lineage import Calibration


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
    samples: Annotated[
        int | None, typer.Option(min=1, help="Score only so many images, drawn at random.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="The dense model, to be measured side by side; code of your own also rebuilds "
            "the pruned one."
        ),
    ] = None,
    weights: WeightsOption = None,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first N windows; by default the full text.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows (default 4) or images (default 32) at once.")
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
    and for images agreement and divergence are measured, which need no labels.
    """
    from osscar.core.errors import OptionError
    from osscar.models.vision import check_directory, is_vision

    check_json_path(json, inputs=(model, against, text, images, weights))
    check_directory(model)
    load: dict[str, Any] = {"device": device, "dtype": dtype}
    if is_vision(model):
        if text is not None or windows is not None or seqlen is not None:
            raise OptionError(
                f"{model} reads images, not text: leave --text, --windows and --seqlen away"
            )
        batch = 32 if batch_size is None else batch_size
        content = _images(model, images, samples, against, weights, batch, load)
    else:
        if images is not None or samples is not None or weights is not None:
            raise OptionError(
                f"{model} reads text, not images: leave --images, --samples and --weights away"
            )
        options = {"windows": windows, "seqlen": seqlen, "batch_size": batch_size or 4}
        load["trust_remote_code"] = trust_remote_code
        content = _language(model, text, against, options, load)
    write_json(json, document("eval", 1, {"name": model, "against": against, **content}))


def _language(
    model: str,
    text: str | None,
    against: str | None,
    options: dict[str, Any],
    load: dict[str, Any],
) -> dict[str, Any]:
    """Measure a language model, print what came out, and return it."""
    from osscar.data.prose import Part, builtin_text
    from osscar.data.text import read_text
    from osscar.evaluation.language import compare, evaluate
    from osscar.models.language import load_model
    from osscar.report.tables import comparison_table, evaluation_table
    from osscar.shrinking.lineage import lineage_of

    with quiet():
        content = builtin_text(Part.HELD_OUT) if text is None else read_text(text)
        loaded = load_model(model, **load)
        refuse_calibration_text(lineage_of(loaded.model).calibration, content)
        options = {**options, "path": loaded.path}
        if against is None:
            evaluation = evaluate(loaded.model, loaded.tokenizer, content, **options)
            out.print(evaluation_table(evaluation, model))
            result: dict[str, Any] = {"model": dataclasses.asdict(evaluation)}
        else:
            dense = load_model(against, **load)
            comparison = compare(
                loaded.model, dense.model, loaded.tokenizer, content,
                **options, dense_path=dense.path,
            )  # fmt: skip
            out.print(comparison_table(comparison, name=Path(model).name))
            evaluation, result = comparison.model, dataclasses.asdict(comparison)
    quality = evaluation.quality
    out.print(
        f"{quality.tokens:,} tokens scored in {quality.windows:,} windows of {quality.seqlen}, "
        f"{evaluation.dtype} on {evaluation.device}"
    )
    return {"text": text or "builtin", **result}


def _images(
    model: str,
    spec: str | None,
    samples: int | None,
    against: str | None,
    weights: Path | None,
    batch_size: int,
    load: dict[str, Any],
) -> dict[str, Any]:
    """Measure a model that reads images, print what came out, and return it."""
    from osscar.core.errors import ImageError
    from osscar.data.images import load_images, refuse_overlap
    from osscar.evaluation.images import compare_images, evaluate_images
    from osscar.models.vision import load_vision_model
    from osscar.report.tables import image_comparison_table, image_evaluation_table
    from osscar.shrinking.lineage import lineage_of

    if spec is None:
        raise ImageError(f"{model} reads images: give --images a directory or an .npz file")
    with quiet():
        loaded = load_vision_model(model, weights=weights, dense=against, **load)
        images = load_images(spec, loaded.preprocessing)
        images = images if samples is None else images.sample(samples, seed=0)
        refuse_overlap(images, lineage_of(loaded.model).calibration)
        options: dict[str, Any] = {
            **{"classes": loaded.classes, "batch_size": batch_size},
            "path": loaded.path,
        }
        if against is None:
            evaluation = evaluate_images(loaded.model, images, **options)
            out.print(image_evaluation_table(evaluation, model))
            result: dict[str, Any] = {"model": dataclasses.asdict(evaluation)}
        else:
            dense = load_vision_model(against, weights=weights, **load)
            comparison = compare_images(
                loaded.model, dense.model, images, **options, dense_path=dense.path
            )
            out.print(image_comparison_table(comparison, name=Path(model).name))
            evaluation, result = comparison.model, dataclasses.asdict(comparison)
    kind = "labelled images" if images.labels is not None else "images without labels"
    out.print(
        f"{evaluation.quality.images:,} {kind} scored, {evaluation.dtype} on {evaluation.device}"
    )
    return {"images": spec, **result}


def refuse_calibration_text(calibration: Iterable[Calibration], text: str) -> None:
    """Refuse to score the text that a model was calibrated on.

    Raises
    ------
    TextError
        If the lineage of the model names this text.
    """
    from osscar.core.errors import TextError
    from osscar.data.text import text_digest

    digest = text_digest(text)
    for known in calibration:
        if known.sha256 == digest:
            raise TextError(
                f"this model was calibrated on this very text ({known.source}); score another one"
            )
