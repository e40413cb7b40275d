"""What is done to an image before a model sees it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from pydantic import ConfigDict
from torch import Tensor

from osscar.core.errors import FileError, ImageError, MissingDependency
from osscar.core.json_files import STRICT, validated

_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""The values of torchvision's InterpolationMode."""

_LARGEST_SIDE = 2**14
Size: TypeAlias = int | tuple[int, int]
"""A side in pixels, or a height and a width."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What torchvision's classification preset does to an image before the model sees it.

    Parameters
    ----------
    resize
        The shorter side after resizing, in pixels; or height and width, whatever they were.
    crop
        The side of the square that is cut from the centre, or height and width.
    mean, std
        Of each channel, for values in [0, 1].
    interpolation
        As torchvision calls it.

    Raises
    ------
    ImageError
        If a number makes no sense.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    resize: Size = 256
    crop: Size = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name, value in (("resize", self.resize), ("crop", self.crop)):
            if not all(isinstance(n, int) and 1 <= n <= _LARGEST_SIDE for n in _pair(value)):
                raise ImageError(f"{name} is {value}; give pixels, from 1 to {_LARGEST_SIDE}")
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        positive = finite and min(self.std, default=0) > 0
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or not positive:
            raise ImageError(
                f"mean is {self.mean} and std {self.std}; give one number a channel, std above 0"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ImageError(
                f"interpolation is {self.interpolation!r}; give one of {', '.join(_INTERPOLATIONS)}"
            )

    @classmethod
    def of(cls, transforms: Any) -> Preprocessing:
        """Read the numbers of what ``weights.transforms()`` of torchvision returns."""
        return cls(
            resize=int(transforms.resize_size[0]),
            crop=int(transforms.crop_size[0]),
            mean=tuple(map(float, transforms.mean)),
            std=tuple(map(float, transforms.std)),
            interpolation=transforms.interpolation.value,
        )

    @classmethod
    def to_size(cls, height: int, width: int | None = None) -> Preprocessing:
        """Lead to images of one size.

        A square of side `height` is the centre of an image whose shorter side has that length; a
        rectangle is the whole image, stretched.
        """
        size: Size = height if width in (None, height) else (height, int(width or 0))
        return cls(resize=size, crop=size)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Read what ``dataclasses.asdict`` wrote.

        Raises
        ------
        ImageError
            If a field is missing or makes no sense.
        """
        try:
            return validated(dict(data), cls, "the preprocessing")
        except FileError as error:
            raise ImageError(error.reason) from error

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the transform with these numbers, which is that of torchvision's presets.

        Raises
        ------
        MissingDependency
            If torchvision is not installed.
        """
        # Not `transforms.v2`, whose last digits differ from those of the presets.
        steps = import_torchvision("transforms")
        return steps.Compose(  # type: ignore[no-any-return]
            [
                steps.Resize(self.resize, steps.InterpolationMode(self.interpolation)),
                steps.CenterCrop(self.crop),
                steps.PILToTensor(),
                steps.ConvertImageDtype(torch.float32),
                steps.Normalize(self.mean, self.std),
            ]
        )


def _pair(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def import_torchvision(module: str) -> Any:
    """Import a module of torchvision.

    Raises
    ------
    MissingDependency
        If it is not installed.
    """
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ImportError as error:
        raise MissingDependency(
            "images and torchvision's models need the package 'torchvision'; install it with "
            "pip install 'osscar[vision]'"
        ) from error
