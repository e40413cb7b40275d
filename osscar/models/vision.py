"""Models that read images: torchvision's, a user's own, and what `osscar.save` made of them."""

from __future__ import annotations

import dataclasses
import difflib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.builders import TorchvisionOrigin, builder_of
from osscar.checkpoint.manifest import Manifest, is_checkpoint, read_manifest
from osscar.core.devices import resolve_device, resolve_dtype
from osscar.core.errors import CheckpointError, ImageError, ModelError, ModelNotFound, OptionError
from osscar.core.modules import check_finite_weights, check_usable
from osscar.data.batches import Batch, cast_like, named_inputs
from osscar.data.images import ImageSet, Preprocessing, Size, import_torchvision, load_images
from osscar.models import user_code
from osscar.models.language import LoadedModel, load_model
from osscar.shrinking.lineage import lineage_of, note

PREFIX = "torchvision:"
DEFAULT_SAMPLES = 256

_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}
"""What torchvision sets for its own weights beyond the defaults."""


@dataclass(frozen=True, eq=False)
class VisionModel:
    """A model that reads images, ready to run.

    Attributes
    ----------
    model
        In evaluation mode, on its device.
    example
        Inputs to trace it with.
    preprocessing
        What is done to an image before the model sees it.
    source
        Where it comes from, in words.
    path
        Its directory, or None.
    stored_dtype
        Number format of its weights on disk.
    classes
        The names of its classes; empty where they are not known.
    """

    model: nn.Module
    example: Batch
    preprocessing: Preprocessing
    source: str
    path: Path | None
    stored_dtype: torch.dtype
    classes: tuple[str, ...] = ()
    tokenizer: None = None

    def calibration(
        self, spec: str | None, *, samples: int | None, seqlen: int | None, seed: int
    ) -> ImageSet:
        """Draw calibration images.

        Parameters
        ----------
        spec
            As in `osscar.data.images.load_images`.
        samples
            How many; by default 256.
        seqlen
            Must be None: images have no length.
        seed
            Of the draw.

        Raises
        ------
        ImageError
            If there are none, or one of them cannot be decoded.
        OptionError
            If a length is given.
        """
        if seqlen is not None:
            raise OptionError(f"{self.source} reads images, which have no --seqlen; leave it away")
        if spec is None:
            raise ImageError(
                f"{self.source} reads images: give --calibration a directory or an .npz file"
            )
        images = load_images(spec, self.preprocessing)
        return images.sample(DEFAULT_SAMPLES if samples is None else samples, seed)


def is_vision(name: str) -> bool:
    """Tell whether a name stands for a model that is not of transformers."""
    return name.startswith(PREFIX) or user_code.is_code(name) or _is_foreign(_manifest_of(name))


def load_vision_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    dense: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
) -> VisionModel:
    """Load a model that reads images.

    Parameters
    ----------
    name
        ``torchvision:NAME``; ``module:function`` or ``file.py:function``, code of your own that
        returns a model, or a model and example inputs; or a directory that `osscar.save` wrote.
    weights
        A ``.safetensors`` file or a state dict that ``torch.load`` reads with ``weights_only``.
        torchvision's own are fetched without it.
    pretrained
        Whether a torchvision model without a file gets its weights at all.
    dense
        What builds the dense model of a directory whose model is of your own code.
    dtype, device
        As in `osscar.load_model`.

    Raises
    ------
    ModelNotFound
        If nothing answers to the name.
    ModelError
        If weights are missing or do not fit.
    NonFiniteError
        If a parameter holds NaN or infinity.
    """
    name = str(name)
    target = resolve_device(device)
    number_format = resolve_dtype(dtype, target)
    if name.startswith(PREFIX):
        loaded = _from_torchvision(name.removeprefix(PREFIX), weights, pretrained)
    elif user_code.is_code(name):
        loaded = _from_code(name, weights)
    else:
        loaded = _from_directory(Path(name).expanduser(), dense)
    check_usable(loaded.model)
    check_finite_weights(loaded.model)
    model = loaded.model if number_format is None else loaded.model.to(number_format)
    model = model.to(target).eval()
    reference = next(model.parameters())
    example = {name: cast_like(tensor, reference) for name, tensor in loaded.example.items()}
    note(
        model,
        source=lineage_of(model).source or loaded.source,
        classes=loaded.classes,
        preprocessing=dataclasses.asdict(loaded.preprocessing),
        stored_dtype=str(loaded.stored_dtype).removeprefix("torch."),
    )
    return dataclasses.replace(loaded, model=model, example=example)


