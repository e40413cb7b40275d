"""Models of torchvision and timm by name, what their libraries do to images, files of weights."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from itertools import compress, product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from osscar.base.errors import ModelError, first_line, import_timm, import_torchvision, warn
from osscar.base.memory import attempt
from osscar.checkpoint.builders import LibraryOrigin
from osscar.data.preprocessing import AnyPreprocessing, Preprocessing, Transform
from osscar.data.reader import Reader
from osscar.models.loaded import LoadedModel
from osscar.network.detectors import DetectorNetwork
from osscar.proof.lineage import Library, lineage_of, stored_dtype

_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}
"""What torchvision sets for its own weights beyond the defaults."""

_TIMM = "timm"

_FRAMES, _FLOW_SIDE = 16, 128
"""Frames of a clip for a video model, and the least side of images for one of optical flow."""


def load_of_library(name: str, weights: str | Path | None, pretrained: bool) -> LoadedModel:
    """Load ``LIBRARY:NAME`` with weights of a file, of its library, or none that were trained."""
    prefix, _, own = name.partition(":")
    library: Library = "timm" if prefix == _TIMM else "torchvision"
    options = {} if library == _TIMM else dict(_OPTIONS.get(own, {}))
    origin = LibraryOrigin(library, own, options)
    origin.check()
    random = weights is None and not pretrained
    if random:
        model = origin.build().eval()
    else:
        state = _fetched(origin) if weights is None else read_state(weights)
        model = _filled(origin, state, str(weights or name))
    example: tuple[Tensor, ...] = ()
    if _task(origin) == "video":
        crop = _preset(origin).transforms().crop_size
        example = (torch.zeros(2, 3, _FRAMES, *map(int, (*crop, *crop)[:2])),)
    elif _task(origin) == "optical_flow":
        example = (torch.zeros(2, 3, _FLOW_SIDE, _FLOW_SIDE),) * 2
    return LoadedModel(
        model=model,
        example=Reader.of(model).named(example) if example else None,
        source=f"{library} {own}{', freshly initialized weights' if random else ''}",
        path=None,
        stored_dtype=stored_dtype(model),
        preprocessing=preprocessing_of(origin, model),
        classes=_classes(origin, model),
    )


def preprocessing_of(origin: LibraryOrigin, model: nn.Module) -> AnyPreprocessing | None:
    """Return what the library does to images for the weights of a name; None if to no images."""
    source = f"{origin.library} {origin.name}"
    if origin.library == _TIMM:
        data = import_timm("timm.data")
        config = data.resolve_model_data_config(model)
        channels = config["input_size"][0]
        made = data.create_transform(**config, is_training=False)
        return Transform.of(made, source, channels) if channels in (1, 3) else None
    if isinstance(model, DetectorNetwork):  # which does to images itself, of one size, what is said
        steps: Any = model.detector().transform
        fixed = steps.fixed_size  # width and height
        size = int(steps.min_size[0]) if fixed is None else (int(fixed[1]), int(fixed[0]))
        mean, std = (tuple(map(float, one)) for one in (steps.image_mean, steps.image_std))
        return Preprocessing(resize=size, crop=size, mean=mean, std=std, channels=3)
    if _task(origin) in ("video", "optical_flow"):
        return None
    preset = _preset(origin).transforms()
    if hasattr(preset, "crop_size"):
        return Transform.of(preset, source)
    return Preprocessing(  # of segmentation, which cuts nothing: images of one size
        crop=int(preset.resize_size[0]),
        mean=tuple(map(float, preset.mean)),
        std=tuple(map(float, preset.std)),
        interpolation=preset.interpolation.value,
    )


def _task(origin: LibraryOrigin) -> str:
    """Return the part of `torchvision.models` that a model is in; its file of a classifier."""
    if origin.library == _TIMM:
        return "classification"
    builder = import_torchvision("models").get_model_builder(origin.name)
    return str(builder.__module__.split(".")[2])


def _preset(origin: LibraryOrigin) -> Any:
    return import_torchvision("models").get_model_weights(origin.name).DEFAULT


def _fetched(origin: LibraryOrigin) -> dict[str, Tensor]:
    # Of the hub's library, whatever it meets without a connection.
    with attempt() as tried:
        if origin.library == _TIMM:
            model: nn.Module = import_timm().create_model(origin.name, pretrained=True)
            return model.state_dict()
        # Not by torchvision's own builder, which would unpickle what lies in the cache.
        state: dict[str, Tensor] = _preset(origin).get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
        return state
    url = f" from {_preset(origin).url}" if origin.library == "torchvision" else ""
    raise ModelError(
        f"{origin.library}'s weights of {origin.name!r} cannot be fetched{url} "
        f"({first_line(tried.error):.300}): connect, or give a file (weights, `--weights FILE`)"
    ) from tried.error


def _filled(origin: LibraryOrigin, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Build a model, with as many classes as the weights have, and fill it."""
    model = origin.build()
    own = model.state_dict()
    state = matched(state, own.keys())
    shapes = [(own[key].shape, one.shape) for key, one in state.items() if key in own]
    differing = [(mine, theirs) for mine, theirs in shapes if mine != theirs]
    counts = {theirs[:1] for _, theirs in differing}
    if len(counts) == 1 and all(mine[1:] == theirs[1:] for mine, theirs in differing):
        ((classes,),) = counts
        options = {**origin.options, "num_classes": classes}
        model = LibraryOrigin(origin.library, origin.name, options).build()
    auxiliary = {key for key in state if key.startswith(("aux", "AuxLogits")) and key not in own}
    fill(model, {key: one for key, one in state.items() if key not in auxiliary}, source)
    return model.eval()


