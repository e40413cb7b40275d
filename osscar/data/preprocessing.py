"""What is done to an image before a model sees it, and example inputs of its size."""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import torch
from pydantic import with_config
from torch import Tensor, nn

from osscar.base.errors import DataError, OptionError, first_line, import_torchvision
from osscar.base.inputs import Read, check_fields, safe_repr
from osscar.base.json_files import MOST_NUMBERS, STRICT, validated
from osscar.base.memory import attempt
from osscar.base.printable import published
from osscar.data.reader import Batch, Reader
from osscar.proof.lineage import Lineage

LARGEST_SIDE = math.isqrt(MOST_NUMBERS)
"""Of images, in pixels."""

OPTIONS = "`--mean`, `--std`, `--image-size` and `--no-normalize` (preprocessing= in Python)"


def _size(value: Any) -> Any:
    sides = tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else (value,)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or not 1 <= min(sides) <= max(sides) <= LARGEST_SIDE:
        raise ValueError(f"give pixels, from 1 to {LARGEST_SIDE}, or a height and a width")
    return sides if len(sides) == 2 else sides[0]


def _mean(value: Any, least: float = -math.inf) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    fits = [isinstance(n, int | float) and least < n <= 1 for n in numbers]
    if len(numbers) not in (1, 3) or not all(fits):
        scale = "at most 1" if least else "in (0, 1]"
        raise ValueError(
            f"give one number {scale} for all channels, or three, for pixels scaled to 0..1"
        )
    return tuple(map(float, numbers))


Size: TypeAlias = Annotated[int | tuple[int, int] | None, Read(_size)]
"""A side in pixels, or a height and a width."""


@with_config(STRICT)
@dataclass(frozen=True)
class Preprocessing:
    """How an image is preprocessed, in the order of torchvision's presets.

    `osscar.load_model` takes the size and the channels, where they are None, from the example
    inputs of a model.

    Parameters
    ----------
    resize
        The shorter side after resizing, in pixels; or height and width, whatever they were.  By
        default as `crop`.
    crop
        The side of the square that is cut from the centre, or height and width.  Alone it leads to
        the centre of an image whose shorter side has that length, or to the whole image, stretched.
    mean, std
        Of values in [0, 1]: one number a channel, or one for all, as which three equal ones are
        kept.  0 and 1 leave pixels / 255 as they are.
    interpolation
        As torchvision calls it.
    channels
        3 (RGB), or 1: images are converted to grayscale.

    Raises
    ------
    OptionError
        If a number makes no sense.
    """

    resize: Size = None
    crop: Size = None
    mean: Annotated[tuple[float, ...] | None, Read(_mean)] = None
    std: Annotated[tuple[float, ...] | None, Read(partial(_mean, least=0))] = None
    interpolation: Literal[
        "nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = "bilinear"
    channels: Literal[1, 3] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.crop, tuple) and len(set(self.crop)) == 1:
            object.__setattr__(self, "crop", self.crop[0])
        if self.resize is None:
            object.__setattr__(self, "resize", self.crop)
        if (self.mean is None) != (self.std is None):
            there, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise OptionError(f"{there} is given without {missing}; give both")
        for name in ("mean", "std"):
            numbers = getattr(self, name) or ()
            if len(numbers) == 3 and self.channels is None:
                object.__setattr__(self, "channels", 3)
            if len(numbers) == 3 and len(set(numbers)) == 1:  # one for all
                object.__setattr__(self, name, numbers[:1])
            elif len(numbers) == 3 and self.channels == 1:
                raise OptionError(f"{name} has 3 numbers, and images 1 channel; give one")

    def fitted(self, example: Tensor | None) -> Self:
        """Take the size and the channels that are None from images (n, channels, height, width)."""
        if example is None:
            return self
        if self.channels not in (None, example.shape[1]) or not example.is_floating_point():
            raise DataError(
                f"the preprocessing makes float tensors of {self.channels or 'any'} channels, "
                f"and the example inputs are {example.dtype} of {tuple(example.shape)}; state what "
                "the model reads, or give a function that makes it"
            )
        return self.of_size(example.shape[-2], example.shape[-1], example.shape[1])

    def of_size(self, height: int, width: int, channels: int) -> Self:
        """Take the size and the channels that are None from pixels as they are stored."""
        crop, known = self.crop or (height, width), self.channels or channels
        return dataclasses.replace(self, crop=crop, channels=known)  # type: ignore[arg-type]

    @property
    def mode(self) -> str:
        """What PIL calls the images that go in."""
        return "L" if self.channels == 1 else "RGB"

    def missing(self) -> list[str]:
        """Name what has to be stated as well."""
        parts = {"mean and std": self.mean, "size": self.crop, "channels": self.channels}
        return [name for name, value in parts.items() if value is None]

    def record(self) -> dict[str, Any]:
        """Return what is stated, as JSON-able data."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def sentence(self) -> str:
        """Say what is done to an image."""
        kind = "grayscale" if self.mode == "L" else "RGB"
        numbers = [", ".join(f"{n:.4g}" for n in one or ()) for one in (self.mean, self.std)]
        resize, crop = self.resize, self.crop
        height, width = crop if isinstance(crop, tuple) else (crop, crop)
        side = f"a shorter side of {resize}"
        if isinstance(resize, tuple):
            side = " x ".join(map(str, resize))
        return (
            f"{kind}, resized to {side} ({self.interpolation}); {height} x {width} cut from the "
            f"centre; pixels / 255, mean {numbers[0]}, std {numbers[1]}"
        )

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the function with these numbers, which is that of torchvision's presets."""
        # Not `transforms.v2`, whose last digits differ from those of the presets.
        steps = import_torchvision("transforms")
        return steps.Compose(  # type: ignore[no-any-return]
            [
                steps.Resize(self.resize, steps.InterpolationMode(self.interpolation)),
                steps.CenterCrop(self.crop),
                steps.PILToTensor(),
                steps.ConvertImageDtype(torch.float32),
                steps.Normalize(*(one * (self.channels or 3) if len(one) == 1 else one
                                  for one in (self.mean or (0.0,), self.std or (1.0,)))),
            ]
        )  # fmt: skip


