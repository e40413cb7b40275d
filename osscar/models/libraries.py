"""Models of torchvision and timm by name, with what their weights say of images."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import ModelError, first_line
from osscar.base.optional import import_timm, import_torchvision
from osscar.checkpoint.builders import TimmOrigin, TorchvisionOrigin
from osscar.data.batches import Batch, named_inputs
from osscar.data.preprocessing import AnyPreprocessing, OwnTransform, Preprocessing
from osscar.models.loaded import LoadedModel
from osscar.models.weights import fill, read_state, renamed
from osscar.network.detectors import DetectorNetwork
from osscar.proof.lineage import lineage_of, stored_dtype

_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}
"""What torchvision sets for its own weights beyond the defaults."""

_FRAMES = 16
"""Of a clip, as most video models of torchvision were trained."""

_FLOW_SIDE = 128
"""The least height and width of what models of optical flow read."""


def load_of_library(name: str, weights: str | Path | None, pretrained: bool) -> LoadedModel:
    """Load ``LIBRARY:NAME`` with weights of a file, of its library, or none that were trained."""
    library, _, own_name = name.partition(":")
    load = _from_timm if library == TimmOrigin.library else _from_torchvision
    loaded = load(own_name, weights, pretrained)
    if weights is not None or pretrained:
        return loaded
    source = f"{loaded.source}, freshly initialized weights"
    return replace(loaded, source=source, drawn=1.0)


def preprocessing_of(origin: TorchvisionOrigin, model: nn.Module) -> AnyPreprocessing | None:
    """Return what the library does to images for the weights of a name; None if to no images."""
    if isinstance(origin, TimmOrigin):
        return _of_timm(model, origin.name)
    if isinstance(model, DetectorNetwork):
        return _of_detector(model)
    preset = import_torchvision("models").get_model_weights(origin.name).DEFAULT.transforms()
    return None if _task(origin.name) in _EXAMPLES else Preprocessing.of(preset)


def _check_known(name: str, known: list[str], library: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        listing = "torchvision.models" if library == TorchvisionOrigin.library else library
        hint = f"did you mean {' or '.join(close)}" if close else f"see {listing}.list_models()"
        raise ModelError(f"{library} has no model {name!r}; {hint}{'?' if close else ''}")


# ---- torchvision -------------------------------------------------------------------------


def _from_torchvision(name: str, weights: str | Path | None, pretrained: bool) -> LoadedModel:
    models = import_torchvision("models")
    _check_known(name, models.list_models(), "torchvision")
    if _task(name) == "quantization":
        raise ModelError(
            f"torchvision's {name!r} is for quantized weights, which cannot be refitted; prune "
            f"torchvision:{name.removeprefix('quantized_')}, and quantize what comes of it"
        )
    preset = models.get_model_weights(name).DEFAULT
    state = None
    if weights is not None:
        state = read_state(weights)
    elif pretrained:
        state = _fetched(name, preset)
    dense = TorchvisionOrigin(name, dict(_OPTIONS.get(name, {})))
    model = _filled(dense, state, str(weights or preset))
    origin = lineage_of(model).origin
    # Weights of the same name for other classes have the number of these in their options.
    of_preset = origin is None or "num_classes" not in origin.options
    return LoadedModel(
        model=model,
        example=_EXAMPLES[_task(name)](model, preset) if _task(name) in _EXAMPLES else None,
        source=f"torchvision {name}",
        path=None,
        stored_dtype=stored_dtype(model),
        preprocessing=preprocessing_of(TorchvisionOrigin(name), model),
        classes=tuple(preset.meta.get("categories", ())) if of_preset else (),
    )


def _task(name: str) -> str:
    """Return the part of `torchvision.models` that a model is in; its file of a classifier."""
    builder = import_torchvision("models").get_model_builder(name)
    return str(builder.__module__.split(".")[2])


def _clips(model: nn.Module, preset: Any) -> Batch:
    """Return two clips like those that a video model was trained on."""
    return named_inputs(model, (torch.zeros(2, 3, _FRAMES, *_square(preset.transforms())),))


def _square(preset: Any) -> tuple[int, int]:
    height, width = (*preset.crop_size, *preset.crop_size)[:2]
    return int(height), int(width)


def _pairs(model: nn.Module, preset: Any) -> Batch:
    """Return two pairs of frames for a model of optical flow."""
    frames = torch.zeros(2, 3, _FLOW_SIDE, _FLOW_SIDE)
    return named_inputs(model, (frames, frames))


_EXAMPLES = {"video": _clips, "optical_flow": _pairs}
"""Inputs of what reads no single images, by its task."""


def _of_detector(model: DetectorNetwork) -> Preprocessing:
    """Return what a detector does to images itself, to those of one size."""
    transform: Any = model.detector().transform
    fixed = transform.fixed_size  # width and height
    size = int(transform.min_size[0]) if fixed is None else (int(fixed[1]), int(fixed[0]))
    return Preprocessing(
        resize=size,
        crop=size,
        mean=tuple(map(float, transform.image_mean)),
        std=tuple(map(float, transform.image_std)),
        interpolation="bilinear",
        channels=3,
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


def _filled(origin: TorchvisionOrigin, state: dict[str, Tensor] | None, source: str) -> nn.Module:
    """Build a model, with as many classes as the weights have, and fill it."""
    model = origin.build()
    if state is None:
        return model.eval()
    classes = _other_classes(model, state)
    if classes is not None:
        options = {**origin.options, "num_classes": classes}
        model = type(origin)(origin.name, options).build()
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


# ---- timm --------------------------------------------------------------------------------


def _from_timm(name: str, weights: str | Path | None, pretrained: bool) -> LoadedModel:
    timm = import_timm()
    bare = name.partition(".")[0]
    _check_known(bare, timm.list_models(), "timm")
    if name != bare:
        _check_known(name, timm.list_pretrained(f"{bare}.*"), "timm")
    state = None
    if weights is not None:
        state = read_state(weights)
    elif pretrained:
        state = _fetched_by_timm(timm, name)
    model = _filled(TimmOrigin(name), state, str(weights or f"timm {name}"))
    return LoadedModel(
        model=model,
        source=f"timm {name}",
        path=None,
        stored_dtype=stored_dtype(model),
        preprocessing=_of_timm(model, name),
        classes=_classes_of_timm(model),
    )


def _fetched_by_timm(timm: Any, name: str) -> dict[str, Tensor]:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the hub's library, whatever it meets without a connection
        raise ModelError(
            f"timm's weights of {name!r} cannot be fetched ({first_line(error):.300}): connect, or "
            "get them elsewhere and give them as --weights FILE"
        ) from error
    return model.state_dict()


def _of_timm(model: nn.Module, name: str) -> AnyPreprocessing | None:
    """Return what timm does to images for the weights of a name, as its config says it."""
    data = import_timm("timm.data")
    config = data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if channels not in (1, 3):
        return None
    if config["crop_mode"] == "border" or (config["crop_mode"] == "center" and height != width):
        transform = data.create_transform(**config, is_training=False)
        return OwnTransform.of(transform, f"timm {name}")
    resized = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    return Preprocessing(
        resize=resized if config["crop_mode"] == "squash" else resized[0],
        crop=(height, width),
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        interpolation=config["interpolation"],
        channels=channels,
    )


def _classes_of_timm(model: Any) -> tuple[str, ...]:
    """Return the names of ImageNet's classes, as its folders have them, if it has those."""
    data = import_timm("timm.data")
    subset = data.infer_imagenet_subset(model)
    names = data.ImageNetInfo(subset).label_names() if subset else ()
    return tuple(names) if len(names) == model.num_classes else ()
