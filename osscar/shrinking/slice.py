"""Physical removal: slice what the units own, and let the modules around it follow.

That the result is right is proved, not assumed: see `osscar.proof.equivalence`.  Layers show the
sizes of their weights (`refresh`).  Attention and feed-forward modules keep counts of heads and
neurons under names that are common to all families (`follow`).  Modules whose code derives a size
from something that does not change get a class of their own (`osscar.network.attention`).  What
none of this covers, a user covers with `adapter`.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graph.groups import Role, Slot, UnitKind
from graph.tracing.preserve import forget_derived, preserved
from osscar.base.errors import ModelError, warn
from osscar.network.attention import is_extended, rewrite
from osscar.network.modules import (
    check_module,
    class_name,
    identity_of,
    known_of_class,
)
from osscar.proof.lineage import lineage_of, note, remember_structure
from osscar.proof.plan import Form, GroupPlan, PruningPlan, combined_groups
from osscar.shrinking.fold import fold


def slice_units(model: nn.Module, plan: PruningPlan) -> None:
    """Remove from `model`, in place and on any device, every unit that the plan does not keep.

    Tied parameters stay tied.  A weight that is normalized at every call becomes a plain one if the
    plan names it.

    Raises
    ------
    ModelError
        If a tensor of the plan does not exist or has another size, or if tied tensors would be
        cut in different ways.  Whatever the error, the model is as it was before.
    """
    check_module(model)
    if plan.form is not Form.EAGER:
        raise ModelError(
            "the plan is for the exported program of a model, not for its modules; use osscar.load"
        )
    with preserved(model, on_error=True):
        remember_structure(model)
        fold(model, plan.tensors)
        refresh(dict.fromkeys(_cut(model, plan)))
        for group in plan.groups:
            mend(model, group)
        _shorten(model, plan)
        plans = (*lineage_of(model).plans, plan)
        for groups in (plan.groups, combined_groups(plans)):  # whose counts may be equal again
            follow_around(model, groups)
        for refusal in forget_derived(model):
            warn(refusal)
        for integer in plan.integers:
            setattr(model.get_submodule(integer.module), integer.attribute, integer.value)
        note(model, plans=plans)


# ---- tensors -----------------------------------------------------------------------------

_Storage: TypeAlias = tuple[Any, ...]

_STAYS, _GOES = 1, -1
"""What becomes of an index; 0 where nothing is decided."""


def _cut(model: nn.Module, plan: PruningPlan) -> Iterator[nn.Module]:
    """Check a plan, put smaller tensors wherever the old ones were, and yield the modules there."""
    tensors: dict[_Storage, Tensor] = {}
    fates: dict[tuple[_Storage, int, bool], Tensor] = {}
    """What becomes of each index of a dimension: of all, and as far as units pass through rows."""
    for group in plan.groups:
        for slot in group.slots:
            if is_list(slot):
                continue
            tensor = _checked_tensor(model, group, slot)
            key = identity_of(tensor)
            tensors[key] = tensor
            passes = slot.role is Role.PASS_THROUGH and slot.dim == 0
            for place in ((key, slot.dim, False), (key, slot.dim, True))[: 1 + passes]:
                undecided = torch.zeros(tensor.shape[slot.dim], dtype=torch.int8)
                _decide(fates.setdefault(place, undecided), group, slot)
    holders: dict[_Storage, list[tuple[nn.Module, dict[str, Any], str]]] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store, (attribute, tensor) in ((s, item) for s in stores for item in s.items()):
            if tensor is not None:
                holders.setdefault(identity_of(tensor), []).append((module, store, attribute))
    for key, tensor in tensors.items():
        new = tensor.detach()
        for dim in range(tensor.dim()):
            if (key, dim, False) in fates:
                stays = (fates[key, dim, False] != _GOES).nonzero().flatten()
                new = new.index_select(dim, stays.to(new.device))
        new = new.contiguous()
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        for module, store, attribute in holders[key]:
            store[attribute] = new
            if attribute == "weight" and (key, 0, True) in fates:
                _leave_groups(module, fates[key, 0, True] != _GOES)
            yield module


def _shorten(model: nn.Module, plan: PruningPlan) -> None:
    """Let lists of modules have the members alone that stay; these get new numbers."""
    for group in plan.groups:
        for slot in filter(is_list, group.slots):
            try:
                members = model.get_submodule(slot.tensor)
            except AttributeError:
                members = None
            if not isinstance(members, nn.ModuleList) or len(members) != group.units:
                raise ModelError(
                    f"group {group.name!r}: no list {slot.tensor!r} of {group.units} modules in "
                    "this model; the plan is for another"
                )
            stay = [members[unit] for unit in group.kept]
            members._modules.clear()
            members._modules.update({str(number): member for number, member in enumerate(stay)})


def _leave_groups(module: nn.Module, passing: Tensor) -> None:
    """Count the groups of a convolution that still have a filter.

    Units also pass through the rows of a weight that is scaled or standardized before it is used;
    these are no groups, unless all rows of one go.
    """
    filters = isinstance(module, nn.modules.conv._ConvNd)
    groups = int(getattr(module, "groups", 1))
    if filters and groups > 1:
        vars(module)["groups"] = int(passing.view(groups, -1).any(1).sum())


def _decide(fate: Tensor, group: GroupPlan, slot: Slot) -> None:
    """Note which indices of a dimension stay and which go, or refuse two opinions."""
    for units, decision in ((group.kept, _STAYS), (group.gone, _GOES)):
        index = torch.tensor(slot.indices(units), dtype=torch.int64)
        if bool((fate[index] == -decision).any()):
            raise ModelError(
                f"group {group.name!r} and another one cut dimension {slot.dim} of "
                f"{slot.tensor!r}, or of a tensor tied to it, in different ways; prune them "
                "alike, or untie them first"
            )
        fate[index] = decision


def _checked_tensor(model: nn.Module, group: GroupPlan, slot: Slot) -> Tensor:
    path, _, attribute = slot.tensor.rpartition(".")
    last = slot.offset + slot.outer * slot.units * slot.inner
    with suppress(AttributeError, IndexError):
        tensor = getattr(model.get_submodule(path), attribute)
        if slot.units == group.units and last <= tensor.shape[slot.dim]:
            assert isinstance(tensor, Tensor)
            return tensor
    raise ModelError(
        f"group {group.name!r}: no {slot.tensor!r} with {last} entries along dimension {slot.dim} "
        "in this model; the plan is for another"
    )


# ---- modules follow -----------------------------------------------------------------------


Adapter: TypeAlias = Callable[[Any, GroupPlan], None]
"""Changes one module so that it works without the units that a plan removes.

