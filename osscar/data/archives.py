"""Arrays by name in a file from outside, which is checked by what it says of itself, then read."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from osscar.base.errors import FileError, OsscarError, first_line
from osscar.base.inputs import check_regular

ARCHIVE_LIMIT = 2**33
"""Bytes of arrays that are held in memory at once."""

_NUMBERS = "biufc"
"""Kinds of numpy's formats that are numbers, or true or false; objects and texts are none."""


SUFFIXES = (".npz", ".safetensors")


def file_and_part(text: str) -> tuple[Path, str]:
    """Return the file that a name stands for, and the part of it: ``FILE.npz:PART`` has one.

    Raises
    ------
    OSError, RuntimeError
        If there can be no such place.
    """
    path = Path(text).expanduser()
    file, colon, part = text.rpartition(":")
    if not colon or path.exists() or not file.endswith(SUFFIXES):
        return path, ""
    return Path(file).expanduser(), part


@dataclass(frozen=True)
class Header:
    """What an array in a file says of itself.

    Attributes
    ----------
    shape
        Its sizes.
    dtype
        Its number format, as numpy calls it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """What it would take in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npz(
    path: Path, wanted: Callable[[dict[str, Header]], Iterable[str]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Read arrays of an ``.npz`` file; nothing is unpickled.

    Parameters
    ----------
    path
        The file.
    wanted
        Names the arrays to read, by what all of them say of themselves; it may refuse them.

    Raises
    ------
    FileError
        If the file is damaged, or what is wanted is no numbers or too large.
    OsscarError
        What `wanted` raises.
    """
    with _readable(path):
        check_regular(path)
        headers = npz_headers(path)
        names = list(wanted(headers))
        for name in names:
            if headers[name].dtype.kind not in _NUMBERS:
                raise FileError(path, f"{name} holds {headers[name].dtype}; give numbers")
        needed = sum(headers[name].nbytes for name in names)
        if needed > ARCHIVE_LIMIT:
            raise FileError(path, _too_large(", ".join(names), needed))
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}


def npz_headers(path: Path) -> dict[str, Header]:
    """Return what the arrays of an ``.npz`` file say of themselves, by name.

    Raises
    ------
    FileError
        If the file is damaged.
    """
    with _readable(path), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name.removesuffix(".npy"): _header(archive, name) for name in members}


def _header(archive: zipfile.ZipFile, member: str) -> Header:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return Header(shape, dtype)


def read_tensors(path: Path, wanted: Callable[[Iterable[str]], Iterable[str]]) -> dict[str, Tensor]:
    """Read tensors of an ``.npz`` or ``.safetensors`` file; nothing is unpickled.

    Parameters
    ----------
    path
        The file.
    wanted
        Names the tensors to read, by the names of all; it may refuse them.

    Raises
    ------
    FileError
        If the file is damaged, or what is wanted is no numbers or too large.
    OsscarError
        What `wanted` raises.
    """
    if path.suffix != ".safetensors":
        with _readable(path):
            return {name: _tensor(array) for name, array in read_npz(path, wanted).items()}
    with _readable(path):
        check_regular(path)
        size = path.stat().st_size
        if size > ARCHIVE_LIMIT:
            raise FileError(path, _too_large("it", size))
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in wanted(list(file.keys()))}


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)


def _too_large(what: str, size: int) -> str:
    return f"{what} would take {size:,} bytes of memory; give at most {ARCHIVE_LIMIT:,}"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # of a damaged file zipfile, numpy and safetensors raise whatever
        reason = getattr(error, "strerror", None) or first_line(error)
        raise FileError(path, f"it cannot be read as {path.suffix}: {reason}") from error
