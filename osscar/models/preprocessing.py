"""What is done to the images of a model: what is stated, recorded, brought, or in its example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from osscar.base.errors import CheckpointError, DataError, FileError, OptionError
from osscar.base.inputs import safe_repr
from osscar.base.json_files import validated
from osscar.base.messages import warn
from osscar.data.batches import Batch, named_inputs
from osscar.data.preprocessing import OPTIONS, AnyPreprocessing, OwnTransform, Preprocessing
from osscar.proof.lineage import Input, Lineage

_LARGEST_EXAMPLE = 2**28
"""Entries of an example that is made from what a directory records."""


def resolved(
    model: nn.Module,
    example: Batch | None,
    brought: AnyPreprocessing | None,
    stated: AnyPreprocessing | None,
    source: str,
) -> tuple[AnyPreprocessing | None, Batch | None]:
    """Return all that is known of a model's images, and an example of their size.

    What the caller has stated takes the place of what is brought with the model, with a warning
    where these differ.

    Raises
    ------
    DataError
        If what is stated contradicts the example, or the example is no image.
    OptionError
        If something is stated and the model brings a function of its own.
    """
    image = None if example is None else image_of(example)
    if example is not None and image is None:
        if isinstance(stated, Preprocessing):
            raise no_images(example, source)
        own = stated or brought
        return own if isinstance(own, OwnTransform) else None, example
    if stated is not None and isinstance(brought, OwnTransform) and brought.function is not None:
        raise OptionError(
            f"{source} brings what is done to an image, the transform of {brought.source}; "
            f"omit {OPTIONS}"
        )
    known = _merged(stated, "as stated", brought, f"{source} brings") or Preprocessing()
    known = known.fitted(image, source)
    if isinstance(known, Preprocessing) and not known.shows(image):
        example = _image_example(model, known)
    return known, example


def of_the_run(
    path: Path, lineage: Lineage, brought: AnyPreprocessing | None, pruned_with: Batch | None
) -> AnyPreprocessing | None:
    """Return what was done to images in the run that wrote a directory, as far as that is known.

    What it records comes first, then what its code or torchvision brings; the size is always that
    with which the model was pruned.

    Raises
    ------
    CheckpointError
        If what it records makes no sense.
    """
    known = _merged(_recorded(path, lineage), f"as {path} records", brought, "its code now brings")
    image = None if pruned_with is None else image_of(pruned_with)
    if image is None or isinstance(known, OwnTransform):
        return known
    known = known or Preprocessing()
    size = Preprocessing(crop=(image.shape[-2], image.shape[-1]))
    return known if known.shows(image) else known.with_stated(size)


def _merged(
    first: AnyPreprocessing | None, how: str, second: AnyPreprocessing | None, whose: str
) -> AnyPreprocessing | None:
    """Return what one says of images, and where it says nothing what another says.

    Warn where they say different things.  A function that is only recorded cannot be called, so
    that one that is brought takes its place.
    """
    if first is None or second is None:
        return first or second
    if isinstance(first, Preprocessing) and isinstance(second, Preprocessing):
        mine, theirs = first.record(), second.record()
        differing = [name for name in mine if name in theirs and mine[name] != theirs[name]]
        if differing:
            used, others = (
                ", ".join(f"{name} {safe_repr(each[name])}" for name in differing)
                for each in (mine, theirs)
            )
            _warn(f"{how}, {used}, where {whose} {others}")
        return second.with_stated(first)
    if isinstance(first, OwnTransform) and first.function is None:
        if not isinstance(second, OwnTransform):
            return first
        if first.steps != second.steps:
            _warn(f"{how} {first.steps}, where {whose} {second.steps}")
        return second
    if isinstance(second, OwnTransform) and second.function is not None:
        return second if isinstance(first, Preprocessing) and first.missing() else first
    _warn(f"{how}, by another transform than {whose}: {second.sentence()}")
    return first


def _warn(difference: str) -> None:
    warn(f"what is done to images is {difference}")


def _recorded(path: Path, lineage: Lineage) -> AnyPreprocessing | None:
    recorded = lineage.preprocessing
    if recorded is None:
        return None
    if "transform" in recorded:
        return OwnTransform(None, str(recorded["transform"]), str(recorded.get("steps", "")))
    try:
        return validated(dict(recorded), Preprocessing, "the preprocessing")
    except (FileError, DataError) as error:
        reason = error.reason if isinstance(error, FileError) else error
        raise CheckpointError(f"the preprocessing in {path} makes no sense: {reason}") from error


# ---- examples ----------------------------------------------------------------------------


def image_of(example: Batch) -> Tensor | None:
    """Return the images in example inputs, (n, channels, height, width); None if they are none."""
    tensors = list(example.values())
    if len(tensors) != 1 or tensors[0].ndim != 4 or not tensors[0].numel():
        return None
    image = tensors[0]
    pixels = image.is_floating_point() or image.dtype is torch.uint8
    return image if pixels and image.shape[1] in (1, 3) else None


def no_images(example: Batch, source: str) -> DataError:
    """Return an error that says what example inputs should look like."""
    if len(example) != 1:
        return DataError(
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
    return DataError(
        f"the example of {source} is {tensor.dtype} of {tuple(tensor.shape)}, and images are float "
        f"or uint8 of (n, channels, height, width) with 1 or 3 channels, such as (2, 3, 32, 32); "
        f"{hint}"
    )


def _image_example(model: nn.Module, preprocessing: Preprocessing) -> Batch | None:
    """Return two images of noise as named arguments; None where their size is not known."""
    crop, channels = preprocessing.crop, preprocessing.channels
    if crop is None or channels is None:
        return None
    height, width = crop if isinstance(crop, tuple) else (crop, crop)
    kind = Input((channels, height, width), preprocessing.dtype or "float32")
    return named_inputs(model, (_noise(kind),))


def recorded_example(path: Path | str, inputs: Mapping[str, Input]) -> Batch | None:
    """Return inputs like those that a model was pruned with; None if they are not known.

    Raises
    ------
    CheckpointError
        If what the directory records of them makes no sense.
    """
    example = {}
    for name, kind in inputs.items():
        nonsense = CheckpointError(
            f"the input {safe_repr(name)} in {path} makes no sense: {safe_repr(kind.dtype)} of "
            f"{safe_repr(kind.shape)}; get the checkpoint anew"
        )
        if min(kind.shape, default=1) < 1 or math.prod(kind.shape) > _LARGEST_EXAMPLE:
            raise nonsense
        try:
            example[name] = _noise(kind)
        except (AttributeError, TypeError, RuntimeError) as error:  # no number format of torch
            raise nonsense from error
    return example or None


def _noise(kind: Input) -> Tensor:
    """Return two samples of an input."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (2, *kind.shape), getattr(torch, kind.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype is torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)
