"""Models of torchvision and timm by name, with what their libraries do to images."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import ModelError, first_line, import_timm, import_torchvision
from osscar.checkpoint.builders import TimmOrigin, TorchvisionOrigin
from osscar.data.batches import Batch, named_inputs
from osscar.data.preprocessing import AnyPreprocessing, Preprocessing, Transform
from osscar.models.loaded import LoadedModel
from osscar.models.weights import fill, read_state, renamed
from osscar.network.detectors import DetectorNetwork
from osscar.proof.lineage import lineage_of, stored_dtype

_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}
"""What torchvision sets for its own weights beyond the defaults."""

_FRAMES, _FLOW_SIDE = 16, 128
"""Frames of a clip for a video model, and the least side of images for one of optical flow."""


def load_of_library(name: str, weights: str | Path | None, pretrained: bool) -> LoadedModel:
    """Load ``LIBRARY:NAME`` with weights of a file, of its library, or none that were trained."""
    library, _, own = name.partition(":")
    if library == TimmOrigin.library:
        _check_known_of_timm(own)
        origin: TorchvisionOrigin = TimmOrigin(own)
    else:
        _check_known(own, import_torchvision("models").list_models(), library)
        origin = TorchvisionOrigin(own, dict(_OPTIONS.get(own, {})))
    task = _task(origin)
    if task == "quantization":
        raise ModelError(
            f"torchvision's {own!r} is for quantized weights, which cannot be refitted; prune "
            f"torchvision:{own.removeprefix('quantized_')}, and quantize what comes of it"
        )
    state = None
    if weights is not None:
        state = read_state(weights)
    elif pretrained:
        state = _fetched(origin)
    model = _filled(origin, state, str(weights or name))
    random = weights is None and not pretrained
    return LoadedModel(
        model=model,
        example=_clips_or_pairs(task, origin, model),
        source=f"{library} {own}{', freshly initialized weights' if random else ''}",
        path=None,
        stored_dtype=stored_dtype(model),
        preprocessing=preprocessing_of(origin, model),
        classes=_classes(origin, model),
        drawn=1.0 if random else 0.0,
    )


def preprocessing_of(origin: TorchvisionOrigin, model: nn.Module) -> AnyPreprocessing | None:
    """Return what the library does to images for the weights of a name; None if to no images."""
    source = f"{origin.library} {origin.name}"
    if isinstance(origin, TimmOrigin):
        data = import_timm("timm.data")
        config = data.resolve_model_data_config(model)
        channels = config["input_size"][0]
        made = data.create_transform(**config, is_training=False)
        return Transform.of(made, source, channels) if channels in (1, 3) else None
    if isinstance(model, DetectorNetwork):
        return _of_detector(model)
    if _task(origin) in ("video", "optical_flow"):
        return None
    preset = _preset(origin).transforms()
    if hasattr(preset, "crop_size"):
        return Transform.of(preset, source)
    size = int(preset.resize_size[0])  # of segmentation, which cuts nothing: images of one size
    return Preprocessing(
        resize=size,
        crop=size,
        mean=tuple(map(float, preset.mean)),
        std=tuple(map(float, preset.std)),
        interpolation=preset.interpolation.value,
    )


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
        channels=3,
    )


def _check_known(name: str, known: list[str], library: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see its list_models()"
        raise ModelError(f"{library} has no model {name!r}; {hint}")


def _check_known_of_timm(name: str) -> None:
    timm, bare = import_timm(), name.partition(".")[0]
    _check_known(bare, timm.list_models(), "timm")
    if name != bare:
        _check_known(name, timm.list_pretrained(f"{bare}.*"), "timm")


def _task(origin: TorchvisionOrigin) -> str:
    """Return the part of `torchvision.models` that a model is in; its file of a classifier."""
    if isinstance(origin, TimmOrigin):
        return "classification"
    builder = import_torchvision("models").get_model_builder(origin.name)
    return str(builder.__module__.split(".")[2])


def _preset(origin: TorchvisionOrigin) -> Any:
    return import_torchvision("models").get_model_weights(origin.name).DEFAULT


def _clips_or_pairs(task: str, origin: TorchvisionOrigin, model: nn.Module) -> Batch | None:
    """Return two clips for a video model, or two pairs of frames for one of optical flow."""
    if task == "video":
        crop = _preset(origin).transforms().crop_size
        height, width = (*crop, *crop)[:2]
        return named_inputs(model, (torch.zeros(2, 3, _FRAMES, int(height), int(width)),))
    if task == "optical_flow":
        return named_inputs(model, (torch.zeros(2, 3, _FLOW_SIDE, _FLOW_SIDE),) * 2)
    return None


def _fetched(origin: TorchvisionOrigin) -> dict[str, Tensor]:
    try:
        if isinstance(origin, TimmOrigin):
            model: nn.Module = import_timm().create_model(origin.name, pretrained=True)
            return model.state_dict()
        state: dict[str, Tensor] = _preset(origin).get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
        return renamed(state)
    except Exception as error:  # of the hub's library, whatever it meets without a connection
        url = f" from {_preset(origin).url}" if origin.library == "torchvision" else ""
        raise ModelError(
            f"{origin.library}'s weights of {origin.name!r} cannot be fetched{url} "
            f"({first_line(error):.300}): connect, or give them as --weights FILE"
        ) from error


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


def _classes(origin: TorchvisionOrigin, model: Any) -> tuple[str, ...]:
    """Return the names of a model's classes, if they are those of its library's weights."""
    if isinstance(origin, TimmOrigin):
        data = import_timm("timm.data")
        subset = data.infer_imagenet_subset(model)
        names = data.ImageNetInfo(subset).label_names() if subset else ()
        return tuple(names) if len(names) == model.num_classes else ()
    built = lineage_of(model).origin
    # Weights for other classes have the number of these in their options.
    of_preset = built is None or "num_classes" not in built.options
    return tuple(_preset(origin).meta.get("categories", ())) if of_preset else ()
