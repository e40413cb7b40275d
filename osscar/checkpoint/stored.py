"""What a checkpoint's weights are, told by the headers of its files: nothing of them is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open

from osscar.base.errors import FileError
from osscar.base.files import reason_of
from osscar.base.inputs import check_regular
from osscar.base.json_files import MEGABYTE, read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_LONGEST_INDEX = 100 * MEGABYTE


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of weights: it takes `nbytes` from the byte `offset` on.

    Number formats have the names of safetensors.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = field(default=None, compare=False)
    offset: int = field(default=0, compare=False)
    nbytes: int = field(default=0, compare=False)

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
    places = read_json(index, _Index, limit=_LONGEST_INDEX).weight_map
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
        with safe_open(path, "pt"):  # which refuses headers that make no sense for the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise FileError(path, f"it cannot be read: {reason_of(error)}") from error
    except SafetensorError as error:
        raise FileError(path, f"it is cut off, or no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        shape = tuple(tensor["shape"])
        found[name] = Stored(tensor["dtype"], shape, path, 8 + length + begin, end - begin)
    return found
