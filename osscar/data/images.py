"""Images for calibration and evaluation, from files or data sets, decoded when needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from osscar.base.errors import DataError, first_line
from osscar.base.files import short_hash
from osscar.base.inputs import safe_repr, whole_number
from osscar.base.memory import attempt
from osscar.base.printable import listed, pluralize
from osscar.data.loaders import read_tensors
from osscar.data.preprocessing import (
    AnyPreprocessing,
    Preprocessing,
    Transform,
    as_preprocessing,
    check_stated,
)
from osscar.data.samples import (
    GROUPS,
    IMAGES,
    LABEL_NAMES,
    LABELS,
    SampleSet,
    checked_numbers,
    columns_of,
    kind_of_numbers,
)

_IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a file may hold, whatever its name: pixels alone, no program such as PostScript."""

_IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}
)


@dataclass(frozen=True, eq=False)
class ImageSet(SampleSet):
    """Images, which are decoded and preprocessed when they are read.

    Parameters
    ----------
    source
        Where they come from, in words.
    items
        Paths of files, images of PIL, or arrays (height, width, 3) or (height, width) uint8.
    preprocessing
        What is done to an image before the model sees it.
    labels
        Class of each image, (n,) int64, or None.
    classes
        The names of classes in the order of the labels; empty where they are numbers.
    sample_groups
        As of an `osscar.TensorSet`.
    """

    sample_name: ClassVar[str] = "image"

    source: str
    items: Sequence[Any] | np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    preprocessing: AnyPreprocessing
    labels: Tensor | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()
    sample_groups: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.check_numbers(GROUPS)

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, rows: Tensor) -> ImageSet:
        """Return the samples at these positions, (n,) int64."""
        if isinstance(self.items, np.ndarray):
            items: Any = self.items[rows.numpy()]
        else:
            items = [self.items[row] for row in rows.tolist()]
        return replace(self, items=items, **self.known_of(rows))

    def _named_labels(self, classes: Sequence[str], outputs: int) -> Tensor | None:
        """Match folders with classes: by name, by number, or in order if there are as many."""
        labels, names = self.labels, self.classes
        if labels is None or not names:
            return labels
        if set(names) <= set(classes):
            return torch.tensor([classes.index(name) for name in names])[labels]
        if all(name.isdecimal() and len(name) < 10 for name in names):
            return torch.tensor([int(name) for name in names])[labels]
        if len(names) != outputs:
            raise DataError(
                f"{self.source} has {pluralize(len(names), 'class folder')} and the model "
                f"{pluralize(outputs, 'class', 'classes')}; name the folders by class or by "
                "number, or give as many as there are classes"
            )
        return labels

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield preprocessed images, (at most size, channels, height, width) float32 or uint8.

        Raises DataError if a file cannot be decoded, or images become tensors of several shapes.
        """
        whole_number(size, "the batch size (batch_size, `--batch-size`)", 1)
        transform = self.preprocessing.transform()
        for start in range(0, len(self), size):
            some = range(start, min(start + size, len(self)))
            images = [transform(self.decoded(index)) for index in some]
            try:
                yield torch.stack(images)
            except RuntimeError as error:
                raise DataError(
                    f"the images of {self.source} differ in size ({first_line(error)}); give a "
                    "transform that leads to one size"
                ) from error

    def tensor(self) -> Tensor:
        """Return all images at once, (n, channels, height, width) float32 or uint8."""
        return torch.cat(list(self.batches(64)))

    def arguments(self) -> tuple[Tensor, ...]:
        """Return all images at once, a model's only argument."""
        return (self.tensor(),)

    def describe(self) -> dict[str, Any]:
        """Return what reports say, the preprocessing included."""
        return {**super().describe(), "preprocessing": self.preprocessing.record()}

    def sentence(self) -> str:
        """Say what is done to the images."""
        return self.preprocessing.sentence()

    def fingerprints(self) -> list[int]:
        """Return a hash of the pixels of each image, to recognize it by in files of any format."""
        return self._fingerprints

    @cached_property
    def _fingerprints(self) -> list[int]:
        images = map(self.decoded, range(len(self)))
        return [short_hash(f"{one.mode} {one.size} ".encode() + one.tobytes()) for one in images]

    def decoded(self, index: int) -> Any:
        """Return an image as PIL has it, in color or not, as the model reads it (DataError)."""
        from PIL import Image

        item, mode = self.items[index], self.preprocessing.mode
        if isinstance(item, np.ndarray):
            return Image.fromarray(item).convert(mode)
        if isinstance(item, Image.Image):
            _check_form(f"image {index} of {self.source}", item)
            return item.convert(mode)
        # Of a damaged file a decoder raises whatever it meets.
        with attempt(DataError) as tried, Image.open(item, formats=_IMAGE_FORMATS) as image:
            _check_form(str(item), image)
            return image.convert(mode)
        raise DataError(
            f"{str(item)!r} cannot be decoded as an image: {first_line(tried.error)}; mend or "
            f"remove the file ({', '.join(_IMAGE_FORMATS)} can be read)"
        ) from tried.error


