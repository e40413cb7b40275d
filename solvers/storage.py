"""Named tensors with a JSON header, as ``.safetensors``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from solvers.errors import ProblemError

_HEADER = "header"
_LONGEST_HEADER = 1 << 20
"""Characters; a thousand consumers take a tenth of that."""

_LONGEST_REASON = 300
"""Characters of a reader's message that are passed on: a file can put anything into it."""

_UNREADABLE = (
    # What a foreign file does to json and to the reader: wrong types, too deep nesting.
    *(TypeError, ValueError, OverflowError, OSError, RuntimeError, MemoryError),
    safetensors.SafetensorError,
)


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `tensors` and a JSON-able `header` to a ``.safetensors`` file.

    The file appears whole or not at all.

    Raises ProblemError if it has another suffix, the header is too long, or the file cannot be
        written.
    """
    _check_suffix(path)
    text = json.dumps(header)
    if len(text) > _LONGEST_HEADER:
        raise ProblemError(f"{path}: the header takes {len(text)} characters; shorten the name")
    # Another process may be writing the same file.
    partial = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    on_cpu = {key: value.cpu().contiguous() for key, value in tensors.items()}
    try:
        with as_new_files(partial):
            safetensors.torch.save_file(on_cpu, partial, metadata={_HEADER: text})
        partial.replace(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # NUL in a name
        raise ProblemError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError, ValueError):  # where nothing can be removed, nothing was written
            partial.unlink(missing_ok=True)


@contextmanager
def as_new_files(path: Path) -> Iterator[None]:
    """Give the file that the block writes the mode of new files, which the umask says.

    The writer of safetensors keeps what it writes to its user, from version 0.8 on.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file that `write` wrote.

    Raises ProblemError if the file is missing, has another suffix, or is not in that format.
    """
    _check_suffix(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _parsed((file.metadata() or {}).get(_HEADER))
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ProblemError(f"there is no problem file {path}") from error
    except _UNREADABLE as error:
        reason = printable(str(error) or type(error).__name__)
        raise ProblemError(f"{path} is not a problem file: {reason}") from error


def printable(text: str) -> str:
    """Return text from a file as a terminal can bear it: on one line, escaped, and not long."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:_LONGEST_REASON])
    return escaped + "..." * (len(text) > _LONGEST_REASON)


def _parsed(text: str | None) -> dict[str, Any]:
    if text is None:
        raise ValueError("it holds tensors alone, such as weights of a model")
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"the header takes {len(text)} characters")
    header: dict[str, Any] = json.loads(text)
    return header


def _check_suffix(path: str | os.PathLike[str]) -> None:
    if Path(path).suffix != ".safetensors":
        raise ProblemError(f"{path}: a problem file ends in .safetensors")
