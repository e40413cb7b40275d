"""Models that read images: torchvision's, a user's own, and what `osscar.save` made of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.devices import resolve_device, resolve_dtype
from osscar.base.errors import CheckpointError, ImageError, ModelError, ModelNotFound, OptionError
from osscar.base.inputs import file_name, shown
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.builders import TorchvisionOrigin, builder_of
from osscar.checkpoint.formats import cast
from osscar.data.batches import Batch, cast_like
from osscar.data.images import ImageSet, load_images
from osscar.data.preprocessing import (
    OPTIONS,
    AnyPreprocessing,
    OwnTransform,
    Preprocessing,
    as_preprocessing,
    import_torchvision,
)
from osscar.data.tensors import (
    TensorSet,
    holds_images,
    load_tensors,
    named_inputs,
    needed_arguments,
)
from osscar.models import user_code
from osscar.models.chance import told_share
from osscar.models.names import PREFIX, Sort, check_no_program, sort_of
from osscar.models.weights import fill, read_state, renamed
from osscar.network.modules import check_finite_weights, check_usable, in_evaluation
from osscar.shrinking.lineage import Input, Lineage, lineage_of, note, stored_dtype

DEFAULT_SAMPLES = 256

_LARGEST_EXAMPLE = 2**28
"""Entries of an example that is made from what a directory records."""

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
        Inputs to trace it with; None where nothing tells what they look like.
    preprocessing
        What is done to an image before the model sees it, as far as it is stated; None of a model
        whose inputs are no images.
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
    stated
        The example inputs that code of the user's own gave, which data have to be like; None where
        there are none.
    states_images
        Whether the caller stated what is done to an image.
    """

    model: nn.Module
    example: Batch | None
    preprocessing: AnyPreprocessing | None
    source: str
    path: Path | None
    stored_dtype: torch.dtype
    classes: tuple[str, ...] = ()
    drawn: float = 0.0
    tokenizer: None = None
    stated: Batch | None = None
    states_images: bool = False

    def calibration(
        self, spec: str | None, *, samples: int | None, seqlen: int | None, seed: int
    ) -> ImageSet | TensorSet:
        """Draw calibration images, or samples of whatever else the model reads.

        Parameters
        ----------
        spec
            A directory of images, or an ``.npz`` file, or ``FILE.npz:PART`` for a part of one; or a
            file of tensors, as `osscar.load_tensors` takes it.
        samples
            How many; by default 256.
        seqlen
            Must be None: only text is cut into windows.
        seed
            Of the draw.

        Raises
        ------
        ImageError
            If there are none, or one of them cannot be decoded.
        FileError
            If tensors cannot be read, or do not fit the model.
        OptionError
            If a length is given, nothing states what is done to an image, or something does and the
            data are tensors.
        """
        if seqlen is not None:
            raise OptionError(f"{self.source} reads no text, which --seqlen is for; leave it away")
        if spec is None:
            raise ImageError(
                f"{self.source} reads no text: give --calibration a directory of images, an .npz "
                "file of them, or an .npz or .safetensors file of tensors for "
                f"{', '.join(needed_arguments(self.model, self.stated))}"
            )
        drawn = DEFAULT_SAMPLES if samples is None else samples
        images = holds_images(spec, self.model, self.stated)
        data = self.images(spec) if images else self.tensors(spec)
        return data.sample(drawn, seed)

    def held_out(self, images: str | None, inputs: str | None) -> ImageSet | TensorSet | None:
        """Find what the model is scored on; None if nothing is given.

        Parameters
        ----------
        images
            Images, as `osscar.load_images` takes them.
        inputs
            A file of tensors, as `osscar.load_tensors` takes it.

        Raises
        ------
        ImageError
            If there are no images, or one of them cannot be decoded.
        FileError
            If tensors cannot be read, or do not fit the model.
        OptionError
            If both are given; or nothing states what is done to an image, or something does and the
            data are tensors.
        """
        if images is not None and inputs is not None:
            raise OptionError("--images and --inputs are both given; give one of them")
        if images is not None:
            return self.images(images)
        return None if inputs is None else self.tensors(inputs)

    def tensors(self, spec: str | Path) -> TensorSet:
        """Read samples that are fed as they are.

        Parameters
        ----------
        spec
            As for `osscar.load_tensors`.

        Raises
        ------
        FileError
            If they cannot be read, or do not fit the model.
        OptionError
            If the caller stated what is done to an image.
        """
        if self.states_images:
            raise OptionError(
                f"{spec} is for tensors, which are fed as they are, and no images; leave "
                f"{OPTIONS} away (preprocessing= in Python)"
            )
        return load_tensors(spec, self.model, self.stated)

    def images(self, spec: str | Path) -> ImageSet:
        """Find images, which become what the model reads.

        Parameters
        ----------
        spec
            As for `calibration`.

        Raises
        ------
        ImageError
            If there are none; or the model, by its example, reads no images.
        OptionError
            If nothing states what is done to an image.
        """
        preprocessing = self.preprocessing
        own = isinstance(preprocessing, OwnTransform)
        if self.example is not None and not own and image_of(self.example) is None:
            raise _no_images(self.example, self.source)
        return load_images(spec, preprocessing or Preprocessing(), reader=self.source)


