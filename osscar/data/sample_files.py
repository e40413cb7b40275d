"""Tensors by name in a file from outside, which are fed to a model as they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from osscar.base.errors import FileError, first_line, of_part
from osscar.base.memory import attempt
from osscar.data.batches import accepted_arguments, check_arguments, needed_arguments
from osscar.data.samples import GROUPS, IMAGES, LABELS, TensorSet

_SUFFIXES = (".npz", ".safetensors")

_INDICES = (torch.int16, torch.uint16, torch.uint32)
"""Whole numbers by which torch does not index, such as tokens in 16 bits: they become int64."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read an ``.npz`` or ``.safetensors`` file, `_INDICES` as int64; nothing is unpickled."""
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
    return {name: one.long() if one.dtype in _INDICES else one for name, one in found.items()}


def _tensor(array: np.ndarray) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)


def holds_images(spec: str | Path, model: nn.Module) -> bool:
    """Tell whether a name is a directory, or an archive of `images` that the model lacks."""
    path = os.path.expanduser(spec)
    if not path.endswith(".npz") or IMAGES in accepted_arguments(model):
        return os.path.isdir(path)
    with attempt(), np.load(path, allow_pickle=False) as arrays:
        return IMAGES in arrays.files
    return False  # whoever reads it will say what is wrong


def load_tensors(spec: str | Path, model: nn.Module) -> TensorSet:
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

    Raises
    ------
    FileError
        If there is no such file, or it is damaged.
    DataError
        If its entries do not fit the model.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix not in _SUFFIXES:
        raise FileError(
            spec,
            f"{type(model).__name__} reads tensors; give a {' or '.join(_SUFFIXES)} file with its "
            "inputs",
        )
    tensors, needed = read_tensors(path), needed_arguments(model)
    labels, groups = (
        None if name in needed else tensors.pop(name, None) for name in (LABELS, GROUPS)
    )
    with of_part(str(spec)):
        check_arguments(model, tensors)
        return TensorSet(str(spec), tensors, labels, groups)
