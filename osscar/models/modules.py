"""Models that are plain modules: torchvision's, a user's own, and what became of these."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import ModelError
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.builders import TorchvisionOrigin, builder_of
from osscar.checkpoint.formats import cast
from osscar.data.batches import needed_arguments, to_model
from osscar.data.preprocessing import AnyPreprocessing, Preprocessing, import_torchvision
from osscar.models import user_code
from osscar.models.loaded import LoadedModel
from osscar.models.names import PREFIX, ModelKind, kind_of
from osscar.models.preprocessing import image_of, of_the_run, recorded_example, resolved
from osscar.models.weights import fill, read_state, renamed
from osscar.network.modules import check_finite_weights, check_usable, in_evaluation
from osscar.shrinking.lineage import lineage_of, note, stored_dtype

_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}
"""What torchvision sets for its own weights beyond the defaults."""


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
    """Load a model that is not of transformers, as `osscar.load_model` does.

    `kind` is what its name stands for; a dtype of None is the one stored.
    """
    if kind is ModelKind.TORCHVISION:
        loaded = _from_torchvision(name.removeprefix(PREFIX), weights, pretrained)
    elif kind is ModelKind.CODE:
        loaded = _from_code(name, weights)
    else:
        loaded = _from_directory(Path(name).expanduser(), kind, dense, dtype)
    check_usable(loaded.model)
    check_finite_weights(loaded.model)
    unfilled = kind is ModelKind.CODE and weights is None and pretrained
    drawn = user_code.drawn_share(name, loaded.model) if unfilled else 0.0
    known, example = resolved(
        loaded.model, loaded.example, loaded.preprocessing, preprocessing, loaded.source
    )
    model = loaded.model if dtype is None else cast(loaded.model, dtype)
    model = in_evaluation(model.to(device))
    note(
        model,
        source=lineage_of(model).source or loaded.source,
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


# ---- torchvision -------------------------------------------------------------------------


def _from_torchvision(name: str, weights: str | Path | None, pretrained: bool) -> LoadedModel:
    models = import_torchvision("models")
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ModelError(f"torchvision has no classification model {name!r}{hint}")
    preset = models.get_model_weights(name).DEFAULT
    state = None
    if weights is not None:
        state = read_state(weights)
    elif pretrained:
        state = _fetched(name, preset)
    model = _filled(name, state, str(weights or preset))
    # Weights of the same name for other classes have the number of these in their options.
    origin = lineage_of(model).origin
    of_preset = origin is None or "num_classes" not in origin.options
    return LoadedModel(
        model=model,
        source=f"torchvision {name}",
        path=None,
        stored_dtype=_dtype(model),
        preprocessing=Preprocessing.of(preset.transforms()),
        classes=tuple(preset.meta["categories"]) if of_preset else (),
    )


def _fetched(name: str, preset: Any) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = preset.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError) as error:  # no connection; or a file that is not what was asked
        raise ModelError(
            f"torchvision's weights of {name!r} cannot be fetched ({error}): connect, or get "
            f"{preset.url} elsewhere and give it as --weights FILE"
        ) from error
    return renamed(state)


def _filled(name: str, state: dict[str, Tensor] | None, source: str) -> nn.Module:
    """Build a model, with as many classes as the weights have, and fill it."""
    options: dict[str, Any] = dict(_OPTIONS.get(name, {}))
    model = TorchvisionOrigin(name, options).build()
    if state is None:
        return model.eval()
    classes = _other_classes(model, state)
    if classes is not None:
        options["num_classes"] = classes
        model = TorchvisionOrigin(name, options).build()
    own = model.state_dict()
    auxiliary = [key for key in state if key.startswith(("aux", "AuxLogits")) and key not in own]
    fill(model, {key: state[key] for key in state if key not in auxiliary}, source)
    return model.eval()


def _other_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of the weights, if that is all in which they differ."""
    pairs = [(tensor, state[key]) for key, tensor in model.state_dict().items() if key in state]
    differing = [(a.shape, b.shape) for a, b in pairs if a.shape != b.shape]
    if not differing or any(a[1:] != b[1:] for a, b in differing):
        return None
    counts = {b[0] for _, b in differing}
    return counts.pop() if len(counts) == 1 else None


# ---- code and directories ----------------------------------------------------------------


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
        stored_dtype=_dtype(model),
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
                "what builds the dense one (--against module:function, --dense of osscar recover, "
                f"or dense= of osscar.load){given}"
            )
        built, example, brought = user_code.build(dense)
    model = checkpoint.load(path, dense=built, dtype=dtype)
    lineage, builder = lineage_of(model), builder_of(model)
    if isinstance(builder, TorchvisionOrigin):
        preset = import_torchvision("models").get_model_weights(builder.name).DEFAULT.transforms()
        # Presets of segmentation and detection models lead to no image of one size.
        brought = Preprocessing.of(preset) if hasattr(preset, "crop_size") else None
    pruned_with = recorded_example(path, lineage.inputs)
    if pruned_with is not None and (example is None or image_of(pruned_with) is not None):
        example = pruned_with
    return LoadedModel(
        model=model,
        example=example,
        preprocessing=of_the_run(path, lineage, brought, pruned_with),
        source=f"directory {path}",
        path=path,
        stored_dtype=stored_dtype(model),
        classes=lineage.classes,
        stated=example,
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)
