"""Named tensors with a JSON header, as ``.npz`` or ``.safetensors``; nothing is ever pickled."""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.lib import format as npy
from torch import Tensor

from solvers.errors import ProblemError

_HEADER = "header"
_LONGEST_HEADER = 1 << 20
"""Characters; a thousand consumers take a tenth of that."""

_INFLATES_TO = 1 << 28
_INFLATES_BY = 20
"""A compressed archive may hold 256 MiB, or so many times its own size: matrices of 64-bit numbers
are hardly compressible."""

_LONGEST_REASON = 300
"""Characters of a reader's message that are passed on: a file can put anything into it."""

_UNREADABLE = (
    # What the fields of a foreign file do to the code below, to json and to the readers of arrays:
    # wrong names, types, values, and files that end too soon.
    *(KeyError, IndexError, TypeError, ValueError, OverflowError, OSError, EOFError, struct.error),
    # The header of an array is a Python literal, which numpy hands to Python's parser.
    *(SyntaxError, tokenize.TokenError),
    # Deep nesting is a RecursionError, an unknown compression a NotImplementedError, and
    # encryption a RuntimeError, of which the first two are kinds.
    *(RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, safetensors.SafetensorError),
)


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `tensors` and a JSON-able `header` in the format that the suffix names.

    The file appears whole or not at all.

    Raises ProblemError if the suffix is neither ``.npz`` nor ``.safetensors``, the header is too
        long, or the file cannot be written.
    """
    suffix = _known_suffix(path)
    text = json.dumps(header)
    if len(text) > _LONGEST_HEADER:
        raise ProblemError(f"{path}: the header takes {len(text)} characters; shorten the name")
    # Another process may be writing the same file.
    partial = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    on_cpu = {key: value.cpu().contiguous() for key, value in tensors.items()}
    try:
        if suffix == ".npz":
            with partial.open("wb") as file:
                arrays = {key: value.numpy() for key, value in on_cpu.items()}
                arrays[_HEADER] = np.array(text)
                np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub mistakes names
        else:
            with as_new_files(partial):
                safetensors.torch.save_file(on_cpu, partial, metadata={_HEADER: text})
        partial.replace(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # NUL in a name
        raise ProblemError(f"{path} cannot be written: {error}") from error
    finally:
        _remove(partial)


@contextmanager
def as_new_files(path: Path) -> Iterator[None]:
    """Give the file that the block writes the mode of new files, which the umask says.

    The writer of safetensors keeps what it writes to its user, from version 0.8 on.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def _remove(partial: Path) -> None:
    """Remove what is left of a file, if anything is."""
    try:
        partial.unlink(missing_ok=True)
    except (OSError, ValueError):
        # Where nothing can be removed, nothing could be written, which has been said.
        return


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file that `write` wrote.

    Raises ProblemError if the file is missing, has another suffix, or is not in that format.
    """
    suffix = _known_suffix(path)
    try:
        return _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
    except FileNotFoundError as error:
        raise ProblemError(f"there is no problem file {path}") from error
    except _UNREADABLE as error:
        reason = printable(str(error) or type(error).__name__)
        raise ProblemError(f"{path} is not a problem file: {reason}") from error


def printable(text: str) -> str:
    """Return text from a file as a terminal can bear it: on one line, escaped, and not long."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:_LONGEST_REASON])
    return escaped + "..." * (len(text) > _LONGEST_REASON)


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        header = _parsed((file.metadata() or {})[_HEADER])
        # Copied: what the library returns may be a view of the file, which others can write to.
        return header, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def _read_npz(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = os.stat(path).st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        inflated = sum(info.file_size for info in members)
        if inflated > max(_INFLATES_TO, _INFLATES_BY * size):
            raise ValueError(f"a file of {size} bytes claims to hold {inflated}")
        if len({info.filename for info in members}) != len(members):
            raise ValueError("two members have one name")
        arrays = {
            info.filename.removesuffix(".npy"): _read_array(archive, info, size) for info in members
        }
    header = _parsed(str(arrays.pop(_HEADER)))
    return header, {key: torch.from_numpy(array) for key, array in arrays.items()}


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> np.ndarray[Any, Any]:
    """Read one member, having checked that it holds as much as it is about to make us allocate.

    size: Of the whole file, in bytes.
    """
    stored = info.file_size if info.compress_type == zipfile.ZIP_STORED else info.compress_size
    if max(stored, info.compress_size) > size:
        raise ValueError(f"{info.filename} claims {stored} bytes of a file of {size}")
    with archive.open(info) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is an array of an unknown version {version}")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
    if claimed != held:
        raise ValueError(f"{info.filename} claims {claimed} bytes and holds {held}")
    if info.filename == f"{_HEADER}.npy" and claimed > 4 * _LONGEST_HEADER:
        raise ValueError(f"the header takes {claimed} bytes")
    with archive.open(info) as file:
        array: np.ndarray[Any, Any] = npy.read_array(file, allow_pickle=False)
        return array


def _parsed(text: str) -> dict[str, Any]:
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"the header takes {len(text)} characters")
    header: dict[str, Any] = json.loads(text)
    return header


def _known_suffix(path: str | os.PathLike[str]) -> str:
    try:
        suffix = Path(path).suffix
    except TypeError as error:
        raise ProblemError(f"path is {reprlib.repr(path)}; it must name a file") from error
    if suffix not in (".npz", ".safetensors"):
        raise ProblemError(f"{path}: a problem file ends in .npz or .safetensors")
    return suffix
