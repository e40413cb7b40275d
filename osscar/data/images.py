"""Images for calibration and evaluation: a directory or an ``.npz`` file, decoded when needed."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from osscar.core.errors import FileError, ImageError, MissingDependency
from osscar.core.files import STRICT, digest, validated
from osscar.data.tokens import named_generator
from osscar.shrinking.lineage import Calibration

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}
)

_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""The values of torchvision's InterpolationMode."""

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
            if min(_pair(value)) < 1:
                raise ImageError(f"{name} is {value}; give pixels, at least 1")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or 0 in self.std:
            raise ImageError(
                f"mean is {self.mean} and std {self.std}; give one number a channel, std above 0"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ImageError(
                f"interpolation is {self.interpolation!r}; give one of {', '.join(_INTERPOLATIONS)}"
            )

    @classmethod
    def of(cls, transforms: Any) -> Preprocessing:
        """Read the numbers of a torchvision ``ImageClassification`` preset."""
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
        """Return torchvision's own transform with these numbers.

        Raises
        ------
        MissingDependency
            If torchvision is not installed.
        """
        mode = import_torchvision("transforms").InterpolationMode(self.interpolation)
        preset = import_torchvision("transforms._presets").ImageClassification
        made = preset(crop_size=1, mean=self.mean, std=self.std, interpolation=mode)
        # Set afterwards: as arguments, sizes can only be squares.
        made.crop_size, made.resize_size = _listed(self.crop), _listed(self.resize)
        return made  # type: ignore[no-any-return]


def _pair(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _listed(size: Size) -> list[int]:
    return list(size) if isinstance(size, tuple) else [size]


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


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, decoded and preprocessed when asked for.

    Parameters
    ----------
    source
        Where they come from, in words.
    items
        Paths of files, or arrays (height, width, 3) uint8.
    preprocessing
        What the model wants.
    labels
        Class of each image, (n,) int64, or None.
    classes
        The names of classes in the order of the labels; empty where they are numbers.
    """

    source: str
    items: Sequence[Path] | np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    preprocessing: Preprocessing
    labels: Tensor | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, count: int, seed: int) -> ImageSet:
        """Draw `count` images at random, or all in random order where there are no more.

        Raises
        ------
        ImageError
            If `count` is not positive.
        """
        if count < 1:
            raise ImageError(f"cannot draw {count} images; give at least 1 (--samples)")
        order = torch.randperm(len(self), generator=named_generator("images", seed))[:count]
        return self._select(order)

    def first(self, count: int) -> ImageSet:
        """Return the first `count` images."""
        return self._select(torch.arange(min(count, len(self))))

    def _select(self, rows: Tensor) -> ImageSet:
        if isinstance(self.items, np.ndarray):
            items: Any = self.items[rows.numpy()]
        else:
            items = [self.items[row] for row in rows.tolist()]
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, items=items, labels=labels)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield preprocessed images, (at most size, 3, height, width) float32.

        Raises
        ------
        ImageError
            If a file is no image that can be decoded.
        """
        transform = self.preprocessing.transform()
        for start in range(0, len(self), size):
            some = range(start, min(start + size, len(self)))
            yield torch.stack([transform(self._decoded(index)) for index in some])

    def tensor(self) -> Tensor:
        """Return all images at once, (n, 3, height, width) float32.

        Raises
        ------
        ImageError
            If a file is no image that can be decoded.
        """
        return torch.cat(list(self.batches(64)))

    def describe(self) -> dict[str, Any]:
        """Return what reports say: the source, each image's fingerprint, and the preprocessing."""
        return {
            "source": self.source,
            "images": self.fingerprints(),
            "samples": len(self),
            "preprocessing": asdict(self.preprocessing),
        }

    def fingerprints(self) -> list[str]:
        """Return a short hash of each image as it is stored, to recognize it by."""
        return [digest(_stored(item))[:16] for item in self.items]

    def _decoded(self, index: int) -> Any:
        from PIL import Image, UnidentifiedImageError

        item = self.items[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        try:
            with Image.open(item) as image:
                if image.mode.startswith(("I", "F")):  # convert() would clip these at 255
                    raise ImageError(
                        f"{str(item)!r} has pixels of mode {image.mode!r}, 16 or 32 bits wide; "
                        "rescale it to 8 bits"
                    )
                return image.convert("RGB")
        except Image.DecompressionBombError as error:
            raise ImageError(f"{str(item)!r} is too large: {error}; shrink the file") from error
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ImageError(
                f"{str(item)!r} cannot be decoded as an image: {error}; mend or remove the file"
            ) from error


def _stored(item: Path | np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    if isinstance(item, np.ndarray):
        return item.tobytes()
    try:
        return item.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {str(item)!r}: {error.strerror}") from error


def load_images(spec: str | Path, preprocessing: Preprocessing) -> ImageSet:
    """Find images by path.

    Parameters
    ----------
    spec
        A directory (searched through; if all its images lie in subdirectories, these are classes,
        in alphabetical order), or an ``.npz`` file with ``images`` (n, height, width, 3) uint8 and
        perhaps ``labels`` (n,).  ``FILE.npz:test`` reads ``test_images`` and ``test_labels``.
    preprocessing
        What the model wants.

    Raises
    ------
    ImageError
        If there is nothing of the kind, or no image in it.
    """
    text = str(spec)
    path, part = Path(text).expanduser(), ""
    if not path.exists() and ".npz:" in text:
        file, _, part = text.rpartition(":")
        path = Path(file).expanduser()
    if path.is_dir():
        return _from_directory(path, preprocessing)
    if path.suffix == ".npz" and path.is_file():
        return _from_archive(path, part, preprocessing)
    raise ImageError(f"no images at {text!r}; give a directory of images or an .npz file")


def _from_directory(path: Path, preprocessing: Preprocessing) -> ImageSet:
    files = sorted(
        file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    )
    if not files:
        raise ImageError(
            f"{str(path)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); give another"
        )
    folders = [file.relative_to(path).parts[0] for file in files if file.parent != path]
    if len(folders) < len(files):
        return ImageSet(str(path), files, preprocessing)
    classes = tuple(sorted({*folders, *(child.name for child in path.iterdir() if child.is_dir())}))
    labels = torch.tensor([classes.index(folder) for folder in folders])
    return ImageSet(str(path), files, preprocessing, labels, classes)


def _from_archive(path: Path, part: str, preprocessing: Preprocessing) -> ImageSet:
    prefix = f"{part}_" if part else ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            if f"{prefix}images" not in names:
                raise ImageError(
                    f"{str(path)!r} has no {prefix + 'images'!r}, only {', '.join(names)}; give "
                    "FILE.npz, or FILE.npz:PART for PART_images"
                )
            images = archive[f"{prefix}images"]
            labels = archive[f"{prefix}labels"] if f"{prefix}labels" in names else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ImageError(f"{str(path)!r} is not an .npz file that can be read: {error}") from error
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        raise ImageError(
            f"{prefix}images in {str(path)!r} must be uint8 (n, height, width, 3) and not empty, "
            f"not {images.dtype} of {images.shape}"
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ImageError(
            f"{prefix}labels in {str(path)!r} must be {len(images)} whole numbers, not "
            f"{labels.dtype} of {labels.shape}"
        )
    found = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return ImageSet(f"{path}:{part}" if part else str(path), images, preprocessing, found)


def refuse_overlap(images: ImageSet, calibration: Iterable[Calibration]) -> None:
    """Refuse to score images that a model was calibrated on.

    Parameters
    ----------
    images
        What is to be scored.
    calibration
        From the lineage of the model.

    Raises
    ------
    ImageError
        If an image is one of those that calibrated the model.
    """
    for known in calibration:
        used = frozenset(known.images)
        shared = sum(mine in used for mine in images.fingerprints()) if used else 0
        if shared:
            raise ImageError(
                f"{shared} of the {len(images)} images calibrated this model ({known.source}); "
                "score others"
            )