# ---- torchvision -------------------------------------------------------------------------


def _from_torchvision(name: str, weights: str | Path | None, pretrained: bool) -> VisionModel:
    models = import_torchvision("models")
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ModelNotFound(f"torchvision has no classification model {name!r}{hint}")
    preset = models.get_model_weights(name).DEFAULT
    state = None
    if weights is not None:
        state = read_state(weights)
    elif pretrained:
        state = _fetched(name, preset)
    model = _filled(name, state, str(weights or preset))
    preprocessing = Preprocessing.of(preset.transforms())
    classes = tuple(preset.meta["categories"])
    return VisionModel(
        model=model,
        example=image_example(model, preprocessing.crop),
        preprocessing=preprocessing,
        source=f"torchvision {name}",
        path=None,
        stored_dtype=_dtype(model),
        classes=() if _has_own_classes(model) else classes,
    )


def _has_own_classes(model: nn.Module) -> bool:
    """Whether a model of torchvision tells other classes apart than its weights of the name."""
    origin = lineage_of(model).origin
    return origin is not None and "num_classes" in origin.options


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
    return _renamed(state)


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


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the names that torchvision's DenseNet weights still have."""
    pattern = re.compile(
        r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_.*))$"
    )
    return {pattern.sub(r"\1\2", key): tensor for key, tensor in state.items()}


# ---- code and directories ----------------------------------------------------------------


def _from_code(name: str, weights: str | Path | None) -> VisionModel:
    model, example = user_code.build(name)
    if weights is not None:
        fill(model, read_state(weights), str(weights))
    example = image_example(model, Preprocessing().crop) if example is None else example
    return VisionModel(
        model=model,
        example=example,
        preprocessing=_matching(example),
        source=name,
        path=None,
        stored_dtype=_dtype(model),
    )


def _from_directory(path: Path, dense: str | None) -> VisionModel:
    built, example = None, None
    if dense is not None and user_code.is_code(dense):
        built, example = user_code.build(dense)
    manifest = read_manifest(path)
    if built is None and _is_own_code(manifest):
        raise ModelError(
            f"{path} holds a model of your own code, which a checkpoint does not contain: say what "
            "builds the dense one (--against module:function, or osscar.load with dense=)"
        )
    model = checkpoint.load(path, dense=built)
    preprocessing = _recorded_preprocessing(path, manifest)
    builder = builder_of(model)
    if preprocessing is None and isinstance(builder, TorchvisionOrigin):
        preset = import_torchvision("models").get_model_weights(builder.name).DEFAULT
        preprocessing = Preprocessing.of(preset.transforms())
    preprocessing = preprocessing or Preprocessing()
    return VisionModel(
        model=model,
        example=image_example(model, preprocessing.crop) if example is None else example,
        preprocessing=preprocessing,
        source=f"directory {path}",
        path=path,
        stored_dtype=_dtype(model),
        classes=lineage_of(model).classes,
    )


def _recorded_preprocessing(path: Path, manifest: Manifest | None) -> Preprocessing | None:
    recorded = None if manifest is None else manifest.lineage.preprocessing
    try:
        return None if recorded is None else Preprocessing.from_json(recorded)
    except ImageError as error:
        raise CheckpointError(f"the preprocessing in {path} makes no sense: {error}") from error


def _is_own_code(manifest: Manifest | None) -> bool:
    """Whether nobody but its user can build the dense model."""
    return manifest is not None and not manifest.stock and manifest.lineage.origin is None


def _manifest_of(name: str) -> Manifest | None:
    """Return what a name's directory says of its checkpoint; None where there is nothing to read.

    What cannot be read will be said when the model is loaded.
    """
    try:
        path = Path(name).expanduser()
        return read_manifest(path) if path.is_dir() else None
    except (OSError, RuntimeError, ValueError, CheckpointError):
        return None


def _is_foreign(manifest: Manifest | None) -> bool:
    """Whether a checkpoint is not of transformers."""
    if manifest is None or manifest.stock:
        return False
    return manifest.lineage.origin is None or manifest.lineage.origin.library != "transformers"


def _matching(example: Batch) -> Preprocessing:
    """Return the preprocessing that leads to images of the example's size."""
    first = next(iter(example.values()))
    if len(example) == 1 and first.ndim == 4:
        return Preprocessing.to_size(*first.shape[-2:])
    return Preprocessing()


