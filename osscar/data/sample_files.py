"""Tensors by name in a file from outside, which are fed to a model as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from osscar.base.errors import DataError, FileError, first_line
from osscar.base.files import reason_of
from osscar.base.inputs import file_name
from osscar.base.memory import attempt
from osscar.data.batches import accepted_arguments, check_arguments, named_example, needed_arguments
from osscar.data.samples import GROUPS, IMAGES, LABELS, TensorSet, kind_of_numbers

_SUFFIXES = (".npz", ".safetensors")


def located(spec: str | Path, what: str, give: str) -> Path:
    """Return the path that a name stands for; `what` it names and what to `give` are for errors."""
    text = file_name(spec, what, give)
    try:
        path = Path(text).expanduser()
        path.exists()  # which fails of a name that is too long
        return path
    except (OSError, RuntimeError) as error:
        raise FileError(text, f"it cannot be looked for: {reason_of(error)}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an ``.npz`` or ``.safetensors`` file; nothing is unpickled."""
    found: dict[str, Tensor] = {}
    # Of a damaged file zipfile, numpy and safetensors raise whatever they meet.
    with attempt() as tried:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: _tensor(arrays[name]) for name in arrays.files}
    if tried.failed:
        reason = getattr(tried.error, "strerror", None) or first_line(tried.error)
        if "allow_pickle" in reason:
            reason = "an entry holds objects; store arrays, and images of several sizes as files"
        raise FileError(path, f"it cannot be read as {path.suffix}: {reason}") from tried.error
    return found


def _tensor(array: np.ndarray) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)


def holds_images(spec: str | Path, model: nn.Module) -> bool:
    """Tell whether a name stands for images rather than tensors.

    Images are a directory, and the entry `images` of an ``.npz`` file, unless the model has an
    argument of that name.
    """
    path = located(spec, "the data", "a directory or a file")
    if path.suffix != ".npz" or not path.is_file() or IMAGES in accepted_arguments(model):
        return path.is_dir()
    names: list[str] = []
    with attempt() as tried, np.load(path, allow_pickle=False) as arrays:
        names = arrays.files
    if tried.failed:
        raise FileError(
            path, f"it cannot be read as .npz: {first_line(tried.error)}"
        ) from tried.error
    return IMAGES in names


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
    path = located(spec, "the file of tensors", "an .npz or .safetensors file")
    if path.suffix not in _SUFFIXES or not path.is_file():
        raise FileError(spec, f"there is no {' or '.join(_SUFFIXES)} file of that name")
    known = {} if example is None else named_example(model, example)
    tensors = read_tensors(path)
    needed = needed_arguments(model, known)
    labels, groups = (
        None if name in needed else tensors.pop(name, None) for name in (LABELS, GROUPS)
    )
    try:
        check_arguments(model, tensors, known)
        fitted = {name: _like(name, tensor, known.get(name)) for name, tensor in tensors.items()}
        return TensorSet(str(spec), fitted, labels, groups)
    except DataError as error:
        raise FileError(path, str(error)) from error


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