It is called with a module near the group's tensors after these were sliced, once for each group
that touches it.
"""

_Function = TypeVar("_Function", bound=Adapter)
_ADAPTERS: dict[str, Adapter] = {}


def adapter(*classes: type[nn.Module] | str) -> Callable[[_Function], _Function]:
    """Register the decorated function as the adapter of some module classes.

    It takes the place of what is done for modules in general.

    Parameters
    ----------
    classes
        Classes, or their full names such as ``"package.module.Attention"``, which spare an import.
        Subclasses are covered too.

    Raises
    ------
    OptionError
        If one of them is neither.

    Examples
    --------
    >>> import osscar
    >>> @osscar.adapter("mylib.blocks.Attention")
    ... def follow(module, group):
    ...     if group.kind == "heads":
    ...         module.h = group.scaled(module.h)
    """
    names = [class_name(kind, "an adapter is for") for kind in classes]

    def register(function: _Function) -> _Function:
        _ADAPTERS.update(dict.fromkeys(names, function))
        return function

    return register


def adapter_of(module: nn.Module) -> Adapter | None:
    """Return the adapter of a module's class, or of the nearest one above it."""
    return known_of_class(module, _ADAPTERS)


def mend(model: nn.Module, group: GroupPlan) -> None:
    """Let every module near a group follow; the tensors are sliced already."""
    _leave_nested_tensors(model, group)
    for name in nearby(model, group):
        module = model.get_submodule(name)
        found = adapter_of(module)
        if found is not None:
            found(module, group)
        else:
            _follow_in_config(module, group)
            follow(module, group)
            if group.kind is UnitKind.HEADS or not is_extended(module):
                # Whatever it has lost: originals take the widths of heads from that of the stream,
                # and some insist on the one that they were built with.
                rewrite(module)


