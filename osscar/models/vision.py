"""Models that read images: torchvision's, a user's own, and what `osscar.save` made of them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.builders import TorchvisionOrigin, builder_of
from osscar.checkpoint.formats import cast
from osscar.core.devices import resolve_device, resolve_dtype
from osscar.core.errors import CheckpointError, ImageError, ModelError, ModelNotFound, OptionError
from osscar.core.inputs import file_name
from osscar.core.modules import check_finite_weights, check_usable, in_evaluation
from osscar.data.batches import Batch, cast_like, named_inputs
from osscar.data.images import ImageSet, load_images
from osscar.data.preprocessing import Preprocessing, Size, import_torchvision
from osscar.models import user_code
from osscar.models.chance import told_share
from osscar.models.names import PREFIX, Sort, check_no_program, sort_of
from osscar.models.weights import fill, read_state, renamed
from osscar.shrinking.lineage import Lineage, lineage_of, note, stored_dtype

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
    drawn
        The share of its parameters that its code draws anew in each call, so that nothing has
        trained them; 0 where they come from a file.
    """

    model: nn.Module
    example: Batch
    preprocessing: Preprocessing
    source: str
    path: Path | None
    stored_dtype: torch.dtype
    classes: tuple[str, ...] = ()
    drawn: float = 0.0
    tokenizer: None = None

    def calibration(
        self, spec: str | None, *, samples: int | None, seqlen: int | None, seed: int
    ) -> ImageSet:
        """Draw calibration images.

        Parameters
        ----------
        spec
            A directory of images, or an ``.npz`` file, or ``FILE.npz:PART`` for a part of one.
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
        Whether a torchvision model without a file gets its weights at all, and code of your own is
        called twice to warn of weights that it draws.
    dense
        What builds the dense model of a directory whose model is of your own code.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, one of these dtypes, or ``"auto"`` (also
        None): as stored on a GPU, float32 on a CPU.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"`` (or ``"cuda:1"``).

    Raises
    ------
    ModelNotFound
        If nothing answers to the name.
    ModelError
        If weights are missing or do not fit, or code fails.
    CheckpointError
        If a directory cannot be read.
    NonFiniteError
        If a parameter holds NaN or infinity.
    DeviceError
        If the device or number format is not available.
    MissingDependency
        If torchvision is needed and not installed.
    """
    name = file_name(name, "the model", "torchvision:NAME, code of your own, or a directory")
    target = resolve_device(device)
    number_format = resolve_dtype(dtype, target)
    check_no_program(name)
    sort = sort_of(name)
    if sort is Sort.LANGUAGE:
        raise ModelNotFound(
            f"{name!r} is no model that reads images; give torchvision:NAME, module:function, "
            "file.py:function, or a directory that holds a pruned one"
        )
    if sort is Sort.TORCHVISION:
        loaded = _from_torchvision(name.removeprefix(PREFIX), weights, pretrained)
    elif sort is Sort.CODE:
        loaded = _from_code(name, weights)
    else:
        loaded = _from_directory(Path(name).expanduser(), sort, dense, number_format)
    check_usable(loaded.model)
    check_finite_weights(loaded.model)
    if sort is Sort.CODE and weights is None and pretrained:
        loaded = dataclasses.replace(loaded, drawn=told_share(name, loaded.model))
    model = loaded.model if number_format is None else cast(loaded.model, number_format)
    model = in_evaluation(model.to(target))
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


def _from_directory(
    path: Path, sort: Sort, dense: str | None, dtype: torch.dtype | None
) -> VisionModel:
    built, example = None, None
    if sort is Sort.CODE_DIRECTORY:
        if dense is None or sort_of(dense) is not Sort.CODE:
            given = "" if dense is None else f", not {dense!r}"
            raise ModelError(
                f"{path} holds a model of your own code, which a checkpoint does not contain: say "
                "what builds the dense one (--against module:function, or osscar.load with "
                f"dense=){given}"
            )
        built, example = user_code.build(dense)
    model = checkpoint.load(path, dense=built, dtype=dtype)
    preprocessing = _recorded_preprocessing(path, lineage_of(model))
    builder = builder_of(model)
    if preprocessing is None and isinstance(builder, TorchvisionOrigin):
        preset = import_torchvision("models").get_model_weights(builder.name).DEFAULT.transforms()
        # Presets of segmentation and detection models lead to no image of one size.
        preprocessing = Preprocessing.of(preset) if hasattr(preset, "crop_size") else None
    preprocessing = preprocessing or Preprocessing()
    return VisionModel(
        model=model,
        example=image_example(model, preprocessing.crop) if example is None else example,
        preprocessing=preprocessing,
        source=f"directory {path}",
        path=path,
        stored_dtype=stored_dtype(model),
        classes=lineage_of(model).classes,
    )


def _recorded_preprocessing(path: Path, lineage: Lineage) -> Preprocessing | None:
    recorded = lineage.preprocessing
    try:
        return None if recorded is None else Preprocessing.from_json(recorded)
    except ImageError as error:
        raise CheckpointError(f"the preprocessing in {path} makes no sense: {error}") from error


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


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)
