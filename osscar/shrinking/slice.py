"""Physical removal: slice what the units own, and let the modules around it follow.

That the result is right is proved, not assumed: see `osscar.proof.equivalence`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from graph.groups import Role, Slot
from graph.tracing.preserve import forget_derived, preserved
from osscar.base.errors import ModelError, warn
from osscar.network.modules import check_module, identity_of, is_deformable
from osscar.proof.lineage import lineage_of, note, remember_structure
from osscar.proof.plan import Form, GroupPlan, PruningPlan, combined_groups
from osscar.shrinking.fold import fold
from osscar.shrinking.follow import follow_around, is_list, mend, refresh


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
    filters = isinstance(module, nn.modules.conv._ConvNd) or is_deformable(module)
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
