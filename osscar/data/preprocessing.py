"""What is done to an image before a model sees it."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from osscar.base.errors import DataError, OptionError, first_line
from osscar.base.inputs import safe_repr
from osscar.base.json_files import STRICT
from osscar.base.optional import import_torchvision
from osscar.base.printable import pluralize, published

_DRAWS = 8
"""Times that a transform is called once more, as it may draw from a generator of its own."""

_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""The values of torchvision's InterpolationMode."""

_LARGEST_SIDE = 2**14
_FURTHER = 16
"""How many times larger than any pixel an example may be: noise is, and other units are more."""

Size: TypeAlias = int | tuple[int, int]
"""A side in pixels, or a height and a width."""

OPTIONS = "--mean, --std, --image-size and --no-normalize (preprocessing= in Python)"
_HOW_TO_STATE = {
    "mean and std": "--mean and --std (one number a channel, or one for all), or --no-normalize "
    "(pixels / 255 as they are)",
    "size": "--image-size (PIXELS or HxW)",
    "number of channels": "--image-size CxHxW",
}
_EXAMPLES = {
    "mean and std": ("--mean 0.5 --std 0.25", "mean=0.5, std=0.25"),
    "size": ("--image-size 32", "crop=32"),
    "number of channels": ("--image-size 3x32x32", "crop=32, channels=3"),
}
"""On the command line, and in Python; those of channels also state the size."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the model sees it, as torchvision's presets do it.

    What is None is not stated.  `osscar.load_model` takes size, channels and number format from the
    example inputs then; mean and deviation have to be stated.

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
        As torchvision calls it; by default ``"bilinear"``.
    channels
        3 (RGB), or 1: images are converted to grayscale.
    dtype
        ``"float32"``, or ``"uint8"`` for a model that takes pixels from 0 to 255 as they are.

    Raises
    ------
    DataError
        If a number makes no sense.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    resize: Size | None = None
    crop: Size | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    channels: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.crop, tuple) and len(set(self.crop)) == 1:
            object.__setattr__(self, "crop", self.crop[0])
        if self.resize is None:
            object.__setattr__(self, "resize", self.crop)
        pixels = f"pixels, from 1 to {_LARGEST_SIDE}"
        for name, fits, give in (
            ("resize", _is_size, pixels),
            ("crop", _is_size, pixels),
            ("interpolation", _INTERPOLATIONS.__contains__, f"one of {', '.join(_INTERPOLATIONS)}"),
            ("channels", (1, 3).__contains__, "one of 1, 3"),
            ("dtype", ("float32", "uint8").__contains__, "one of float32, uint8"),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise DataError(f"{name} is {safe_repr(value)}; give {give}")
        if (self.mean is None) != (self.std is None):
            there, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise DataError(f"{there} is given without {missing}; give both")
        if self.mean is not None:
            self._check_normalization("mean")
            self._check_normalization("std")

    def _check_normalization(self, name: str) -> None:
        value = getattr(self, name)
        numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(_is_finite(n) for n in numbers) or len(numbers) not in (1, 3):
            raise DataError(
                f"{name} is {safe_repr(value)}; give one number for all channels, or one for each "
                "of three"
            )
        if name == "std" and min(numbers) <= 0:
            raise DataError(f"std is {safe_repr(value)}; give numbers above 0")
        if max(numbers) > 1:
            raise DataError(
                f"{name} is {safe_repr(value)}; give that of pixels / 255, which lie from 0 to 1"
            )
        alike = numbers[:1] if len(set(numbers)) == 1 else numbers
        object.__setattr__(self, name, tuple(map(float, alike)))
        if len(numbers) == 3 and self.channels is None:
            object.__setattr__(self, "channels", 3)
        if self.channels == 1 and len(numbers) == 3:
            raise DataError(f"{name} has 3 numbers and images 1 channel; give one number")

    @classmethod
    def of(cls, transforms: Any) -> Preprocessing:
        """Read the numbers of what ``weights.transforms()`` of torchvision returns.

        Those of segmentation cut nothing; here the centre of an image is cut, so that all have one
        size.
        """
        resized = int(transforms.resize_size[0])
        return cls(
            resize=resized,
            crop=int(transforms.crop_size[0]) if hasattr(transforms, "crop_size") else resized,
            mean=tuple(map(float, transforms.mean)),
            std=tuple(map(float, transforms.std)),
            interpolation=transforms.interpolation.value,
        )

    def record(self) -> dict[str, Any]:
        """Return what is stated, as JSON-able data."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def with_stated(self, other: Preprocessing) -> Preprocessing:
        """Return the same with all that another one states."""
        return dataclasses.replace(self, **other.record())

    def fitted(self, example: Tensor | None, source: str) -> Preprocessing:
        """Take what is not stated from an example, (n, channels, height, width), of a source.

        Raises
        ------
        DataError
            If what is stated contradicts the example.
        """
        interpolation, dtype = self.interpolation or "bilinear", self.dtype or "float32"
        if example is None:
            return dataclasses.replace(self, interpolation=interpolation, dtype=dtype)
        dtype = "uint8" if example.dtype is torch.uint8 else "float32"
        self._check_example(example, dtype, source)
        size = Preprocessing(crop=(example.shape[-2], example.shape[-1])).crop
        return dataclasses.replace(
            self,
            resize=self.resize or size,
            crop=self.crop or size,
            interpolation=interpolation,
            channels=example.shape[1],
            dtype=dtype,
        )

    def _check_example(self, example: Tensor, number_format: str, source: str) -> None:
        """Refuse an example that is no image as it would come out of this."""
        channels = example.shape[1]
        if self.channels not in (None, channels):
            numbers = "" if len(self.mean or ()) < 3 else " (mean has 3 numbers)"
            raise DataError(
                f"images are stated to have {pluralize(self.channels or 0, 'channel')}{numbers}, "
                f"and the example of {source} has {channels}: {tuple(example.shape)}; state what "
                "it has"
            )
        if self.dtype not in (None, number_format):
            raise DataError(
                f"images are stated to be {self.dtype}, and the example of {source} is "
                f"{example.dtype}; state what the model takes"
            )
        if number_format == "uint8":
            if self.normalizes:
                raise DataError(
                    f"the example of {source} is torch.uint8, so the model takes pixels from 0 to "
                    "255 as they are; omit --mean and --std, or give a float example"
                )
            return
        if self.mean is None or self.std is None:
            return
        reach = max(max(abs(m), abs(1 - m)) / s for m, s in zip(*self._numbers(), strict=True))
        largest = float(example.detach().abs().max())
        if largest > _FURTHER * reach:
            raise DataError(
                f"the example of {source} has values up to {largest:g}, and images would reach "
                f"{reach:.4g} as stated; give an example in the model's own units (for pixels from "
                "0 to 255 state --mean 0 --std 0.00392157)"
            )

    def _numbers(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation, as many of one as of the other; nothing changes by default."""
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        longest = max(len(mean), len(std))
        return mean * (longest // len(mean)), std * (longest // len(std))

    @property
    def normalizes(self) -> bool:
        """Whether anything but pixels / 255, or pixels, comes out."""
        mean, std = self._numbers()
        return any(mean) or set(std) != {1.0}

    @property
    def mode(self) -> str:
        """What PIL calls the images that go in."""
        return "L" if self.channels == 1 else "RGB"

    def shows(self, example: Tensor | None) -> bool:
        """Whether an example has the size of what comes out."""
        return (
            example is not None
            and self.crop is not None
            and _pair(self.crop) == tuple(example.shape[-2:])
        )

    def missing(self) -> list[str]:
        """Name what is not stated."""
        parts = {
            "mean and std": self.mean if self.dtype != "uint8" else (),
            "size": self.crop,
            "number of channels": self.channels,
        }
        return [name for name, value in parts.items() if value is None]

    def sentence(self) -> str:
        """Say what is done to an image."""
        kind = "grayscale" if self.channels == 1 else "RGB"
        resized, cut, missing = self.resize, self.crop, self.missing()
        steps = [kind]
        if resized is not None:
            steps[0] += f", resized to {_in_words(resized)} ({self.interpolation or 'bilinear'})"
        if cut is not None and (cut != resized or isinstance(cut, int)):
            steps.append(f"{_in_words(_pair(cut))} cut from the centre")
        if missing:
            steps.append(f"the {' and '.join(missing)} not stated")
        if self.dtype == "uint8":
            steps.append("pixels from 0 to 255 as they are (uint8)")
        elif self.normalizes:
            mean, std = (", ".join(f"{n:.4g}" for n in numbers) for numbers in self._numbers())
            steps.append(f"pixels / 255, mean {mean}, std {std}")
        elif self.mean is not None:
            steps.append("pixels / 255, not normalized")
        return "; ".join(steps)

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the transform with these numbers, which is that of torchvision's presets.

        Raises
        ------
        MissingDependency
            If torchvision is not installed.
        OptionError
            If something is not stated.
        """
        check_stated(self)
        # Not `transforms.v2`, whose last digits differ from those of the presets.
        steps = import_torchvision("transforms")
        chain = [
            steps.Resize(self.resize, steps.InterpolationMode(self.interpolation or "bilinear")),
            steps.CenterCrop(self.crop),
            steps.PILToTensor(),
        ]
        if self.dtype != "uint8":
            chain.append(steps.ConvertImageDtype(torch.float32))
            if self.normalizes:
                chain.append(steps.Normalize(*self._numbers()))
        return steps.Compose(chain)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OwnTransform:
    """A function of the user's own from a PIL image to a tensor; only its source is recorded.

    `function` is None where it was recorded and nothing brings it again; `steps` is what it says of
    itself.  What comes out must look like one of the `example`, (n, ...), but for height and width.
    """

    function: Callable[[Any], Any] | None
    source: str
    steps: str = ""
    example: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, function: Callable[[Any], Any], source: str) -> OwnTransform:
        """Take a function, and what it says of itself without where it lies in memory."""
        steps = " ".join(re.sub(r" at 0x[0-9a-f]+", "", repr(function)).split())
        return cls(function, source, f"{steps:.500}")

    @property
    def mode(self) -> str:
        """What PIL calls the images that go in."""
        gray = self.example is not None and self.example.ndim == 4 and self.example.shape[1] == 1
        return "L" if gray else "RGB"

    def record(self) -> dict[str, Any]:
        """Return where it comes from, as JSON-able data."""
        return {"transform": published(self.source), "steps": self.steps}

    def sentence(self) -> str:
        """Say what is done to an image."""
        return f"{self.mode}, by the transform of {self.source}: {self.steps}"

    def fitted(self, example: Tensor | None, source: str) -> OwnTransform:
        """Note what has to come out; `source` is not needed here."""
        return dataclasses.replace(self, example=example)

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the function, with a check of what it returns, if anything brings it."""
        check_stated(self)
        return self._checked

    def check(self, image: Any) -> None:
        """Refuse a transform that fails on an image, or that draws something (DataError)."""
        before = _generators()
        first = self._checked(image)
        if _generators() != before or not all(
            self._checked(image).equal(first) for _ in range(_DRAWS)
        ):
            raise DataError(
                f"the transform of {self.source} makes another tensor of one image each time; give "
                "the one for evaluation, which draws nothing"
            )

    def _checked(self, image: Any) -> Tensor:
        assert self.function is not None
        try:
            found = self.function(image)
        except Exception as error:  # it is anyone's code
            raise DataError(
                f"the transform of {self.source} fails on an image: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        if not isinstance(found, Tensor):
            raise DataError(
                f"the transform of {self.source} returns a {type(found).__name__}; return a tensor "
                "(channels, height, width)"
            )
        wanted = self.example
        if wanted is not None and (
            found.ndim != wanted.ndim - 1
            or found.shape[0] != wanted.shape[1]
            or found.is_floating_point() != wanted.is_floating_point()
        ):
            raise DataError(
                f"the transform of {self.source} returns {found.dtype} of {tuple(found.shape)}, "
                f"and the example is {wanted.dtype} of {tuple(wanted.shape)}; let them agree"
            )
        return found


def _generators() -> tuple[Any, ...]:
    """Return the states of what transforms draw from."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