@dataclass(frozen=True)
class Transform:
    """A function that makes the same tensor of an image of PIL each time, and what it says.

    Images are RGB, or grayscale for one channel.
    """

    function: Callable[[Any], Any] = dataclasses.field(compare=False)
    source: str
    steps: str
    channels: int = 3

    @classmethod
    def of(cls, function: Callable[[Any], Any], source: str, channels: int = 3) -> Self:
        """Take a function, and what it says of itself without where it lies in memory."""
        steps = " ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(function)).split())
        return cls(function, source, f"{steps:.500}", channels)

    @property
    def mode(self) -> str:
        """What PIL calls the images that go in."""
        return "L" if self.channels == 1 else "RGB"

    def record(self) -> dict[str, Any]:
        """Return where it comes from and what it says, as JSON-able data."""
        return {"transform": published(self.source), "steps": self.steps}

    def sentence(self) -> str:
        """Say what is done to an image."""
        return f"{self.mode}, by the transform of {self.source}: {self.steps}"

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the function, with a check of what it returns."""
        return self._checked

    def repeats(self, image: Any) -> bool:
        """Tell whether it makes the same tensor of an image each time; a flip may show late."""
        made = self._checked(image)
        return all(self._checked(image).equal(made) for _ in range(4))

    def _checked(self, image: Any) -> Tensor:
        with attempt() as tried:  # it is anyone's code
            found = self.function(image)
        if not tried.failed and isinstance(found, Tensor):
            return found
        returned = "" if tried.failed else f"it returns a {type(found).__name__}"
        why = returned or f"{type(tried.error).__name__}: {first_line(tried.error)}"
        raise DataError(
            f"the transform of {self.source} fails on an image: {why}; give one that returns a "
            "tensor (channels, height, width)"
        )


AnyPreprocessing: TypeAlias = Preprocessing | Transform


def as_preprocessing(given: Any, source: str, channels: int = 3) -> AnyPreprocessing:
    """Read what is done to an image: a `Preprocessing`, or a function from an image to a tensor."""
    if isinstance(given, Preprocessing | Transform):
        return given
    if callable(given) and not isinstance(given, type):
        return Transform.of(given, source, channels)
    raise OptionError(
        f"{source} gives {safe_repr(given)} ({type(given).__name__}) as preprocessing; give a "
        "function from a PIL image to a tensor, or an osscar.Preprocessing"
    )


def check_stated(preprocessing: AnyPreprocessing | None, source: str) -> None:
    """Refuse to guess what is done to an image: an OptionError says what to give."""
    missing = ["transform"]
    if preprocessing is not None:
        missing = preprocessing.missing() if isinstance(preprocessing, Preprocessing) else []
    if missing:
        raise OptionError(
            f"{source} does not state the {' and '.join(missing)} of its images. Give "
            "`--mean` and `--std` (or `--no-normalize`) and `--image-size CxHxW`, as in its "
            "training; in "
            "Python preprocessing=osscar.Preprocessing(mean=0.5, std=0.25, crop=32, channels=3), "
            "or a function from a PIL image to a tensor; or let the code return (model, example, "
            "transform)"
        )


# ---- example inputs ----------------------------------------------------------------------


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
            example = Reader.of(model).named([_noise(tuple(made.shape), made.dtype)])
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
        example = Reader.of(model).named([_noise((known.channels, height, width), torch.float32)])
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


def _noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return two images that show nothing."""
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.uint8:
        return torch.randint(256, (2, *shape), generator=generator, dtype=dtype)
    return torch.randn((2, *shape), generator=generator).to(dtype)