def _leave_nested_tensors(model: nn.Module, group: GroupPlan) -> None:
    """Keep torch's encoders around attention that loses something from packing padded sequences."""
    for name in {slot.module for slot in group.slots}:
        within = group.kind is UnitKind.HEADS
        while name:
            within = within or isinstance(model.get_submodule(name), nn.MultiheadAttention)
            name = name.rpartition(".")[0]
            around = model.get_submodule(name)
            if isinstance(around, nn.TransformerEncoder) and within:
                rewrite(around)


def nearby(model: nn.Module, group: GroupPlan) -> list[str]:
    """Return the modules that hold or use a group's tensors, and those around its layers.

    What lies around an attention or a block is not near: it may hold several of them.  Of experts,
    what holds them and their router is.
    """
    inner: list[str] = []
    for slot in group.slots:
        inner += (slot.module, slot.module if is_list(slot) else slot.tensor.rpartition(".")[0])
    layers = [
        name for name in inner if group.kind.routed or not any(model.get_submodule(name).children())
    ]
    return list(dict.fromkeys((*inner, *(name.rpartition(".")[0] for name in layers))))


def adapted(model: nn.Module, plan: PruningPlan) -> bool:
    """Whether an adapter has changed a module, which may be done by which units stay."""
    near = (model.get_submodule(name) for group in plan.groups for name in nearby(model, group))
    return any(adapter_of(module) is not None for module in near)


def is_list(slot: Slot) -> bool:
    """Whether units are members of a list of modules, and no entries of a tensor."""
    return slot.tensor == slot.module


# ---- counts of heads and neurons ---------------------------------------------------------


def _is_count(value: int, group: GroupPlan) -> bool:
    return value == group.units


def _is_sharing(value: int, group: GroupPlan) -> bool:
    """Whether so many query heads share a key head; where units are key heads, each keeps them.

    One layer may make the queries, the key and the value of a unit, or each a layer of its own.
    """
    widths: dict[tuple[str, Role], int] = {}
    for slot in group.slots:
        widths[slot.tensor, slot.role] = widths.get((slot.tensor, slot.role), 0) + slot.width
    read = max(width for (_, role), width in widths.items() if role is Role.CONSUMER)
    made = {width for (_, role), width in widths.items() if role is Role.PRODUCER}
    separate = any(value * width == read for width in made)
    fused = any(value * (width - read) == 2 * read for width in made)
    return _is_count(value, group) and not separate and not fused


_COUNTS: dict[UnitKind, dict[str, Callable[[int, GroupPlan], bool]]] = {
    UnitKind.HEADS: {
        r"(num_|n_)?(attention_|attn_|query_|q_)?heads?|nhead|num_(local_)?heads|"
        r"(num_|n_)?(key_value|kv)(_heads?)?|num_(local_)?key_value_heads": (
            lambda value, group: value % group.units == 0
        ),
        r"num_key_value_groups|num_queries_per_kv|n_rep|kv_groups": _is_sharing,
        r"all_head_size|inner_dim|split_size|attn_dim|qkv_dim": (
            lambda value, group: value in {slot.units * slot.width for slot in group.slots}
        ),
    },
    UnitKind.NEURONS: {
        r"(moe_)?intermediate_(size|dim)|ffn_(dim|hidden_size)|d_ff|inner_dim|"
        r"mlp_dim|expert_dim|dim_feedforward|hidden_features": _is_count
    },
    UnitKind.EXPERTS: {r"(moe_)?(num|n)_(local_|routed_)?experts": _is_count},
}
"""The names by which model families know counts of units, and of features of all heads together.
A name alone decides nothing: the value has to be what the group says that it was."""


def counts(values: Mapping[str, Any], group: GroupPlan) -> dict[str, int]:
    """Return what becomes of those values that count the units of a group."""
    rules = _COUNTS.get(group.kind, {})
    return {
        name: group.scaled(value)
        for name, value in values.items()
        if type(value) is int
        and any(re.fullmatch(names, name) and fits(value, group) for names, fits in rules.items())
    }


def follow(module: object, group: GroupPlan) -> None:
    """Update the integers of a module that count the units of a group."""
    for name, value in counts(vars(module), group).items():
        setattr(module, name, value)


