"""What is done to the images of a model, and example inputs of their size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from osscar.base.errors import DataError
from osscar.base.json_files import validated
from osscar.data.batches import Batch, named_inputs
from osscar.data.preprocessing import AnyPreprocessing, Preprocessing
from osscar.proof.lineage import Input, Lineage


def resolved(
    model: nn.Module,
    example: Batch | None,
    brought: AnyPreprocessing | None,
    stated: AnyPreprocessing | None,
    source: str,
) -> tuple[AnyPreprocessing | None, Batch | None]:
    """Return what is done to a model's images, best as `stated`, and an example of their size."""
    known = brought if stated is None else stated
    image = None if example is None else image_of(example)
    if not isinstance(known, Preprocessing):
        if example is None and known is not None:
            from PIL import Image

            made = known.transform()(Image.new(known.mode, (256, 256)))
            kind = Input(tuple(made.shape), str(made.dtype)[6:])
            example = named_inputs(model, (_noise(kind),))
        return known, example
    if example is not None and image is None:
        raise no_images(example, source)
    known = known.fitted(image)
    if known.channels is None and brought is not None:
        known = replace(known, channels=1 if brought.mode == "L" else 3)
    if known.crop is None or known.channels is None:
        return known, example
    height, width = known.crop if isinstance(known.crop, tuple) else (known.crop, known.crop)
    if image is None or tuple(image.shape[-2:]) != (height, width):
        kind = Input((known.channels, height, width), "float32")
        example = named_inputs(model, (_noise(kind),))
    return known, example


def of_directory(
    path: Path, lineage: Lineage, brought: AnyPreprocessing | None
) -> AnyPreprocessing | None:
    """Return what was done to images when a directory was written, or what is `brought`."""
    recorded = lineage.preprocessing
    if recorded is None or "transform" in recorded:
        return brought
    return validated(dict(recorded), Preprocessing, f"the preprocessing in {path}")


# ---- examples ----------------------------------------------------------------------------


def image_of(example: Batch) -> Tensor | None:
    """Return the images in example inputs, (n, channels, height, width); None if they are none."""
    tensors = list(example.values())
    if len(tensors) != 1 or tensors[0].ndim != 4 or not tensors[0].numel():
        return None
    (image,) = tensors
    pixels = image.is_floating_point() or image.dtype is torch.uint8
    return image if pixels and image.shape[1] in (1, 3) else None


def no_images(example: Batch, source: str) -> DataError:
    """Return an error that says what example inputs should look like."""
    there = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in example.items())
    return DataError(
        f"the example of {source} is {there}, and images are one tensor of (n, channels, "
        "height, width), float or uint8, with 1 or 3 channels, such as (2, 3, 32, 32); give a file "
        "of tensors, or let the code return (model, example, transform)"
    )


def recorded_example(inputs: Mapping[str, Input]) -> Batch | None:
    """Return inputs like those that a model was pruned with; None if they are not known."""
    return {name: _noise(kind) for name, kind in inputs.items()} or None


def _noise(kind: Input) -> Tensor:
    """Return two samples of an input."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (2, *kind.shape), getattr(torch, kind.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype is torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)
