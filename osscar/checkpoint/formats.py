"""Number formats and bytes of what `save` writes.

Converting a model to a number format leaves what transformers leaves when it reads it in it.

transformers builds a model with the number format as torch's default and fills in the weights.  So
what its code computes in float32, such as rotary frequencies, stays in float32, and so do weights
that a family asks to keep.  `torch.nn.Module.to` would round all of it, and positions with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from osscar.base.errors import ModelError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.checkpoint.admission import EmptyOnMeta
from osscar.checkpoint.builders import TransformersOrigin, builder_of
from osscar.checkpoint.hf_config import DESCRIPTION_ERRORS
from osscar.checkpoint.streamed import header_of
from osscar.network.modules import number_format
from osscar.proof.lineage import stored_dtype
from osscar.proof.plan import Form
from osscar.proof.program.program import ProgramModule

M = TypeVar("M", bound=nn.Module)


def cast(model: M, dtype: torch.dtype) -> M:
    """Convert a model, in place, to a number format, as its library has it in that.

    What its class computes is what that computes in this format, and not what is left of it in the
    one before. One that is not of transformers is converted as a whole.
    """
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
    """Return what tells the formats of a model that is saved in one, by default its stored one.

    Its class may keep some of its tensors in another; what that does not know is converted.
    """
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
    """Build a model of the same class in a number format, without memory for its weights.

    None is returned where nothing tells what it would keep.
    """
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
    """Yield buffers that no file holds as another model has them, if rounding is all that differs.

    What has changed since they were computed, such as slopes of heads of which some have left,
    stays as it is.
    """
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


# ---- bytes, counted before anything is smaller or written --------------------------------

_SHARD = 50 * 10**9
"""Bytes after which transformers begins another file."""

_MORE_FILES = 64
"""Bytes that each of them takes at most to say what it is."""


def written_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that `save` writes of a model or program, each once."""
    return {names[0]: tensor for names, tensor in _tensors_of(model)}


def header_bytes(model: nn.Module, form: Form, format_of: _SavedFormat) -> int:
    """Return how many bytes a file of a model's weights takes at most besides these.

    It is what the file says of the tensors of this model. A smaller one has as many, and no more
    digits in shapes and offsets: mostly the same, and at most a few bytes a tensor fewer. `model`
    is what is written when it has become smaller: modules, or a program.
    """
    named = _shapes_of(model, format_of)
    metadata = {"format": "pt"}
    tensors = {names[0]: tensor for names, tensor in named}
    candidates = [tensors]
    if form is Form.EXPORTED or isinstance(model, ProgramModule):
        metadata["form"] = str(Form.EXPORTED)
    if form is Form.EAGER and isinstance(model, PreTrainedModel):
        # What can read the file decides which name of a tied weight it has.
        tensors = {max(names, key=len): tensor for names, tensor in named}
        candidates = [tensors, _as_stock(model, tensors)]
    else:
        metadata |= {name: names[0] for names, _ in named for name in names[1:]}
    files = 1 + 2 * sum(t.numel() * t.itemsize for t in tensors.values()) // _SHARD
    longest = max(len(header_of(some, metadata)[1]) for some in candidates)
    return 8 + longest + _MORE_FILES * (files - 1)


def entry_bytes(model: nn.Module, module: str, format_of: _SavedFormat) -> int:
    """Return how many of `header_bytes` leave with a module at least, in whole steps of 8 bytes.

    What other modules have of its tensors stays.
    """
    named = [
        (n, t, {name.startswith(f"{module}.") for name in n})
        for n, t in _shapes_of(model, format_of)
    ]
    tensors = {names[0]: tensor for names, tensor, inside in named if len(inside) == 1}
    candidates = [tensors]
    if isinstance(model, PreTrainedModel):
        candidates.append(_as_stock(model, tensors))
    least = min(
        len(
            header_of({n: t for n, t in some.items() if n.startswith(f"{module}.")}, {})[1].rstrip()
        )
        for some in candidates
    )
    return (least - len(header_of({}, {})[1].rstrip())) // 8 * 8


def _shapes_of(model: nn.Module, format_of: _SavedFormat) -> list[tuple[list[str], Tensor]]:
    """Return each tensor that is written as `_tensors_of` does, without values."""
    return [(n, _shape_of(t, format_of(n[0], t))) for n, t in _tensors_of(model)]


def _tensors_of(model: nn.Module) -> list[tuple[list[str], Tensor]]:
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
