"""Files of tensors, in the format of safetensors: headers, weights one by one, and records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import ConfigDict, StringConstraints, with_config
from safetensors import SafetensorError, safe_open
from torch import Tensor

from osscar.base.errors import EquivalenceError, FileError, JournalError
from osscar.base.files import atomic_write, reason_of
from osscar.base.json_files import parse_json, read_json
from osscar.offload.on_disk import values_of
from osscar.offload.places import Source, StoredTensor, as_bytes

T = TypeVar("T")

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FORMATS = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by the names of safetensors, in the order in which it writes them."""

# ---- reading -----------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a file by name, without their values (FileError)."""
    try:
        with safe_open(path, "pt"):  # which refuses headers that make no sense for the file
            pass
        source = Source(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise FileError(path, f"it cannot be read: {reason_of(error)}") from error
    except SafetensorError as error:
        raise FileError(
            path, f"it is cut off, or no safetensors file ({error}); download it again"
        ) from error
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        dtype, shape = _FORMATS.get(tensor["dtype"]), tuple(tensor["shape"])
        if dtype is None:
            raise FileError(
                path, f"it holds {name!r:.60} as {tensor['dtype']}; dequantize it first"
            )
        begin = 8 + length + tensor["data_offsets"][0]
        found[name] = StoredTensor(source, begin, shape, dtype, name)
    return found


@with_config(ConfigDict(extra="ignore", allow_inf_nan=False))
@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, Annotated[str, StringConstraints(pattern=r"^[^/\\\x00]+\.safetensors$")]]
    """The file beside the index that holds each tensor."""


def read_headers(directory: Path) -> dict[str, StoredTensor] | None:
    """Return the tensors of a checkpoint in safetensors by name, without values (FileError)."""
    if (directory / WEIGHTS_FILE).exists():
        return read_header(directory / WEIGHTS_FILE)
    if not (directory / INDEX_FILE).exists():
        return None
    names = read_json(directory / INDEX_FILE, _Index).weight_map.values()
    # Libraries read all that is in the files, also where the index names only a part of it.
    headers = [read_header(directory / name) for name in sorted(set(names))]
    return {name: stored for header in headers for name, stored in header.items()}


# ---- writing -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A tensor in a file that is a stretch of one of a model."""

    name: str
    shape: tuple[int, ...]


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    parts: Mapping[str, Sequence[Part]] | None = None,
) -> dict[str, bytes]:
    """Write a file with the bytes that safetensors would write, one tensor in memory at a time.

    Tensors that are named in `parts` are written as these.  Return the SHA-256 of the bytes of
    each tensor in the file, by name.
    """
    written = {n: (parts or {}).get(n, (Part(n, tuple(t.shape)),)) for n, t in tensors.items()}
    names = {dtype: name for name, dtype in _FORMATS.items()}
    stored = [(part, tensors[name].dtype) for name, own in written.items() for part in own]
    stored.sort(key=lambda one: ([*names].index(one[1]), one[0].name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for part, dtype in stored:
        begin, end = end, end + math.prod(part.shape) * dtype.itemsize
        spans[part.name] = begin, end
        header[part.name] = {
            "dtype": names[dtype],
            "shape": part.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digests: dict[str, bytes] = {}
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(written, key=lambda name: spans[written[name][0].name]):
            values, done = as_bytes(values_of(tensors[name]).contiguous().cpu()), 0
            for part in written[name]:
                begin, end = spans[part.name]
                own = values[done : done + end - begin]
                out.seek(8 + len(text) + begin)
                out.write(own)
                digests[part.name] = hashlib.sha256(own).digest()
                done += len(own)
    return digests


def check_written(digests: Mapping[str, bytes], file: Path) -> None:
    """Read a file that was written back, tensor by tensor, and compare (EquivalenceError)."""
    for name, stored in read_header(file).items():
        if stored.digest() != digests[name]:
            raise EquivalenceError(f"{name!r} was not read back as it was written")


# ---- records -----------------------------------------------------------------------------

_WORDS = "words"
"""The entry of a record's header."""


def write_record(path: Path, words: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write a dataclass and tensors; once this returns, they are on the disk."""
    with atomic_write(path) as partial:
        write_tensors(partial, tensors, {_WORDS: json.dumps(dataclasses.asdict(words))})


def read_record(path: Path, schema: type[T]) -> tuple[T, dict[str, Tensor]]:
    """Return what `write_record` wrote, tensors in the order of their names (JournalError)."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_WORDS, "")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return parse_json(text, schema, path), tensors
    except (OSError, SafetensorError, FileError) as error:
        reason = error.reason if isinstance(error, FileError) else error
        raise JournalError(f"{path} cannot be read: {reason}; start over with --restart") from error
