"""Named tensors with a JSON header, as ``.safetensors``."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from solvers.errors import ProblemError

_HEADER = "header"


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write tensors and a JSON-able header to a ``.safetensors`` file, whole or not at all.

    Raises ProblemError if it cannot be written.
    """
    # Another process may be writing the same file.
    partial = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
    on_cpu = {key: value.cpu().contiguous() for key, value in tensors.items()}
    try:
        partial.touch()
        mode = partial.stat().st_mode  # of new files; safetensors keeps what it writes to its user
        safetensors.torch.save_file(on_cpu, partial, metadata={_HEADER: json.dumps(header)})
        partial.chmod(mode)
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ProblemError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # where nothing can be removed, nothing was written
            partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file that `write` wrote.

    Raises ProblemError if the file is missing, or is not in that format.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict[str, Any](json.loads((file.metadata() or {})[_HEADER]))
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ProblemError(f"{path} is not a problem file: {error}") from error
