"""Models that are no language models: of libraries, a user's own, and what became of these."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from osscar.base.errors import ModelError
from osscar.base.printable import published
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.builders import TorchvisionOrigin, builder_of
from osscar.checkpoint.formats import cast
from osscar.data.batches import needed_arguments, to_model
from osscar.data.preprocessing import AnyPreprocessing
from osscar.models import user_code
from osscar.models.classifiers import load_classifier
from osscar.models.libraries import load_of_library, preprocessing_of
from osscar.models.loaded import LoadedModel
from osscar.models.names import LIBRARIES, ModelKind, kind_of
from osscar.models.preprocessing import image_of, of_directory, recorded_example, resolved
from osscar.models.weights import fill, read_state
from osscar.network.modules import check_finite_weights, check_usable, in_evaluation
from osscar.proof.lineage import lineage_of, note, stored_dtype


def load_module(
    name: str,
    kind: ModelKind,
    *,
    weights: str | Path | None,
    pretrained: bool,
    dense: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
    preprocessing: AnyPreprocessing | None,
) -> LoadedModel:
    """Load a model that is no language model, as `osscar.load_model` does.

    `kind` is what its name stands for; a dtype of None is the one stored.
    """
    if kind in LIBRARIES.values():
        loaded = load_of_library(name, weights, pretrained)
    elif kind is ModelKind.CLASSIFIER:
        loaded = load_classifier(name)
    elif kind is ModelKind.CODE:
        loaded = _from_code(name, weights)
    else:
        loaded = _from_directory(Path(name).expanduser(), kind, dense, dtype)
    check_usable(loaded.model)
    check_finite_weights(loaded.model)
    unfilled = kind is ModelKind.CODE and weights is None and pretrained
    drawn = user_code.drawn_share(name, loaded.model) if unfilled else loaded.drawn
    known, example = resolved(
        loaded.model, loaded.example, loaded.preprocessing, preprocessing, loaded.source
    )
    model = loaded.model if dtype is None else cast(loaded.model, dtype)
    model = in_evaluation(model.to(device))
    note(
        model,
        source=lineage_of(model).source or published(loaded.source),
        classes=loaded.classes,
        preprocessing=None if known is None else known.record(),
        stored_dtype=str(loaded.stored_dtype).removeprefix("torch."),
    )
    return dataclasses.replace(
        loaded,
        model=model,
        example=None if example is None else to_model(example, model),
        preprocessing=known,
        states_images=preprocessing is not None,
        drawn=drawn,
    )


def _from_code(name: str, weights: str | Path | None) -> LoadedModel:
    model, example, preprocessing = user_code.build(name)
    if weights is not None:
        fill(model, read_state(weights), str(weights))
    needed = needed_arguments(model)
    if example is None and len(needed) > 1:
        raise ModelError(
            f"{name} gives no example inputs, and its model reads {', '.join(needed)}; return the "
            "model, and a mapping of these names to tensors"
        )
    return LoadedModel(
        model=model,
        example=example,
        preprocessing=preprocessing,
        source=name,
        path=None,
        stored_dtype=stored_dtype(model),
        stated=example,
    )


def _from_directory(
    path: Path, kind: ModelKind, dense: str | None, dtype: torch.dtype | None
) -> LoadedModel:
    built, example, brought = None, None, None
    if kind is ModelKind.CODE_DIRECTORY:
        if dense is None or kind_of(dense) is not ModelKind.CODE:
            given = "" if dense is None else f", not {dense!r}"
            raise ModelError(
                f"{path} holds a model of your own code, which a checkpoint does not contain: say "
                "what builds the dense one (--dense module:function, or dense= of "
                f"osscar.load){given}"
            )
        built, example, brought = user_code.build(dense)
    model = checkpoint.load(path, dense=built, dtype=dtype)
    lineage, builder = lineage_of(model), builder_of(model)
    if isinstance(builder, TorchvisionOrigin):
        brought = preprocessing_of(builder, model)
    pruned_with = recorded_example(path, lineage.inputs)
    if pruned_with is not None and (example is None or image_of(pruned_with) is not None):
        example = pruned_with
    return LoadedModel(
        model=model,
        example=example,
        preprocessing=of_directory(path, lineage, brought),
        source=f"directory {path}",
        path=path,
        stored_dtype=stored_dtype(model),
        classes=lineage.classes,
        stated=example,
    )