def load_vision_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    dense: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    preprocessing: Any = None,
) -> VisionModel:
    """Load a model that reads images.

    Parameters
    ----------
    name
        ``torchvision:NAME``; ``module:function`` or ``file.py:function``, code of your own that
        returns a model, (model, example inputs), or (model, example inputs, transform); or a
        directory that `osscar.save` wrote.
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
    preprocessing
        What is done to an image: an `osscar.Preprocessing`, a classification preset of torchvision,
        or a function from a PIL image to a tensor.  What it states takes the place of what the
        model brings, with a warning where that is something else.  By default what a directory
        records, what the code returns, and what belongs to torchvision's weights.

    Raises
    ------
    ImageError
        If what is stated about images makes no sense, or contradicts the example inputs.
    OptionError
        If what is done to an image is stated in a way that does not go with what the model brings.
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
    stated = None
    if preprocessing is not None:
        stated = as_preprocessing(preprocessing, "the caller")
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
    loaded = _resolved(loaded, stated)
    model = loaded.model if number_format is None else cast(loaded.model, number_format)
    model = in_evaluation(model.to(target))
    reference = next(model.parameters())
    example = loaded.example
    if example is not None:
        example = {name: cast_like(tensor, reference) for name, tensor in example.items()}
    known = loaded.preprocessing
    note(
        model,
        source=lineage_of(model).source or loaded.source,
        classes=loaded.classes,
        preprocessing=None if known is None else known.record(),
        stored_dtype=str(loaded.stored_dtype).removeprefix("torch."),
    )
    return dataclasses.replace(
        loaded, model=model, example=example, states_images=stated is not None
    )


# ---- images ------------------------------------------------------------------------------


def _resolved(loaded: VisionModel, stated: AnyPreprocessing | None) -> VisionModel:
    """Return a model with all that is known of its images: stated, brought, or in its example."""
    image = None if loaded.example is None else image_of(loaded.example)
    if loaded.example is not None and image is None:
        if isinstance(stated, Preprocessing):
            raise _no_images(loaded.example, loaded.source)
        own = stated or loaded.preprocessing
        return dataclasses.replace(
            loaded, preprocessing=own if isinstance(own, OwnTransform) else None
        )
    known = _with_stated(loaded, stated).fitted(image, loaded.source)
    example = loaded.example
    if isinstance(known, Preprocessing) and not known.shows(image):
        example = image_example(loaded.model, known)
    return dataclasses.replace(loaded, preprocessing=known, example=example)


def _with_stated(loaded: VisionModel, stated: AnyPreprocessing | None) -> AnyPreprocessing:
    """Return what a model brings with what is stated in its place, and say where they differ."""
    brought = loaded.preprocessing
    if stated is None or brought is None:
        return stated or brought or Preprocessing()
    if isinstance(brought, Preprocessing) and isinstance(stated, Preprocessing):
        _warn_of_difference(stated, "as stated", brought, f"{loaded.source} brings")
        return brought.with_stated(stated)
    if isinstance(brought, OwnTransform) and brought.function is not None:
        raise OptionError(
            f"{loaded.source} brings what is done to an image, the transform of {brought.source}; "
            f"leave {OPTIONS} away"
        )
    warnings.warn(
        f"{loaded.source} was calibrated with images by another transform than is stated now: "
        f"{brought.sentence()}",
        stacklevel=4,
    )
    return stated


def _warn_of_difference(used: Preprocessing, how: str, other: Preprocessing, whose: str) -> None:
    """Say which numbers are used in the place of others."""
    theirs = other.record()
    differing = {n: v for n, v in used.record().items() if n in theirs and theirs[n] != v}
    if differing:
        mine, others = (
            ", ".join(f"{name} {shown(each[name])}" for name in differing)
            for each in (used.record(), theirs)
        )
        warnings.warn(
            f"what is done to images is {how}, {mine}, where {whose} {others}", stacklevel=5
        )


def image_of(example: Batch) -> Tensor | None:
    """Return the images in example inputs, (n, channels, height, width); None if they are none."""
    tensors = list(example.values())
    if len(tensors) != 1 or tensors[0].ndim != 4 or not tensors[0].numel():
        return None
    image = tensors[0]
    pixels = image.is_floating_point() or image.dtype is torch.uint8
    return image if pixels and image.shape[1] in (1, 3) else None


def _no_images(example: Batch, source: str) -> ImageError:
    """Return an error that says what example inputs should look like."""
    if len(example) != 1:
        return ImageError(
            f"{source} reads {len(example)} inputs ({', '.join(example)}), and images are one: "
            "give an .npz or .safetensors file of tensors with an entry for each"
        )
    (tensor,) = example.values()
    last = tensor.ndim == 4 and tensor.shape[-1] in (1, 3)
    hint = (
        "let the model take that and permute its dimensions itself"
        if last
        else "give such an example, or let the code return (model, example, transform)"
    )
    return ImageError(
        f"the example of {source} is {tensor.dtype} of {tuple(tensor.shape)}, and images are float "
        f"or uint8 of (n, channels, height, width) with 1 or 3 channels, such as (2, 3, 32, 32); "
        f"{hint}"
    )


def image_example(model: nn.Module, preprocessing: Preprocessing) -> Batch | None:
    """Return two images of noise as named arguments; None where their size is not known."""
    crop, channels = preprocessing.crop, preprocessing.channels
    if crop is None or channels is None:
        return None
    height, width = crop if isinstance(crop, tuple) else (crop, crop)
    kind = Input((channels, height, width), preprocessing.dtype or "float32")
    return named_inputs(model, (_noise(kind),))


def _noise(kind: Input) -> Tensor:
    """Return two samples of an input."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (2, *kind.shape), getattr(torch, kind.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype is torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


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
        example=None,
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
    model, example, preprocessing = user_code.build(name)
    if weights is not None:
        fill(model, read_state(weights), str(weights))
    needed = needed_arguments(model)
    if example is None and len(needed) > 1:
        raise ModelError(
            f"{name} gives no example inputs, and its model reads {', '.join(needed)}; return the "
            "model, and a mapping of these names to tensors"
        )
    return VisionModel(
        model=model,
        example=example,
        preprocessing=preprocessing,
        source=name,
        path=None,
        stored_dtype=_dtype(model),
        stated=example,
    )


