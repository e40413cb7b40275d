"""Reading what `save` wrote: a stock checkpoint, or a dense model with plans that make it smaller.

Nothing is unpickled, and no code in a directory is run.
"""

from __future__ import annotations

import os
from collections.abc import Sized
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from osscar.base.devices import FLOATS, default_torch
from osscar.base.errors import AdapterError, CheckpointError, OptionError
from osscar.base.inputs import safe_repr
from osscar.checkpoint.builders import Builder, TransformersOrigin, cast, read_builder, tensors_of
from osscar.checkpoint.files import read_manifest
from osscar.checkpoint.validation import (
    check_room,
    check_tensors,
    note_manifest,
    readable,
    structure,
)
from osscar.network.modules import check_finite_weights, check_usable, copied, identity_of
from osscar.network.tensor_files import WEIGHTS_FILE, read_headers
from osscar.proof.lineage import remember_structure
from osscar.shrinking.fold import fold
from osscar.shrinking.shrink_program import replayed

M = TypeVar("M", bound=nn.Module)


@overload
def load(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None, dense: None = None
) -> PreTrainedModel | Any: ...
@overload
def load(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None, dense: M
) -> M | Any: ...
@default_torch()
def load(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    dense: nn.Module | None = None,
) -> nn.Module:
    """Read a model that `save` wrote, stock or not, on the CPU and in evaluation mode.

    It is of the class that was saved (one of transformers is a subclass of that, where
    ``config.json`` lists its shapes), or a `ProgramModule`: type checkers are told of the usual
    class, and that there are others.

    Shapes and numbers are checked, and no file is signed: a plan that was edited to keep other
    units, as many as before, is not noticed.  All weights come from the file of weights, so that it
    changes what the lineage says, and what a model computes unit by unit from no weight, such as
    the slopes of ALiBi.

    Parameters
    ----------
    directory
        Where from.
    dtype
        By default that of the file.
    dense
        For a model of your own: the dense model with any weights.  A copy of it is shrunk and
        filled, since a checkpoint holds no code.

    Raises
    ------
    CheckpointError, FileError, NonFiniteError
        If the directory does not hold such a model, a file in it is damaged, or its weights are not
        finite or not what it says.

    Warns
    -----
    UserWarning
        If there is no ``osscar.json``, as after ``save_pretrained`` of transformers, so that what
        the model has seen is not known.
    """
    name = os.fspath(directory)
    check_dtype(dtype)
    if dense is not None:
        check_usable(dense)
    with readable(name):
        path = Path(name).expanduser()
        manifest = read_manifest(path)
        builder, plans = read_builder(path, manifest)
        if isinstance(builder, TransformersOrigin) and not plans:
            model = builder.read_stock(path, dtype)
        else:
            stored = read_headers(path) or {}
            model = _dense(path, builder, dtype, dense, stored)
            fold(model, stored)  # what the pruned model has as a plain weight
            try:
                for plan in plans:
                    model = replayed(model, plan)
            except AdapterError as error:
                raise CheckpointError(
                    f"the model in {path} cannot be rebuilt from {type(model).__name__}: {error}; "
                    "give the dense model that it was pruned from (dense=), with the same code "
                    "and torch version"
                ) from error
            check_tensors(model, stored, path)
            _fill(model, path)
    check_finite_weights(model)
    note_manifest(model.eval(), manifest, str(path))
    return model


def _dense(
    path: Path,
    builder: Builder | None,
    dtype: torch.dtype | None,
    given: nn.Module | None,
    stored: Sized,
) -> nn.Module:
    """Return a dense model; plans need its number format, as traces of programs hold that."""
    if given is not None:
        model = copied(given) if dtype is None else cast(copied(given), dtype)
        remember_structure(model)
        return model
    if builder is not None:
        check_room(structure(partial(builder.build, dtype), stored), path)
        return builder.build(dtype)
    raise CheckpointError(
        f"{path} holds a model of your own code, and no code: give what builds the dense "
        "one (dense, `--dense module:function`)"
    )


def _fill(model: nn.Module, path: Path) -> None:
    """Give a model the weights in a directory; each tensor is stored under one of its names."""
    state = safetensors.torch.load_file(path / WEIGHTS_FILE)
    own = tensors_of(model)
    filled = {identity_of(tensor) for name, tensor in own.items() if name in state}
    missing, unexpected = model.load_state_dict(state, strict=False)
    lacking = [name for name in missing if identity_of(own[name]) not in filled]
    for what, names in (("lacks", lacking), ("has", unexpected)):
        if names:
            raise CheckpointError(
                f"the weights in {path} do not fit its plan: the file {what} {names[0]!r}; "
                "download the checkpoint again"
            )


def check_dtype(dtype: object) -> None:
    """Refuse what is no number format of weights."""
    known = isinstance(dtype, torch.dtype) and dtype in FLOATS.values()
    if dtype is not None and not known:
        raise OptionError(f"dtype is {safe_repr(dtype)}; give one of {', '.join(FLOATS)} of torch")
