"""Models of any sort for ONNX Runtime, and as ``.pt2``, the archive of `torch.export`.

No archive is read here but the one that was just written, since it may hold pickled parts.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from osscar.base.devices import default_torch
from osscar.base.errors import ModelError, OutputError, check_onnx
from osscar.base.files import atomic_write
from osscar.base.memory import attempt
from osscar.data.reader import Batch
from osscar.export.open_program import (
    Exported,
    OpenProgram,
    Run,
    Traced,
    example_for,
    outputs,
    read,
    traced_target,
)
from osscar.network.hooks import computable_mixtures, followed_mixtures
from osscar.network.modules import number_format
from osscar.network.onnx_runtime import refused, session_of, to_onnx


@default_torch()
def export_onnx(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dense: nn.Module | None = None,
    example_inputs: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model as ONNX, which is kept only if ONNX Runtime computes the same.

    The number of samples is left open, and the length of text, where the file computes what the
    model does at other sizes.  A language model is written without a cache of keys and values: it
    reads the whole text at each step.

    Parameters
    ----------
    model
        A model in float32, or a directory that holds one, which is read so.
    out
        The file; by default beside the directory, such as ``smaller.onnx`` for ``smaller``.
    dense
        The dense model of a directory whose model is of your own code, as `osscar.load` takes it.
    example_inputs
        What the model is traced with and compared on: a tensor, a tuple in the order of its
        arguments, a mapping by their names, or a file as `osscar.load_tensors` takes it; two
        samples or more.  By default of the form that it was pruned with, and tokens for a language
        model.
    overwrite
        Replace a file that ends in ``.onnx``; nothing else is ever replaced.

    Raises
    ------
    CheckpointError, DataError, FileError
        If the directory holds no model that can be read, it is not known what the model takes, or
        `example_inputs` are none that it does.
    ModelError
        If torch cannot trace the model, ONNX has no operator for something in it, ONNX Runtime does
        not run it, it is in another number format, or it returns something other than tensors.
    OutputError, EquivalenceError
        If the file is there already or cannot be written, or ONNX Runtime computes something else.
    """
    check_onnx("writing ONNX")
    target = traced_target(model, out, ".onnx", overwrite=overwrite)
    found = read(model, dense, torch.float32)
    if number_format(found) != torch.float32:
        raise ModelError(
            f"the model's weights are {number_format(found)}, in which ONNX Runtime lacks most "
            "operators; give model.float(), or the directory of its checkpoint"
        )
    opened = OpenProgram(found, example_for(found, example_inputs), computable_mixtures)
    weights = target.with_name(f"{target.name}.data")
    before = weights.exists()
    # What is replaced names its own.
    if before and not (target.exists() and weights.name.encode() in target.read_bytes()):
        raise OutputError(
            f"{weights} exists, and weights may have to be written there; give another file "
            "(`--out`)"
        )
    with atomic_write(target) as partial:
        session: Any = None

        def write(traced: Traced) -> Run:
            nonlocal session
            session = None  # the one before holds all weights
            _write(traced, opened.output_names, partial)
            session = session_of(partial)
            return lambda inputs: _outputs(session, inputs)

        opened.written(write, "ONNX Runtime")
        files = [file.name for file in partial.parent.iterdir()]
    kept = [target.with_name(name) for name in files]
    if before and weights not in kept:
        weights.unlink(missing_ok=True)  # of the file that was replaced
    return Exported(
        target,
        sum(file.stat().st_size for file in kept),
        _described(session.get_inputs()),
        _described(session.get_outputs()),
        weights if weights in kept else None,
    )


def _write(traced: Traced, outputs: Sequence[str], path: Path) -> None:
    for old in path.parent.iterdir():
        old.unlink()  # of a try with more sizes open
    written = to_onnx(
        traced.program,
        input_names=list(traced.example),
        output_names=list(outputs),
        dynamic_shapes=traced.axis_names(),
    )
    for tensor in (*written.model.graph.inputs, *written.model.graph.outputs):
        shape: Any = tensor.shape
        for dim, size in enumerate(shape or ()):
            if str(size).isdigit():  # torch writes some numbers as words, of sizes that may vary
                shape[dim] = int(str(size))
    written.save(path)


def _outputs(session: Any, inputs: Batch) -> list[Tensor]:
    given = {one.name: inputs[one.name].cpu().numpy() for one in session.get_inputs()}
    with attempt() as tried:
        return [torch.from_numpy(np.asarray(array)) for array in session.run(None, given)]
    raise refused(tried.error) from tried.error


def _described(tensors: Sequence[Any]) -> dict[str, str]:
    """Describe what a session takes or returns."""
    kinds = {"float": "float32", "double": "float64"}
    found = {}
    for one in tensors:
        kind = one.type.removeprefix("tensor(").removesuffix(")")
        found[one.name] = f"{kinds.get(kind, kind)} ({', '.join(map(str, one.shape))})"
    return found


# ---- archives of torch.export ------------------------------------------------------------


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
    CheckpointError, DataError, FileError, ModelError, OutputError, EquivalenceError
        As of `osscar.export_onnx`.
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
