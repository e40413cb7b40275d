"""A model as ``.pt2``, the archive of `torch.export`, for engines that read it.

Nothing here reads such a file but the one that was just written: an archive may hold pickled parts.
"""

from __future__ import annotations

import io
import os
from functools import partial
from typing import Any

import torch
from torch import nn

from osscar.base.devices import default_torch
from osscar.base.files import atomic_write
from osscar.export.open_program import OpenProgram, Run, Traced, example_for, outputs, read
from osscar.export.target import Exported, traced_target
from osscar.network.hooks import followed_mixtures


@default_torch()
def export_pt2(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dense: nn.Module | None = None,
    example_inputs: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model as an archive of `torch.export`, and compare what was written.

    Sizes of the inputs are left open where the archive computes what the model does at other sizes.

    Parameters
    ----------
    model, out, dense, example_inputs, overwrite
        As `osscar.export_onnx` takes them; the model may be in any number format, and the file ends
        in ``.pt2``.

    Raises
    ------
    CheckpointError
        If the directory holds none that can be read.
    DataError, FileError
        If it is not known what the model takes, or `example_inputs` are none that it does.
    ModelError
        If torch cannot trace the model.
    OutputError
        If the file is there already or cannot be written.
    EquivalenceError
        If what was read back does not compute the same; nothing is written then.
    """
    target = traced_target(model, out, ".pt2", overwrite=overwrite)
    found = read(model, dense)
    opened = OpenProgram(found, example_for(found, example_inputs), followed_mixtures)
    with atomic_write(target) as place:

        def write(traced: Traced) -> Run:
            # By way of memory: torch ends the process where a disk refuses its archive.
            written = io.BytesIO()
            torch.export.save(traced.program, written)
            place.write_bytes(written.getbuffer())
            del written
            with place.open("rb") as archive:
                return partial(outputs, torch.export.load(archive).module())

        traced = opened.written(write, "torch.export")
    return Exported(target, target.stat().st_size, traced.described())
