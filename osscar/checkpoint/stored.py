"""What a checkpoint's weights are, told by the headers of its files: nothing of them is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias, cast

from pydantic import ConfigDict, Field

from osscar.base.errors import FileError
from osscar.base.files import reason_of
from osscar.base.inputs import check_regular
from osscar.base.json_files import MEGABYTE, STRICT, parse_json, read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_LONGEST_HEADER = 100 * MEGABYTE
"""As in safetensors itself."""

_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
    **{"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8},
    **{"BOOL": 8, "C64": 64},
}
"""Number formats, by the names of safetensors."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of weights.

    It begins at the byte `offset` of `file`.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = field(default=None, compare=False)
    offset: int = field(default=0, compare=False)

    @property
    def kind(self) -> str:
        """What sort of number it holds: ``real``, ``whole`` or ``complex``."""
        return {"F": "real", "B": "real", "C": "complex"}.get(
            "I" if self.dtype == "BOOL" else self.dtype[0], "whole"
        )

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes, whole ones."""
        return -(-self.elements * _BITS[self.dtype] // 8)


_Size = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class _Entry:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


_Header: TypeAlias = dict[str, _Entry | dict[str, str]]


@dataclass(frozen=True)
class _Index:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", allow_inf_nan=False)

    weight_map: dict[str, str]


def read_stored(directory: Path) -> dict[str, Stored]:
    """Return the tensors in a checkpoint's directory by name, without their values."""
    if (directory / WEIGHTS_FILE).exists():
        return read_header(directory / WEIGHTS_FILE)
    index = directory / INDEX_FILE
    if not index.exists():
        raise FileError(directory, f"it holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    places = read_json(index, _Index, limit=_LONGEST_HEADER).weight_map
    for file in places.values():
        if "/" in file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise FileError(index, f"it names {file!r:.60}, which is no file of weights beside it")
    headers = {file: read_header(directory / file) for file in sorted(set(places.values()))}
    missing = next((name for name, file in places.items() if name not in headers[file]), None)
    if missing is not None:
        raise FileError(index, f"it says that {places[missing]} holds {missing!r:.60}: it does not")
    # Libraries read whatever is in the files, so that also counts of which the index is silent.
    return {name: stored for header in headers.values() for name, stored in header.items()}


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors in a safetensors file by name, without their values."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8
            if not 0 < length <= min(size, _LONGEST_HEADER):
                raise FileError(
                    path,
                    f"it is cut off, or no safetensors file: a header of {length:,} bytes is "
                    f"due, and {max(size, 0):,} follow",
                )
            text = file.read(length).decode("utf-8")
    except OSError as error:
        raise FileError(path, f"it cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise FileError(path, f"its header is not UTF-8 (byte {error.start})") from error
    header = cast(_Header, parse_json(text, cast(Any, _Header), path))
    header.pop("__metadata__", None)
    entries = {name: entry for name, entry in header.items() if isinstance(entry, _Entry)}
    if len(entries) < len(header):
        name = next(name for name in header if name not in entries)
        raise FileError(path, f"{name!r:.60} is described as no tensor is")
    _check_layout(entries, size - length, path)
    return {
        name: Stored(entry.dtype, entry.shape, path, 8 + length + entry.data_offsets[0])
        for name, entry in entries.items()
    }


def _check_layout(entries: Mapping[str, _Entry], size: int, path: Path) -> None:
    """Refuse tensors that overlap, leave bytes out, or have not the bytes of their shape."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].data_offsets):
        begin, after = entry.data_offsets
        if entry.dtype not in _BITS:
            raise FileError(path, f"{name!r:.60} has the number format {entry.dtype!r:.20}")
        bits = math.prod(entry.shape) * _BITS[entry.dtype]
        if begin != end or 8 * (after - begin) != bits:
            raise FileError(
                path,
                f"{name!r:.60} lies in the bytes {begin} to {after}, where {bits / 8:.0f} from "
                f"{end} on are due",
            )
        end = after
    if end != size:
        raise FileError(path, f"its tensors have {end:,} bytes, and the file {size:,}")
