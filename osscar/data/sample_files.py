"""Tensors by name in a file from outside, which are fed to a model as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from osscar.base.errors import DataError, FileError, first_line
from osscar.base.files import reason_of
from osscar.base.inputs import check_regular, file_name
from osscar.base.memory import attempt
from osscar.data.batches import accepted_arguments, check_arguments, named_example, needed_arguments
from osscar.data.samples import GROUPS, IMAGES, LABELS, TensorSet, kind_of_numbers

SUFFIXES = (".npz", ".safetensors")

_OR_IMAGES = "images are a directory, or uint8 `images` of (n, height, width, 3) in an .npz file"


def located(spec: str | Path, what: str, give: str) -> tuple[str, Path, str]:
    """Return a name as text, and the file and the prefix of its entries that it stands for.

    ``FILE.npz:PART`` is for the entries ``PART_...`` of a file, unless that is a file's name.
    `what` it names, and what to `give`, are words for messages.
    """
    text = file_name(spec, what, give)
    try:
        path = Path(text).expanduser()
        file, _, part = text.rpartition(":")
        if not file.endswith(SUFFIXES) or path.exists():
            return text, path, ""
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(text, f"it cannot be looked for: {reason_of(error)}") from error
    return text, Path(file).expanduser(), f"{part}_"


def read_tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Read the tensors of an ``.npz`` or ``.safetensors`` file that are wanted by their names.

    Nothing is unpickled.
    """
    # Of a damaged file zipfile, numpy and safetensors raise whatever they meet.
    with attempt() as tried:
        check_regular(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                found = {name: file.get_tensor(name) for name in names if wanted(name)}
        else:
            with np.load(path, allow_pickle=False) as arrays:
                names = list(arrays.files)
                found = {name: _tensor(arrays[name]) for name in names if wanted(name)}
    if tried.failed:
        reason = getattr(tried.error, "strerror", None) or first_line(tried.error)
        raise FileError(path, f"it cannot be read as {path.suffix}: {reason}") from tried.error
    if not found:
        raise FileError(path, f"it has no entries of that name, only {', '.join(names) or 'none'}")
    return found


def _tensor(array: np.ndarray) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)


def holds_images(
    spec: str | Path, model: nn.Module, example: Mapping[str, Tensor] | None = None
) -> bool:
    """Tell whether a name stands for images rather than tensors.

    Images are a directory, and uint8 `images` in an ``.npz`` file, unless the model reads uint8
    under that name in its `example`, or more inputs beside it.
    """
    _, path, prefix = located(spec, "the data", "a directory or a file")
    if path.suffix != ".npz" or not path.is_file():
        return path.is_dir()
    with attempt() as tried, np.load(path, allow_pickle=False) as arrays:
        pixels = arrays[f"{prefix}{IMAGES}"] if f"{prefix}{IMAGES}" in arrays.files else None
    if tried.failed:
        raise FileError(
            path, f"it cannot be read as .npz: {first_line(tried.error)}"
        ) from tried.error
    if pixels is None or pixels.dtype != np.uint8:
        return False
    needed, read = needed_arguments(model, example), (example or {}).get(IMAGES)
    as_it_is = IMAGES in accepted_arguments(model) and (
        len(needed) > 1 or (read is not None and read.dtype is torch.uint8)
    )
    return not as_it_is


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
        right classes, and `sample_groups` a number for each sample: those of one number are near
        copies of one another, are never divided into two parts, and count as one.
        ``FILE.npz:test`` reads ``test_x`` for the argument ``x``.
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
    text, path, prefix = located(spec, "the file of tensors", "an .npz or .safetensors file")
    if path.suffix not in SUFFIXES or not path.is_file():
        raise FileError(
            text, f"there is no {' or '.join(SUFFIXES)} file of that name; {_OR_IMAGES}"
        )
    known = {} if example is None else named_example(model, example)
    entries = read_tensors(path, lambda name: name.startswith(prefix))
    tensors = {name.removeprefix(prefix): tensor for name, tensor in entries.items()}
    needed = needed_arguments(model, known)
    labels, groups = (
        None if name in needed else tensors.pop(name, None) for name in (LABELS, GROUPS)
    )
    try:
        check_arguments(model, tensors, known)
        fitted = {name: _like(name, tensor, known.get(name)) for name, tensor in tensors.items()}
        return TensorSet(text, fitted, labels, groups)
    except DataError as error:
        hint = f"; {_OR_IMAGES}" if IMAGES in tensors else _hint_at_parts(text, tensors, needed)
        raise FileError(path, f"{error}{hint}") from error


def _hint_at_parts(spec: str, names: Iterable[str], needed: Iterable[str]) -> str:
    """Say how to read a part of a file whose entries look as if it had some."""
    parts = {
        name.removesuffix(f"_{own}") for name in names for own in needed if name.endswith(f"_{own}")
    }
    return f"; {spec}:{min(parts)} reads the entries {min(parts)}_..." if parts else ""


def _like(name: str, tensor: Tensor, example: Tensor | None) -> Tensor:
    """Refuse a tensor unlike an example; narrower whole numbers get the width of the example's."""
    if example is None:
        return tensor
    kinds = [kind_of_numbers(one) for one in (tensor, example)]
    if tensor.shape[1:] != example.shape[1:] or kinds[0] != kinds[1]:
        mine, theirs = (
            f"{str(one.dtype).removeprefix('torch.')} of {tuple(one.shape)}"
            for one in (tensor, example)
        )
        raise DataError(
            f"{name!r} is {mine}, and in the example inputs {theirs}: only the first number, that "
            "of samples, may differ; give data like the example, or an example like the data"
        )
    narrower = kinds[0] == "whole" and torch.can_cast(tensor.dtype, example.dtype)
    fits = narrower and tensor.element_size() <= example.element_size()
    return tensor.to(example.dtype) if fits else tensor