def _check_form(item: str, image: Any) -> None:
    """Refuse images that a conversion to 8 bits would clip."""
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{item!r} has pixels of mode {image.mode!r}, 16 or 32 bits wide; rescale it to 8 bits"
        )


def load_images(spec: Any, preprocessing: Any, *, sample_groups: Any = None) -> ImageSet:
    """Find images by path, or take them from a data set.

    Parameters
    ----------
    spec
        A directory (searched through; subdirectories are classes, in alphabetical order), or an
        ``.npz`` file with ``images`` (n, height, width, 3) uint8 and perhaps ``labels`` (n,).
        Grayscale images are (n, height, width) or (n, height, width, 1).  Or a list or data set of
        images of PIL: alone, in pairs (image, label), or in rows such as those of a
        ``datasets.Dataset``, of which one column holds images, and ``label`` perhaps the class.
    preprocessing
        What is done to an image: a function from a PIL image to a tensor, such as a library's, or
        an `osscar.Preprocessing`.  Where that states no size or no channels, they are those of an
        ``.npz`` file's images.
    sample_groups
        As of an `osscar.TensorSet`, in order (of files by path).  An ``.npz`` file may have them.

    Raises
    ------
    DataError, OptionError
        If there is no image, or some lie beside the folders of classes; or the preprocessing is not
        stated in full, fails on the first one, or makes another tensor of it each time.
    """
    images = find_images(spec, as_preprocessing(preprocessing, "the caller"), "a model")
    return images if sample_groups is None else replace(images, sample_groups=sample_groups)


def find_images(spec: Any, preprocessing: AnyPreprocessing, reader: str) -> ImageSet:
    """Find images as `load_images` does; archives tell sizes that nothing states."""
    named = isinstance(spec, str | Path)
    images = _found(spec, preprocessing) if named else _from_rows(spec, preprocessing)
    preprocessing = images.preprocessing
    check_stated(preprocessing, reader)
    if isinstance(preprocessing, Transform) and not preprocessing.repeats(images.decoded(0)):
        raise DataError(
            "the transform of images is random: it returns different tensors for one image; "
            "give the one for evaluation"
        )
    return images


def _found(spec: str | Path, preprocessing: AnyPreprocessing) -> ImageSet:
    path = Path(os.path.expanduser(spec))
    if path.suffix == ".npz" and os.path.isfile(path):
        return _from_archive(path, preprocessing)
    # Not `make_dataset` of torchvision, which walks in circles through links, and opens pipes.
    files = sorted(
        file
        for file in (path.rglob("*") if os.path.isdir(path) else ())
        if file.suffix.lower() in _IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    )
    if not files:
        raise DataError(
            f"there are no images at {str(spec)!r}; give a directory of them "
            f"({', '.join(sorted(_IMAGE_SUFFIXES))}) or an .npz file"
        )
    beside = [file.name for file in files if file.parent == path]
    if len(beside) == len(files):
        return ImageSet(str(path), files, preprocessing)
    if beside:
        raise DataError(
            f"{str(path)!r} has images in folders, which are classes, and {len(beside)} beside "
            f"them ({listed(beside)}); move these away, or the others out of the folders"
        )
    folders = [file.relative_to(path).parts[0] for file in files]
    empty = (c.name for c in path.iterdir() if c.is_dir() and not c.name.startswith("."))
    classes = tuple(sorted({*folders, *empty}))
    labels = torch.tensor([classes.index(folder) for folder in folders])
    return ImageSet(str(path), files, preprocessing, labels, classes)


