"""Data of any other kind than text and images: tensors, fed to a model as they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from osscar.base.errors import DataError, FileError
from osscar.base.files import short_hash
from osscar.base.inputs import safe_repr, whole_number
from osscar.data.archives import SUFFIXES, located, npz_headers, read_tensors
from osscar.data.batches import check_arguments, check_tensors, named_example, needed_arguments
from osscar.data.samples import IMAGES, LABELS, SampleSet
from osscar.network.modules import number_kind


@dataclass(frozen=True, eq=False)
class TensorSet(SampleSet):
    """Samples that a model reads as they are: sound, features, tokens, several of these.

    Parameters
    ----------
    source
        Where they come from, in words.
    tensors
        By the names of the arguments that read them; the first dimension of each is the sample.
    labels
        The right class of each sample, (n,) of whole numbers, or of each of its predictions,
        (n, d1, ...), which (n, classes, d1, ...) are scores of, or else (n, d1, ..., classes); -100
        is not scored.  They become int64.  None where they are not known.

    Raises
    ------
    DataError
        If they are no mapping of tensors, one is empty, has NaN or infinite entries or no plain
        values, or the numbers of samples differ.
    """

    source: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_tensors(self.tensors)
        object.__setattr__(self, "labels", _checked_labels(self.labels, len(self)))

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def arguments(self) -> Mapping[str, Tensor]:
        """Return the tensors."""
        return self.tensors

    def _rows(self, rows: Tensor) -> TensorSet:
        labels = None if self.labels is None else self.labels[rows]
        drawn = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, tensors=drawn, labels=labels)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield at most `size` samples at a time.

        Raises
        ------
        OptionError
            If `size` is not positive.
        """
        whole_number(size, "the batch size (--batch-size)", 1)
        for start in range(0, len(self), size):
            yield {name: tensor[start : start + size] for name, tensor in self.tensors.items()}

    def fingerprints(self) -> list[int]:
        """Return a hash of each sample, whatever its number format, to recognize it by."""
        tensors = [(name, _comparable(self.tensors[name])) for name in sorted(self.tensors)]
        return [
            short_hash(b"".join(_bytes(name, tensor[row]) for name, tensor in tensors))
            for row in range(len(self))
        ]


@dataclass(frozen=True, eq=False)
class SampleList(SampleSet):
    """Samples of sizes of their own, such as graphs or sequences; each runs alone.

    Parameters
    ----------
    source
        Where they come from, in words.
    samples
        Each as the model reads it: tensors by the names of the arguments, of any dimensions.
    labels
        The right class of each, (n,) of whole numbers, which become int64, or None.

    Raises
    ------
    DataError
        If labels are no such numbers.
    """

    alone: ClassVar[bool] = True

    source: str
    samples: Sequence[Mapping[str, Tensor]] = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", _checked_labels(self.labels, len(self)))

    def __len__(self) -> int:
        return len(self.samples)

    def arguments(self) -> list[Mapping[str, Tensor]]:
        """Return the samples."""
        return list(self.samples)

    def _rows(self, rows: Tensor) -> SampleList:
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, samples=[self.samples[row] for row in rows.tolist()], labels=labels)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the samples, one at a time whatever the size."""
        yield from map(dict, self.samples)

    def fingerprints(self) -> list[int]:
        """Return a hash of each sample, whatever its number format, to recognize it by."""
        return [
            short_hash(b"".join(_bytes(name, _comparable(one[name])) for name in sorted(one)))
            for one in self.samples
        ]


def _checked_labels(labels: Any, count: int) -> Tensor | None:
    """Return labels as int64, or refuse what are not as many whole numbers as there are samples."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        given = safe_repr(labels)
    elif _kind(labels) == "whole" and labels.shape[:1] == (count,):
        return labels.to(torch.int64)
    else:
        given = f"{labels.dtype} of {tuple(labels.shape)}"
    raise DataError(f"the labels must be {count} whole numbers, one a sample, not {given}")


def _comparable(tensor: Tensor) -> Tensor:
    """Return a tensor in the number format in which the same values are recognized."""
    if tensor.is_complex():
        return tensor.to("cpu", torch.complex64)
    return tensor.to("cpu", torch.float32 if tensor.is_floating_point() else torch.int64)


def _bytes(name: str, values: Tensor) -> bytes:
    shape = f"{name} {values.dtype} {tuple(values.shape)} "
    return shape.encode() + values.detach().contiguous().numpy().tobytes()


# ---- files -------------------------------------------------------------------------------


