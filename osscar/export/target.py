"""What an export writes: where it goes, what may be replaced there, and what is told of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from osscar.base.errors import OutputError
from osscar.base.files import file_target
from osscar.checkpoint.manifest import checkpoint_directory


@dataclass(frozen=True)
class Exported:
    """What was written.

    Parameters
    ----------
    path
        The file.
    bytes
        Its size, with that of the weights beside it.
    inputs, outputs
        Of ONNX and pt2: what it takes, and of ONNX what it returns, by name: number format and
        shape, such as ``float32 (batch, 3, 32, 32)``, where a word is a size that may vary.
    weights
        The file beside an ONNX file that holds its weights, where these are too large for one.
    architecture
        Of GGUF: ``llama`` or ``qwen3``, and ``deci`` or ``openelm`` where layers differ; of other
        mixtures of experts ``qwen2moe``, ``qwen3moe`` or ``olmoe``.
    dtype
        Of GGUF: number format of the matrices.
    padding
        Of GGUF: neurons of zeros, which make up whole blocks of 32 in each layer: llama.cpp could
        not quantize it otherwise.
    """

    path: Path
    bytes: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    weights: Path | None = None
    architecture: str | None = None
    dtype: str | None = None
    padding: int = 0


def traced_target(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    suffix: str,
    *,
    overwrite: bool,
) -> Path:
    """Return the file to write, by default that beside a checkpoint's directory called like it."""
    if out is None:
        if isinstance(model, nn.Module):
            raise OutputError("a model in memory needs the name of the file to write; give out=")
        source = checkpoint_directory(model)
        out = source.with_name(f"{source.name}{suffix}")
    return checked_target(out, suffix, overwrite=overwrite)


def checked_target(out: str | os.PathLike[str], suffix: str, *, overwrite: bool) -> Path:
    """Return the file to write, before any work; only files of the format are replaced."""
    target = file_target(out)
    if os.path.exists(target) and not (overwrite and target.suffix == suffix):
        raise OutputError(
            f"{target} is there already; give another, or replace it, which is for {suffix} files "
            "alone (`--overwrite`, or overwrite=True in Python)"
        )
    return target