def _classes(origin: LibraryOrigin, model: Any) -> tuple[str, ...]:
    """Return the names of a model's classes, if they are those of its library's weights."""
    if origin.library == _TIMM:
        data = import_timm("timm.data")
        subset = data.infer_imagenet_subset(model)
        names = data.ImageNetInfo(subset).label_names() if subset else ()
        return tuple(names) if len(names) == model.num_classes else ()
    built = lineage_of(model).origin
    # Weights for other classes have the number of these in their options.
    of_preset = built is None or "num_classes" not in built.options
    return tuple(_preset(origin).meta.get("categories", ())) if of_preset else ()


# ---- files of weights --------------------------------------------------------------------


_RENAMED = (
    (re.compile(r"\b_orig_mod\."), ""),
    (re.compile(r"^module\."), ""),
    (re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
)
"""What names have of a model that was compiled, or trained in parallel, and torchvision's DenseNet
weights of old."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights, or its one entry that is a state dict, unpickling tensors alone."""
    name = os.fspath(path)
    # torch.load on a file of any other sort raises whatever it meets.
    with attempt() as tried:
        file = Path(name).expanduser()
        if file.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    if tried.failed:
        reason = first_line(tried.error).partition(". ")[0] or "it is empty or cut off"
        raise ModelError(
            f"the weights in {name!r} cannot be read: {reason:.200}; give a .safetensors file, or "
            "a state dict that torch.load reads with weights_only=True"
        ) from tried.error
    if not _is_state(content):
        entries = content if isinstance(content, dict) else {}
        states = [key for key, entry in entries.items() if _is_state(entry)]
        if len(states) != 1:
            raise ModelError(
                f"{name!r} holds {len(states) or 'no'} state dicts, which have tensors by name; "
                "save model.state_dict() of the model that is meant to a file of its own"
            )
        warn(f"only {states[0]!r:.60} of the {len(entries)} entries of {name!r} is loaded")
        content = entries[states[0]]
    return dict(content)


def _is_state(content: Any) -> bool:
    return bool(isinstance(content, dict) and content) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in content.items()
    )


def matched(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict by a model's names, without what wrappers put before them if need be."""
    found, most = dict(state), len(state.keys() & names)
    for chosen in product((False, True), repeat=len(_RENAMED)):
        keys = list(state)
        for pattern, new in compress(_RENAMED, chosen):
            keys = [pattern.sub(new, key) for key in keys]
        known = len(set(keys).intersection(names))
        if known > most and len(set(keys)) == len(keys):
            found, most = dict(zip(keys, state.values(), strict=True)), known
    return found


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give a model its weights, by the names of its parameters and buffers."""
    try:
        model.load_state_dict(matched(state, model.state_dict().keys()))
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())
        raise ModelError(
            f"the weights in {source} do not fit {type(model).__name__}: {reason:.300}; give "
            "weights of this very model"
        ) from error