def _from_directory(
    path: Path, sort: Sort, dense: str | None, dtype: torch.dtype | None
) -> VisionModel:
    built, example, brought = None, None, None
    if sort is Sort.CODE_DIRECTORY:
        if dense is None or sort_of(dense) is not Sort.CODE:
            given = "" if dense is None else f", not {dense!r}"
            raise ModelError(
                f"{path} holds a model of your own code, which a checkpoint does not contain: say "
                "what builds the dense one (--against module:function, or osscar.load with "
                f"dense=){given}"
            )
        built, example, brought = user_code.build(dense)
    model = checkpoint.load(path, dense=built, dtype=dtype)
    lineage, builder = lineage_of(model), builder_of(model)
    if isinstance(builder, TorchvisionOrigin):
        preset = import_torchvision("models").get_model_weights(builder.name).DEFAULT.transforms()
        # Presets of segmentation and detection models lead to no image of one size.
        brought = Preprocessing.of(preset) if hasattr(preset, "crop_size") else None
    pruned_with = _recorded_example(path, lineage)
    if pruned_with is not None and (example is None or image_of(pruned_with) is not None):
        example = pruned_with
    return VisionModel(
        model=model,
        example=example,
        preprocessing=_of_the_run(path, lineage, brought, pruned_with),
        source=f"directory {path}",
        path=path,
        stored_dtype=stored_dtype(model),
        classes=lineage.classes,
        stated=example,
    )