def _from_archive(path: Path, preprocessing: AnyPreprocessing) -> ImageSet:
    arrays = read_tensors(path)
    pixels = arrays.get(IMAGES)
    shape = () if pixels is None else tuple(pixels.shape)
    fits = min(shape, default=0) > 0 and (len(shape) == 3 or shape[3:] in ((1,), (3,)))
    if pixels is None or pixels.dtype != torch.uint8 or not fits:
        there = "missing" if pixels is None else f"{pixels.dtype} of {shape}"
        raise DataError(
            f"{IMAGES!r} in {str(path)!r} must be uint8 (n, height, width, 3) or (n, height, "
            f"width), and is {there}"
        )
    if pixels.ndim == 4 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if isinstance(preprocessing, Preprocessing):
        height, width = pixels.shape[1:3]
        preprocessing = preprocessing.of_size(height, width, 1 if pixels.ndim == 3 else 3)
    labels = checked_numbers(LABELS, arrays.get(LABELS), len(pixels))
    return ImageSet(str(path), pixels.numpy(), preprocessing, labels, (), arrays.get(GROUPS))


# ---- data sets ---------------------------------------------------------------------------


_ROW = ""
"""The column of an image that is a row by itself."""


def is_image(value: Any) -> bool:
    """Tell whether something is an image of PIL; nothing is imported for it."""
    kind = type(value)
    return hasattr(kind, "convert") and hasattr(kind, "resize") and hasattr(kind, "getbands")


@dataclass(frozen=True, eq=False)
class _Rows(Sequence[Any]):
    """The images of a data set, each looked up when it is needed, in a column or as the row."""

    data: Any
    column: str | int

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        row = self.data[index]
        return row if self.column == _ROW else row[self.column]


def has_images(data: Any) -> bool:
    """Tell whether rows can be looked up in data, the first of which has an image of PIL."""
    return _column_of(data) is not None


def _column_of(data: Any) -> str | int | None:
    """Return where rows have an image of PIL; None if they have none, or cannot be looked up."""
    lookable = hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")
    if not lookable or isinstance(data, Mapping | IterableDataset) or not len(data):
        return None
    row = data[0]
    if is_image(row):
        return _ROW
    several = row if isinstance(row, tuple | list) else ()
    entries = row.items() if isinstance(row, Mapping) else enumerate(several)
    return next((name for name, value in entries if is_image(value)), None)


def _from_rows(data: Any, preprocessing: AnyPreprocessing) -> ImageSet:
    what, column = type(data).__name__, _column_of(data)
    if column is None:
        raise DataError(
            f"no images of PIL can be looked up in {safe_repr(data)} ({what}); give a directory, "
            "an .npz file, or a list or data set of them, and tensors to osscar.load_batches"
        )
    labels, classes = _labels_of(data)
    source = f"{what}, {pluralize(len(data), 'image')}"
    return ImageSet(source, _Rows(data, column), preprocessing, labels, classes)


def _labels_of(data: Any) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return the class of each row, and the names of classes, without reading images if it can."""
    columns = [name for name in LABEL_NAMES if name in columns_of(data)]
    names, targets = getattr(data, "classes", ()), getattr(data, "targets", None)
    if columns:
        targets = list(data[columns[0]])
        names = getattr(data.features[columns[0]], "names", ())
    elif targets is None:
        targets = [_label(data[index]) for index in range(len(data))]
    try:
        labels = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):  # boxes, words, or none
        return None, ()
    if labels.ndim != 1 or kind_of_numbers(labels) not in ("whole", "bool"):
        return None, ()
    return labels.to(torch.int64), tuple(map(str, names))


def _label(row: Any) -> Any:
    if isinstance(row, Mapping):
        return next((row[name] for name in LABEL_NAMES if name in row), None)
    return row[1] if isinstance(row, tuple | list) and len(row) == 2 else None