def follow_around(model: nn.Module, groups: Iterable[GroupPlan]) -> None:
    """Update what modules around mixtures count experts by, such as the loss of their balance.

    It counts those of every mixture, so that all have to keep the same number.
    """
    experts = [group for group in groups if group.kind.routed]
    sizes = {(group.units, len(group.kept)) for group in experts}
    if len(sizes) != 1:
        return
    inside = [name for group in experts for name in nearby(model, group)]
    counting = {n: m for n, m in model.named_modules() if counts(vars(m), experts[0])}
    if all(any(not name or one.startswith(f"{name}.") for one in inside) for name in counting):
        for module in counting.values():
            follow(module, experts[0])


def _follow_in_config(module: nn.Module, group: GroupPlan) -> None:
    """Give a module that reads counts from the model's config, in its code, one of its own."""
    config = getattr(module, "config", None)
    read = _read_of_config(type(module))  # type: ignore[arg-type]  # classes can be hashed
    follows = counts({name: getattr(config, name, None) for name in read}, group)
    if not follows:
        return
    with suppress(AttributeError, TypeError):  # what refuses to be changed is found out by trial
        own = copy.copy(config)
        if own is not config:  # as a class is, which is everyone's
            for name, value in follows.items():
                setattr(own, name, value)
            setattr(module, "config", own)  # noqa: B010, as it is no tensor or module


@functools.cache
def _read_of_config(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return what the forward pass of a class reads of its `config`."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    read = list(dis.get_instructions(code)) if code is not None else []
    return tuple(
        after.argval
        for before, after in itertools.pairwise(read)
        if before.opname == after.opname == "LOAD_ATTR" and before.argval == "config"
    )


# ---- layers ------------------------------------------------------------------------------


def refresh(modules: Iterable[nn.Module]) -> None:
    """Set the sizes that layers show to those of their tensors."""
    for module in modules:
        for kind, sizes in _LAYERS.items():
            if isinstance(module, kind):
                vars(module).update(sizes(module))


def _weight(layer: Any) -> Tensor:
    """Return a layer's weight, or what a hook of `torch.nn.utils` computes it from.

    Until the next forward pass, `weight` itself is what was computed before.
    """
    stored = (layer._parameters.get(f"weight{suffix}") for suffix in ("_v", "_orig"))
    found: Tensor = next((tensor for tensor in stored if tensor is not None), layer.weight)
    return found


def _dimensions(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Return what reads the first dimensions of a layer's weight, by these names."""
    return lambda layer: dict(zip(names, _weight(layer).shape, strict=False))


def _convolution(layer: Any) -> dict[str, Any]:
    """Return channels; groups follow in `slice`, which knows which of them were cut."""
    first, second = _weight(layer).shape[:2]
    if getattr(layer, "transposed", False):
        return {"in_channels": first, "out_channels": second * layer.groups}
    return {"in_channels": second * layer.groups, "out_channels": first}


def _channels(layer: Any) -> int:
    tensor = layer.weight if layer.weight is not None else layer.running_mean
    return layer.num_features if tensor is None else int(tensor.shape[0])


def _group_norm(layer: Any) -> dict[str, Any]:
    if layer.weight is None:
        return {}
    members = layer.num_channels // layer.num_groups  # only whole groups can leave
    channels = layer.weight.shape[0]
    return {"num_channels": channels, "num_groups": channels // members}


def _shape_of_weight(layer: Any) -> dict[str, Any]:
    return {} if layer.weight is None else {"normalized_shape": tuple(layer.weight.shape)}


_LAYERS: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.Linear: _dimensions("out_features", "in_features"),
    Conv1D: _dimensions("nx", "nf"),
    nn.Embedding: _dimensions("num_embeddings", "embedding_dim"),
    nn.PReLU: _dimensions("num_parameters"),
    nn.modules.conv._ConvNd: _convolution,
    nn.modules.batchnorm._NormBase: lambda m: {"num_features": _channels(m)},
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _shape_of_weight,
    nn.RMSNorm: _shape_of_weight,
    nn.RNNBase: lambda m: {"input_size": m.weight_ih_l0.shape[1]},
    nn.RNNCellBase: lambda m: {"input_size": m.weight_ih.shape[1]},
}
"""For each class of layers, its sizes from its tensors."""
