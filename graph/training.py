"""What a model reads in training alone, such as auxiliary heads: these weights follow the units."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType

import numpy as np
import torch

from graph.errors import RuleError, TraceError
from graph.grouping import build_groups, removable
from graph.groups import CouplingGroup, Role
from graph.propagate import propagate
from graph.rules import RuleTable
from graph.tracing.export import ExampleInputs, TensorInfo, export_model


def followed_in_training(
    model: torch.nn.Module,
    example_inputs: ExampleInputs,
    rules: RuleTable,
    opaque: Collection[str | type[torch.nn.Module]],
    groups: Sequence[CouplingGroup],
    unread: Mapping[str, TensorInfo],
) -> tuple[tuple[CouplingGroup, ...], frozenset[str], frozenset[str]]:
    """Add to groups the slots of weights that only code for training reads.

    model, example_inputs, rules, opaque: As `graph.trace` takes them.
    groups: The model's groups in evaluation.
    unread: The tensors that evaluation does not read, by name.

    Returns the same groups; the parameters of which it remains unknown whether they would have to
    follow; and of these what code for training reads beside units, in a way that cannot follow.
    What reads units in training alone is `Role.ASIDE`, since no example tells what it reads.
    Groups that are frozen in training, or whose units are others there or go together with those
    of another group, are as they were.
    """
    # Counters and tables are buffers that most models do not read, and no reason to trace again.
    parameters = frozenset(name for name, tensor in unread.items() if tensor.is_parameter)
    if not parameters or not decides_by_training(model):
        return tuple(groups), parameters, frozenset()
    try:
        with same_draws():
            program = export_model(model, example_inputs, training=True)
        propagation = propagate(program, rules, opaque)
    except (TraceError, RuleError):  # code for training may want labels, or decide by what it draws
        return tuple(groups), parameters, frozenset()
    found = build_groups(propagation, program.tensors)
    owner = {slot.location: group.name for group in groups for slot in group.slots}
    following: dict[str, list[CouplingGroup]] = {}
    for group in found:
        owners = {owner[s.location] for s in group.slots if s.location in owner}
        if group.prunable and len(owners) == 1:
            following.setdefault(owners.pop(), []).append(group)
    joined = tuple(
        _joined(group, following.get(group.name, ()), unread, program.tensors) for group in groups
    )
    read = {name for operator in propagation.operators for name in operator.tensors}
    followed = {slot.tensor for group in joined for slot in group.slots}
    stuck = (parameters & read & _beside(groups, found)) - followed
    return joined, (parameters - read - followed) | stuck, stuck


def _joined(
    group: CouplingGroup,
    following: Sequence[CouplingGroup],
    unread: Collection[str],
    tensors: Mapping[str, TensorInfo],
) -> CouplingGroup:
    """Return a group with what is read in training alone of the groups that it is there."""
    slots = (slot for other in following for slot in other.slots if slot.tensor in unread)
    more = {slot.location: slot for slot in slots}
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
    whole = (*group.slots, *aside)
    return dataclasses.replace(group, slots=whole, removable=removable(whole, tensors))


def _beside(groups: Sequence[CouplingGroup], found: Sequence[CouplingGroup]) -> set[str]:
    """Return the tensors of groups in training that lie where units may leave, as whatever."""
    dims = {(s.tensor, s.dim) for group in groups if group.prunable for s in group.slots}
    there = (g for g in found if not dims.isdisjoint((s.tensor, s.dim) for s in g.slots))
    return {slot.tensor for group in there for slot in group.slots}


@contextmanager
def same_draws() -> Iterator[None]:
    """Let code for training draw the same numbers in every trace, and nobody notice that it did.

    Those of torch are not drawn while a model is exported.
    """
    python, arrays = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def decides_by_training(model: torch.nn.Module) -> bool:
    """Whether code of the model's own, rather than of torch's layers, looks at the flag."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return any(
        "training" in names
        for kind in kinds
        if not kind.__module__.startswith("torch.nn.")
        for value in vars(kind).values()
        for names in _names_in(value)
    )


def _names_in(value: object) -> Iterator[tuple[object, ...]]:
    """Yield the names and constants of a function or property, of what it wraps, and inside it."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, FunctionType):
        yield from _names_in(vars(value).get("__wrapped__"))
        value = value.__code__
    if isinstance(value, CodeType):
        yield value.co_names
        yield value.co_consts  # what getattr is given
        for inner in value.co_consts:
            yield from _names_in(inner)