def image_example(model: nn.Module, size: Size) -> Batch:
    """Return two images of noise as named arguments."""
    height, width = size if isinstance(size, tuple) else (size, size)
    generator = torch.Generator().manual_seed(0)
    return named_inputs(model, (torch.randn(2, 3, height, width, generator=generator),))


# ---- weights -----------------------------------------------------------------------------


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights without unpickling anything but tensors.

    Parameters
    ----------
    path
        ``.safetensors``, or a state dict that ``torch.save`` wrote, alone or as ``state_dict`` or
        ``model`` in a dictionary.

    Raises
    ------
    ModelError
        If it is missing or holds something else.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"there is no file of weights at {str(path)!r}; check the path") from None
    except Exception as error:  # torch.load on a file of any other sort raises whatever it meets
        raise ModelError(
            f"the weights in {str(path)!r} cannot be read: {_unreadable(error)}; give a "
            ".safetensors file, or a state dict that torch.load reads with weights_only=True"
        ) from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()
    ):
        raise ModelError(
            f"{str(path)!r} is not a state dict, which has tensors by name; save "
            "model.state_dict() to it"
        )
    return _renamed({key.removeprefix("module."): tensor for key, tensor in state.items()})


def _unreadable(error: Exception) -> str:
    """Say why a file of weights cannot be read, in our own words where torch has too many."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than tensors, such as a whole model, or is damaged"
    if isinstance(error, EOFError):
        return "it is empty or cut off"
    if not isinstance(error, OSError | RuntimeError | SafetensorError):
        return "it is no file that torch.save wrote"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give a model its weights.

    Raises
    ------
    ModelError
        If a tensor is missing, is left over, or has another shape or another kind of number.
    """
    own = model.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in counters]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    kinds = [key for key in own if key in state and _kind(own[key]) != _kind(state[key])]
    for what, keys in (
        ("lacks", missing),
        ("has", unknown),
        ("has another shape of", wrong),
        ("has another kind of number in", kinds),
    ):
        if keys:
            raise ModelError(
                f"the weights in {source} do not fit {type(model).__name__}: the file {what} "
                f"{len(keys)} tensors, such as {keys[0]!r}{_unlike(own, state, keys[0])}; give "
                "weights of this very model"
            )
    model.load_state_dict(dict(state), strict=False)


def _kind(tensor: Tensor) -> str:
    """Return what sort of number a tensor holds: formats of one sort differ in precision only."""
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


def _unlike(own: Mapping[str, Tensor], state: Mapping[str, Tensor], key: str) -> str:
    """Say how a tensor differs from the model's, if both have it."""
    if key not in own or key not in state:
        return ""
    mine, given = (f"{t.dtype} {tuple(t.shape)}" for t in (own[key], state[key]))
    return f" ({given} instead of {mine})"


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


# ---- either sort of model ----------------------------------------------------------------


def check_directory(name: str) -> None:
    """Refuse a directory that holds no model, or one whose plan nobody can read.

    Raises
    ------
    CheckpointError
        Saying what is missing or damaged; names that are no directories pass.
    """
    try:
        path = Path(name).expanduser()
        if not name or not path.is_dir():
            return
    except (OSError, RuntimeError, ValueError):
        return  # no name of a directory: whoever looks for the model will say so
    if read_manifest(path) is None and not is_checkpoint(path):
        raise CheckpointError(
            f"{name!r} has neither osscar.json nor config.json: it is not a checkpoint; give the "
            "directory that `osscar prune` wrote"
        )


def open_model(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    dense: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel | VisionModel:
    """Load whatever model a name stands for.

    Parameters
    ----------
    name, dtype, device, trust_remote_code
        As in `osscar.load_model`, or as in `load_vision_model`.
    weights, pretrained, dense
        As in `load_vision_model`.

    Raises
    ------
    OptionError
        If weights are given for a model that brings its own, or a dense model for one that needs
        none.
    """
    check_directory(name)
    vision = is_vision(name)
    if dense is not None and not _is_own_code(_manifest_of(name)):
        raise OptionError(
            f"{name!r} is no pruned model of your own code, so nothing else builds it; leave "
            "--against away"
        )
    if weights is not None and (not vision or Path(name).expanduser().is_dir()):
        raise OptionError(f"{name!r} has weights of its own; leave --weights away")
    if not vision:
        return load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return load_vision_model(
        name, weights=weights, pretrained=pretrained, dense=dense, dtype=dtype, device=device
    )
