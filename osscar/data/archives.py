"""Arrays by name in a file from outside, which is checked by what it says of itself, then read."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from osscar.base.errors import FileError, OsscarError, first_line
from osscar.base.files import reason_of
from osscar.base.inputs import check_regular, file_name

_ARCHIVE_LIMIT = 2**33
"""Bytes of arrays that are held in memory at once."""

_NUMBERS = "biufc"
"""Kinds of numpy's formats that are numbers, or true or false; objects and texts are none."""

SUFFIXES = (".npz", ".safetensors")

Header: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]
"""What an array in a file says of itself: its shape and number format."""


def located(spec: str | Path, what: str, give: str) -> tuple[str, Path, str]:
    """Return a name as text, and the file and the part of it that it stands for.

    ``FILE.npz:PART`` is a part of a file; what exists by that name has no part.  `what` it names,
    and what to `give`, are words for messages.

    Raises
    ------
    OptionError
        If it is neither text nor a path.
    FileError
        If there can be no such place.
    """
    text = file_name(spec, what, give)
    try:
        path = Path(text).expanduser()
        file, colon, part = text.rpartition(":")
        if colon and file.endswith(SUFFIXES) and not path.exists():
            path = Path(file).expanduser()
        else:
            part = ""
        path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(text, f"it cannot be looked for: {reason_of(error)}") from error
    return text, path, part


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
        first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def read_tensors(
    path: Path, wanted: Callable[[Mapping[str, Header | None]], Iterable[str]]
) -> dict[str, Tensor]:
    """Read tensors of an ``.npz`` or ``.safetensors`` file; nothing is unpickled.

    `wanted` names those to read, or refuses them, by the names of all and, of an ``.npz`` file,
    what each says of itself.

    Raises
    ------
    FileError
        If the file is damaged, or what is wanted is no numbers or too large.
    """
    with _readable(path):
        check_regular(path)
        if path.suffix == ".safetensors":
            _check_size(path, "it", path.stat().st_size)
            with safe_open(path, "pt") as file:
                names = wanted(dict.fromkeys(file.keys()))
                return {name: file.get_tensor(name) for name in names}
        headers = npz_headers(path)
        chosen = {name: headers[name] for name in wanted(headers)}
        for name, (_, dtype) in chosen.items():
            if dtype.kind not in _NUMBERS:
                raise FileError(path, f"{name} holds {dtype}; give numbers")
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in chosen.values())
        _check_size(path, ", ".join(chosen), size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in chosen}


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)


def _check_size(path: Path, what: str, size: int) -> None:
    if size > _ARCHIVE_LIMIT:
        raise FileError(
            path, f"{what} would take {size:,} bytes of memory; give at most {_ARCHIVE_LIMIT:,}"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # of a damaged file zipfile, numpy and safetensors raise whatever
        reason = getattr(error, "strerror", None) or first_line(error)
        raise FileError(path, f"it cannot be read as {path.suffix}: {reason}") from error
