"""``osscar eval``: what a model is worth, alone or beside its dense original."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from osscar.base.errors import DataError, ModelError
from osscar.base.printable import pluralize
from osscar.cli.common import check_files, document, say, show, write_json
from osscar.cli.opening import chat_template_unused, held_out, quiet, stated_preprocessing
from osscar.cli.options import EvalOptions, refuse
from osscar.data.images import ImageSet
from osscar.data.samples import SampleSet
from osscar.data.text import TextSet
from osscar.evaluation.evaluate import (
    Evaluation,
    compare,
    comparison_table,
    evaluate,
    evaluation_table,
)
from osscar.export.open_program import example_for
from osscar.models.load import load_model
from osscar.models.loaded import LoadedModel
from osscar.models.names import ModelKind, kind_of
from osscar.proof.lineage import Computed, lineage_of
from osscar.proof.seen import refuse_overlap
from osscar.shrinking.shrink import prove


def run(model: str, options: EvalOptions) -> None:
    """Measure quality, speed, size and memory."""
    dense, weights = options.dense, options.weights
    check_files(options, model)
    if dense is None:
        refuse(options, ("prove", "other_dense"), "give --dense MODEL, too, or omit it")
    load = {name: getattr(options, name) for name in ("device", "dtype", "trust_remote_code")}
    sort = kind_of(model)
    elsewhere = dense is not None and kind_of(dense).takes_weights and not sort.takes_weights
    with quiet():
        loaded = load_model(
            model,
            weights=None if elsewhere else weights,
            dense=dense if sort is ModelKind.CODE_DIRECTORY else None,
            preprocessing=stated_preprocessing(options),
            **load,
        )
        data = held_out(loaded, options)
        if data is None:
            raise DataError(
                f"{model} reads no text: give --images a directory or an .npz file of images, or "
                "--inputs a file of whatever else it reads"
            )
        if isinstance(data, ImageSet):
            say(f"images: {data.sentence()}")
        if isinstance(data, TextSet):
            refuse(options, ("samples",), f"{model} reads text, not images: omit it")
        elif options.samples is not None:
            data = data.sample(options.samples, seed=0)
        refuse_overlap(data, lineage_of(loaded.model).calibration)
        how: dict[str, Any] = {"path": loaded.path, "batch_size": options.batch_size}
        comparison, structure = None, None
        if dense is not None:
            original = _original(loaded, dense, data, weights, load)
            if isinstance(data, TextSet):
                data.check_same_tokens(original.tokenizer)
            how |= {"dense_path": original.path, "other_dense": options.other_dense}
            comparison = compare(loaded.model, original.model, data, **how)
            if options.prove:
                structure = prove(loaded.model, original.model, example_for(loaded.model))
        evaluation = evaluate(loaded.model, data, **how) if comparison is None else comparison.model
    computed = Computed.of(loaded.model)
    if comparison is None:
        show(evaluation_table(dataclasses.asdict(evaluation), model))
    else:
        show(comparison_table(dataclasses.asdict(comparison), Path(model).name))
    say(f"{_scored(data, evaluation, loaded)}; {computed.sentence()}")
    if structure is not None:
        say(f"proved again: {structure.sentence()}")
    numbers = evaluation.numbers()
    if comparison is None and numbers.get("top1", numbers.get("perplexity")) is None:
        say("nothing is known of its quality: that takes labels, or --dense the dense model")
    content = {
        "name": model,
        "dense_name": dense,
        **_source(data, options),
        "computed": dataclasses.asdict(computed),
        "structure": None if structure is None else dataclasses.asdict(structure),
        "model": dataclasses.asdict(evaluation),
        **({} if comparison is None else dataclasses.asdict(comparison)),
    }
    write_json(options.json, document("eval", 4, content))


def _original(
    loaded: LoadedModel,
    dense: str,
    data: TextSet | SampleSet,
    weights: Path | None,
    load: dict[str, Any],
) -> LoadedModel:
    """Load the dense model of a pruned one, which reads what that reads."""
    sort = kind_of(dense)
    if (sort is ModelKind.LANGUAGE) != isinstance(data, TextSet):
        reads = "text" if isinstance(data, TextSet) else "no text"
        raise ModelError(
            f"{dense!r} is {sort.value}, and {loaded.source} reads {reads}; give the dense model "
            "that it was pruned from"
        )
    return load_model(dense, weights=weights if sort.takes_weights else None, **load)


def _scored(data: TextSet | SampleSet, evaluation: Evaluation, loaded: LoadedModel) -> str:
    """Say what was scored, how much of it, and what outputs were taken for."""
    quality = evaluation.quality
    if isinstance(data, TextSet):
        windows = f"{pluralize(quality.windows, 'window')} of {quality.seqlen}"
        begin = data.begins_with
        special = f"each begins with {begin}" if begin else "without special tokens"
        return (
            f"{pluralize(quality.tokens, 'token')} of {data.source} scored in {windows}, {special}"
            f"{chat_template_unused(loaded.tokenizer)}"
        )
    scored = data.labels is not None and quality.classes_in is not None
    name = f"labelled {data.sample_name}" if scored else data.sample_name
    how_much = f"{pluralize(len(data), name)}{'' if scored else ' without labels'} scored"
    if isinstance(data, ImageSet):
        return how_much
    scores = "no output" if quality.classes_in is None else repr(quality.classes_in)
    last = scored and data.predictions and quality.predictions <= len(data)
    return f"{how_much}, {scores} as scores of classes{' of the last position' if last else ''}"


def _source(data: TextSet | SampleSet, options: EvalOptions) -> dict[str, Any]:
    """Return what was scored as it was given, and what was done to images."""
    if isinstance(data, ImageSet):
        return {"images": options.images, "preprocessing": data.preprocessing.record()}
    if options.inputs is not None:
        return {"inputs": options.inputs}
    return {"text": options.text or data.source}