def _of_the_run(
    path: Path, lineage: Lineage, brought: AnyPreprocessing | None, pruned_with: Batch | None
) -> AnyPreprocessing | None:
    """Return what was done to images in the run that wrote a directory, as far as that is known.

    What it records comes first, then what its code or torchvision brings; the size is always that
    with which the model was pruned.
    """
    recorded = _recorded_preprocessing(path, lineage)
    known: AnyPreprocessing | None = recorded or brought
    if isinstance(recorded, OwnTransform) and isinstance(brought, OwnTransform):
        known = brought
        if recorded.steps != brought.steps:
            warnings.warn(
                f"{path} was calibrated with images by {recorded.steps}, and {brought.source} now "
                f"brings {brought.steps}",
                stacklevel=4,
            )
    elif isinstance(recorded, Preprocessing) and isinstance(brought, Preprocessing):
        _warn_of_difference(recorded, f"as {path} records", brought, "its code now brings")
        known = brought.with_stated(recorded)
    elif isinstance(recorded, Preprocessing) and brought is not None and recorded.missing():
        known = brought
    image = None if pruned_with is None else image_of(pruned_with)
    if image is None or isinstance(known, OwnTransform):
        return known
    known = known or Preprocessing()
    height, width = image.shape[-2:]
    size = Preprocessing(crop=(height, width))
    return known if known.shows(image) else known.with_stated(size)


def _recorded_preprocessing(path: Path, lineage: Lineage) -> AnyPreprocessing | None:
    recorded = lineage.preprocessing
    if recorded is None:
        return None
    if "transform" in recorded:
        return OwnTransform(None, str(recorded["transform"]), str(recorded.get("steps", "")))
    try:
        return Preprocessing.from_json(recorded)
    except ImageError as error:
        raise CheckpointError(f"the preprocessing in {path} makes no sense: {error}") from error


def _recorded_example(path: Path, lineage: Lineage) -> Batch | None:
    """Return inputs like those that a model was pruned with; None if they are not known."""
    example = {}
    for name, kind in lineage.inputs.items():
        nonsense = CheckpointError(
            f"the input {shown(name)} in {path} makes no sense: {shown(kind.dtype)} of "
            f"{shown(kind.shape)}; get the checkpoint anew"
        )
        if min(kind.shape, default=1) < 1 or math.prod(kind.shape) > _LARGEST_EXAMPLE:
            raise nonsense
        try:
            example[name] = _noise(kind)
        except (AttributeError, TypeError, RuntimeError) as error:  # no number format of torch
            raise nonsense from error
    return example or None


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)
