"""What `save` writes of a model, counted before anything of it is smaller or written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from osscar.base.errors import ModelError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.checkpoint.formats import Saving
from osscar.checkpoint.streamed import header_of
from osscar.shrinking.plan import Form
from osscar.shrinking.program.program import ProgramModule

_SHARD = 50 * 10**9
"""Bytes after which transformers begins another file."""

_MORE_FILES = 64
"""Bytes that each of them takes at most to say what it is."""


def written_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that `save` writes of a model or program, each once."""
    return {names[0]: tensor for names, tensor in _named(model)}


def header_bytes(model: nn.Module, form: Form, saving: Saving) -> int:
    """Return how many bytes a file of a model's weights takes at most besides these.

    It is what the file says of the tensors of this model.  A smaller one has as many, and no more
    digits in shapes and offsets: mostly the same, and at most a few bytes a tensor fewer.

    Parameters
    ----------
    model
        What is written when it has become smaller: modules, or a program.
    form
        Which of them.
    saving
        Which number formats it is written in.

    Raises
    ------
    ModelError
        If transformers cannot tell what it would write of the model.
    """
    named = [(n, _shape_of(t, saving.format_of(n[0], t))) for n, t in _named(model)]
    metadata = {"format": "pt"}
    tensors = {names[0]: tensor for names, tensor in named}
    candidates = [tensors]
    if form is Form.GRAPH or isinstance(model, ProgramModule):
        metadata["form"] = str(Form.GRAPH)
    if form is Form.MODULE and isinstance(model, PreTrainedModel):
        # What can read the file decides which name of a tied weight it has.
        tensors = {max(names, key=len): tensor for names, tensor in named}
        candidates = [tensors, _as_stock(model, tensors)]
    else:
        metadata |= {name: names[0] for names, _ in named for name in names[1:]}
    files = 1 + 2 * sum(t.numel() * t.itemsize for t in tensors.values()) // _SHARD
    longest = max(len(header_of(some, metadata)[1]) for some in candidates)
    return 8 + longest + _MORE_FILES * (files - 1)


def _named(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Return each tensor that a model's state has, with all its names."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name in sorted(state):
        if isinstance(state[name], Tensor):
            names.setdefault(id(state[name]), []).append(name)
    return [(some, state[some[0]]) for some in names.values()]


def _as_stock(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what transformers writes of tensors, such as those of experts one by one."""
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))
    except Exception as error:  # what it makes of a model is its own affair
        let_shortage_pass(error)
        # Counted in another way, a budget would be exceeded, and nobody told.
        raise ModelError(
            f"how many bytes {type(model).__name__} takes on disk is not known, as transformers "
            f"cannot tell what it would write of it: {first_line(error)}; give a budget of "
            "parameters (--params, --sparsity) instead of --size"
        ) from error


def _shape_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the same shape without values."""
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