AnyPreprocessing: TypeAlias = Preprocessing | OwnTransform


def as_preprocessing(given: Any, source: str) -> AnyPreprocessing:
    """Read what a source, in words, gives as what is done to an image.

    That is a `Preprocessing`, a classification preset of torchvision, or a function from a PIL
    image to a tensor.

    Raises
    ------
    OptionError
        If it is something else.
    """
    if isinstance(given, Preprocessing | OwnTransform):
        return given
    if callable(given) and not isinstance(given, type):
        preset = ("resize_size", "crop_size", "mean", "std", "interpolation")
        if all(hasattr(given, name) for name in preset) and getattr(given, "antialias", True):
            return Preprocessing.of(given)
        return OwnTransform.of(given, source)
    raise OptionError(
        f"{source} gives {safe_repr(given)} ({type(given).__name__}) as what is done to an "
        "image; give an osscar.Preprocessing, a preset of torchvision, or a function from a PIL "
        "image to a tensor"
    )


def check_stated(preprocessing: AnyPreprocessing, source: str = "a model") -> None:
    """Refuse to guess what is done to an image: an OptionError says how to state it."""
    if isinstance(preprocessing, OwnTransform):
        if preprocessing.function is None:
            raise OptionError(
                f"{source} was calibrated with images by the transform of {preprocessing.source} "
                f"({preprocessing.steps}), which nothing brings; give the code that returns it "
                f"(--dense), or {_HOW_TO_STATE['mean and std']}"
            )
        return
    missing = preprocessing.missing()
    if missing:
        named = [one for one in missing if one != "size" or "number of channels" not in missing]
        options, keywords = zip(*(_EXAMPLES[name] for name in named), strict=True)
        raise OptionError(
            f"nothing states the {' and '.join(missing)} of the images that {source} reads. "
            f"Give {'; and '.join(_HOW_TO_STATE[name] for name in named)}, as in its training. "
            f"Example: `osscar prune MODEL {' '.join(options)} ...`. In Python: "
            f"`preprocessing=osscar.Preprocessing({', '.join(keywords)})`. Code of your own can "
            "return (model, example, transform) instead."
        )


def _is_size(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, tuple) and len(value) == 2)
    return whole and all(
        isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= _LARGEST_SIDE
        for n in _pair(value)
    )


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _pair(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _in_words(size: Size) -> str:
    return f"{size[0]} x {size[1]}" if isinstance(size, tuple) else f"a shorter side of {size}"