def holds_images(
    spec: str | Path, model: nn.Module, example: Mapping[str, Tensor] | None = None
) -> bool:
    """Tell whether a name stands for images rather than tensors; no data are read.

    Images are a directory, and uint8 `images` of 3 or 4 dimensions in an ``.npz`` file, unless
    the model has an argument of that name that takes other data, or more beside it.  `example` are
    inputs that it is known to take.

    Raises
    ------
    FileError
        If it cannot be looked for, or is a damaged archive.
    """
    _, path, part = located(spec, "the data", "a directory or a file")
    if path.is_dir():
        return True
    if path.suffix != ".npz" or not path.is_file():
        return False
    shape, dtype = npz_headers(path).get(f"{part}_{IMAGES}" if part else IMAGES, ((), None))
    if str(dtype) != "uint8" or len(shape) not in (3, 4):
        return False
    if IMAGES not in inspect.signature(model.forward).parameters:
        return True
    known = (example or {}).get(IMAGES)
    as_they_are = known is not None and known.shape[1:] == shape[1:]
    return len(needed_arguments(model, example)) == 1 and not as_they_are


def load_tensors(
    spec: str | Path,
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
) -> TensorSet:
    """Read the samples in a file for a model, to be fed to it as they are.

    Parameters
    ----------
    spec
        An ``.npz`` or ``.safetensors`` file whose entries are named after the arguments of the
        model's forward pass, the first dimension of each being the sample; `labels` may hold the
        right classes.  ``FILE.npz:test`` reads ``test_x`` for the argument ``x``.
    model
        What will read them.
    example
        Inputs that the model is known to take, one tensor, several in the order of the arguments,
        or by name: an entry of another shape (but for the number of samples) or of another kind of
        number is refused.  None checks names alone.

    Raises
    ------
    DataError
        If the example inputs are none of the model's.
    FileError
        If there is no such file, it is damaged, or its entries do not fit the model.
    """
    text, path, part = located(spec, "the file of tensors", "an .npz or .safetensors file")
    if path.suffix not in SUFFIXES or not path.is_file():
        raise FileError(
            text, f"there is no {' or '.join(SUFFIXES)} file of that name; {_OR_IMAGES}"
        )
    known = None if example is None else named_example(model, example)
    prefix = f"{part}_" if part else ""

    def wanted(names: Iterable[str]) -> list[str]:
        of_part = [name for name in names if name.startswith(prefix)]
        if not of_part:
            raise FileError(path, f"it has no entries {prefix}..., only {', '.join(names)}")
        return of_part

    entries = read_tensors(path, wanted)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in entries.items()}
    needed = needed_arguments(model, known)
    labels = None if LABELS in needed else tensors.pop(LABELS, None)
    try:
        check_arguments(model, tensors, known)
        fitted = {name: _like(name, t, (known or {}).get(name)) for name, t in tensors.items()}
        return TensorSet(text, fitted, labels)
    except DataError as error:
        hint = f"; {_OR_IMAGES}" if IMAGES in tensors else _hint_at_parts(text, tensors, needed)
        raise FileError(path, f"{error}{hint}") from error


_OR_IMAGES = "images are a directory, or uint8 `images` of (n, height, width, 3) in an .npz file"


def _hint_at_parts(spec: str, names: Iterable[str], needed: Iterable[str]) -> str:
    """Say how to read a part of a file whose entries look as if it had some."""
    parts = {
        name.removesuffix(f"_{own}") for name in names for own in needed if name.endswith(f"_{own}")
    }
    return f"; {spec}:{min(parts)} reads the entries {min(parts)}_..." if parts else ""


def _like(name: str, tensor: Tensor, example: Tensor | None) -> Tensor:
    """Refuse a tensor unlike an example; whole numbers get the width of the example's."""
    if example is None:
        return tensor
    alike = tensor.shape[1:] == example.shape[1:] and tensor.ndim == example.ndim
    if not alike or _kind(tensor) != _kind(example):
        mine, theirs = (
            f"{str(one.dtype).removeprefix('torch.')} of {tuple(one.shape)}"
            for one in (tensor, example)
        )
        raise DataError(
            f"{name!r} is {mine}, and in the example inputs {theirs}: only the first number, that "
            "of samples, may differ; give data like the example, or an example like the data"
        )
    if _kind(tensor) != "whole" or tensor.dtype == example.dtype:
        return tensor
    cast = tensor.to(example.dtype)
    if not torch.equal(cast.long(), tensor.long()):
        raise DataError(
            f"{name!r} has numbers that {example.dtype}, which the example inputs have, does not "
            "hold; give others, or another example"
        )
    return cast


def _kind(tensor: Tensor) -> str:
    return "bool" if tensor.dtype == torch.bool else number_kind(tensor)
