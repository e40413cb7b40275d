"""What a model reads in training alone, such as auxiliary heads: these weights follow the units."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from graph.errors import TraceError
from graph.export import ExampleInputs, TensorInfo, export_model
from graph.grouping import build_groups, removable
from graph.groups import CouplingGroup, Role, Slot
from graph.propagate import propagate
from graph.rules import RuleTable


def followed_in_training(
    model: torch.nn.Module,
    example_inputs: ExampleInputs,
    rules: RuleTable,
    opaque: Collection[str | type[torch.nn.Module]],
    groups: Sequence[CouplingGroup],
    unread: Collection[str],
) -> tuple[tuple[CouplingGroup, ...], frozenset[str]]:
    """Add to groups the slots of weights that only code for training reads.

    Parameters
    ----------
    model, example_inputs, rules, opaque
        As `graph.trace` takes them.
    groups
        The model's groups in evaluation.
    unread
        Names of the tensors that evaluation does not read.

    Returns
    -------
    tuple of CouplingGroup
        The same groups.  What reads units in training alone is `Role.ASIDE`, since no example
        tells what it reads.  Groups that are frozen in training, or whose units are others there,
        are as they were.
    frozenset of str
        Those of which it remains unknown whether they would have to follow.
    """
    if not unread or not _decides_by_training(model):
        return tuple(groups), frozenset(unread)
    try:
        program = export_model(model, example_inputs, training=True)
    except TraceError:  # code for training may want labels, or draw numbers in Python
        return tuple(groups), frozenset(unread)
    propagation = propagate(program, rules, opaque)
    found = build_groups(propagation, program.tensors)
    by_place = {_place(slot): group for group in found for slot in group.slots if group.prunable}
    joined = tuple(_joined(group, by_place, unread, program.tensors) for group in groups)
    read = {name for operator in propagation.operators for name in operator.tensors}
    places = {_place(slot) for group in groups if group.prunable for slot in group.slots}
    frozen = (group.slots for group in found if group.frozen)
    stuck = {slot.tensor for slots in frozen if places & {*map(_place, slots)} for slot in slots}
    followed = {slot.tensor for group in joined for slot in group.slots}
    return joined, frozenset(unread) - (read - stuck) - followed


def _joined(
    group: CouplingGroup,
    by_place: Mapping[tuple[object, ...], CouplingGroup],
    unread: Collection[str],
    tensors: Mapping[str, TensorInfo],
) -> CouplingGroup:
    """Return a group with what is read in training of all places where its units lie."""
    alike = {by_place[p].name: by_place[p] for p in map(_place, group.slots) if p in by_place}
    more = {_place(slot): slot for other in alike.values() for slot in _of(unread, other)}
    if not more or not group.prunable:
        return group
    last = max(slot.order for slot in group.slots)
    aside = (
        dataclasses.replace(
            slot,
            role=Role.ASIDE if slot.role is Role.CONSUMER else slot.role,
            order=last,  # that of training is of another program
        )
        for slot in more.values()
    )
    slots = (*group.slots, *aside)
    return dataclasses.replace(group, slots=slots, removable=removable(slots, tensors))


def _of(unread: Collection[str], group: CouplingGroup) -> Iterator[Slot]:
    return (slot for slot in group.slots if slot.tensor in unread)


def _place(slot: Slot) -> tuple[object, ...]:
    return slot.tensor, slot.dim, slot.units, slot.outer, slot.inner, slot.offset


def _decides_by_training(model: torch.nn.Module) -> bool:
    """Whether code of the model's own, rather than of torch's layers, looks at the flag."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return any(
        "training" in getattr(getattr(value, "__code__", None), "co_names", ())
        for kind in kinds
        if not kind.__module__.startswith("torch.nn.")
        for value in vars(kind).values()
    )
