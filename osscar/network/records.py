"""Records: a dataclass and tensors in one file that tells whether it is whole, and of which run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from osscar.base.errors import FileError, JournalError
from osscar.base.files import atomic_write, digest
from osscar.base.json_files import parse_json
from osscar.network.modules import sha256_of
from osscar.offload.on_disk import values_of
from solvers.storage import as_new_files

T = TypeVar("T")

_WORDS, _DIGEST = "words", "sha256"
"""The entries of a file's header."""


def write_record(path: Path, words: Any, tensors: Mapping[str, Tensor], run: str) -> None:
    """Write a dataclass and tensors; once this returns, they are on the disk.

    `run` says what they are a part of: who reads them has to say the same.
    """
    there = {name: values_of(one).contiguous().cpu() for name, one in sorted(tensors.items())}
    text = json.dumps(dataclasses.asdict(words))
    header = {_WORDS: text, _DIGEST: _digest(path, run, text, there)}
    with atomic_write(path) as partial, as_new_files(partial):
        safetensors.torch.save_file(there, partial, header)


def read_record(path: Path, schema: type[T], run: str) -> tuple[T, dict[str, Tensor]]:
    """Return what `write_record` wrote, tensors in the order of their names.

    Raises JournalError if it cannot be read, is a part of something else, or was changed.
    """
    try:
        return _read(path, schema, run)
    except FileError as error:
        raise JournalError(
            f"{path} cannot be read: {error.reason}; begin anew with --restart"
        ) from error


def _read(path: Path, schema: type[T], run: str) -> tuple[T, dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(path, str(error)) from error
    text = header.get(_WORDS, "")
    if header.get(_DIGEST) != _digest(path, run, text, tensors):
        raise FileError(path, "it is a part of something else, or was changed since it was written")
    return parse_json(text, schema, path), tensors


def _digest(path: Path, run: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    return digest(json.dumps([path.name, run, text]) + sha256_of(tensors.items()))
