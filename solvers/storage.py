"""Named tensors with a JSON header, as ``.npz`` or ``.safetensors``; nothing is ever pickled."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from solvers.errors import ProblemError

_HEADER = "header"
_UNREADABLE = (
    *(KeyError, TypeError, ValueError, OSError, EOFError),
    *(zipfile.BadZipFile, safetensors.SafetensorError),
)


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `tensors` and a JSON-able `header` in the format that the suffix names.

    The file appears whole or not at all.

    Raises
    ------
    ProblemError
        If the suffix is neither ``.npz`` nor ``.safetensors``.
    """
    suffix = _known_suffix(path)
    text = json.dumps(header)
    partial = Path(f"{os.fspath(path)}.partial")
    on_cpu = {key: value.cpu().contiguous() for key, value in tensors.items()}
    try:
        if suffix == ".npz":
            with partial.open("wb") as file:
                arrays = {key: value.numpy() for key, value in on_cpu.items()}
                arrays[_HEADER] = np.array(text)
                np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub mistakes names
        else:
            safetensors.torch.save_file(on_cpu, partial, metadata={_HEADER: text})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file that `write` wrote.

    Raises
    ------
    ProblemError
        If the file is missing, has another suffix, or is not in that format.
    """
    suffix = _known_suffix(path)
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                tensors = {key: torch.from_numpy(archive[key]) for key in archive if key != _HEADER}
                return json.loads(str(archive[_HEADER])), tensors
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ProblemError(f"there is no problem file {path}") from error
    except _UNREADABLE as error:
        raise ProblemError(f"{path} is not a problem file: {error}") from error


def _known_suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in (".npz", ".safetensors"):
        raise ProblemError(f"{path}: a problem file ends in .npz or .safetensors")
    return suffix
