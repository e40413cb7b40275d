"""Number formats of what `save` writes.

Converting a model to a number format leaves what transformers leaves when it reads it in it.

transformers builds a model with the number format as torch's default and fills in the weights.  So
what its code computes in float32, such as rotary frequencies, stays in float32, and so do weights
that a family asks to keep.  `torch.nn.Module.to` would round all of it, and positions with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osscar.checkpoint.builders import TransformersOrigin, builder_of
from osscar.checkpoint.hf_config import DESCRIPTION_ERRORS
from osscar.checkpoint.validation import EmptyOnMeta
from osscar.network.modules import identity_of, number_format
from osscar.proof.lineage import stored_dtype
from osscar.proof.program import ProgramModule

M = TypeVar("M", bound=nn.Module)


def cast(model: M, dtype: torch.dtype) -> M:
    """Convert a model, in place, to a number format, as its library has it in that."""
    like = _as_built(model, dtype)
    own = {} if like is None else dict(_formats(like))
    formats = {id(tensor): own.get(name, dtype) for name, tensor in _named(model)}

    def converted(tensor: Tensor) -> Tensor:
        kind = formats.get(id(tensor), dtype)  # gradients have no name
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    computed = {} if like is None else dict(_computed(model, like))
    model._apply(converted)  # type: ignore[no-untyped-call]
    for name, buffer in computed.items():
        path, _, attribute = name.rpartition(".")
        held = model.get_submodule(path)._buffers
        old = held[attribute]
        assert old is not None
        held[attribute] = buffer.to(old.device)
    return model


_SavedFormat: TypeAlias = Callable[[str, Tensor], torch.dtype]
"""Returns the number format that a tensor of a model, or of its program, is written in."""


def saved_format(model: nn.Module, dtype: torch.dtype | None = None) -> _SavedFormat:
    """Return what tells the formats of a model that is saved in one, by default its stored one."""
    target = stored_dtype(model) if dtype is None else dtype
    if target == number_format(model):
        return lambda name, tensor: tensor.dtype
    like = _as_built(model, target)
    kept = {} if like is None else dict(_formats(like))
    return lambda name, t: kept.get(name, target) if t.is_floating_point() else t.dtype


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _formats(model: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    return ((name, t.dtype) for name, t in _named(model) if t.is_floating_point())


def _as_built(model: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """Build a model without memory in a number format; None where nothing tells what it keeps."""
    if not isinstance(model, PreTrainedModel | ProgramModule):
        return None
    builder = builder_of(model)
    if not isinstance(builder, TransformersOrigin):
        return None
    try:
        with EmptyOnMeta(), torch.random.fork_rng(devices=[]):
            like: nn.Module = builder.build(dtype)
    except DESCRIPTION_ERRORS:  # of code of somebody else's; it is converted as a whole
        return None
    return like


def _computed(model: nn.Module, like: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers that no file holds as another model has them, if only rounding differs."""
    stored = model.state_dict(keep_vars=True).keys()
    fresh = dict(like.named_buffers(remove_duplicate=False))
    for name, old in model.named_buffers(remove_duplicate=False):
        new = fresh.get(name)
        if name in stored or new is None or new.is_meta or not old.is_floating_point():
            continue
        if new.dtype != old.dtype and new.shape == old.shape and _alike(old.cpu(), new):
            yield name, new


def _alike(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors are the same in the coarser of their formats."""
    coarser = max(old.dtype, new.dtype, key=lambda kind: torch.finfo(kind).eps)
    return torch.equal(old.to(coarser), new.to(coarser))


def written_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that `save` writes of a model or program, each once.

    Tied ones have the name by which the model of transformers without its head knows them.
    """
    tensors = tensors_of(model)
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    once: dict[object, str] = {}
    for name in sorted(tensors, key=lambda name: (not name.startswith(inner), name)):
        once.setdefault(identity_of(tensors[name]), name)
    return {name: tensors[name] for name in sorted(once.values())}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a model's state by name, tied ones under each of their names."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
