"""From related axes to coupling groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from graph.axes import Axes, Layout, Segment
from graph.call import Use
from graph.groups import CouplingGroup, Freeze, Role, Slot
from graph.naming import Factor, Naming
from graph.propagate import Propagation
from graph.tracing.export import TensorInfo


@dataclass(frozen=True)
class Occurrence:
    """Where a factor of a product lies in a dimension of a tensor, in the terms of `Slot`.

    `segment` holds all factors, the given one among them, and for other factors that are
    concatenations what these consist of.
    """

    tensor: str
    dim: int
    segment: Segment
    outer: int
    inner: int
    offset: int


NESTED = Freeze("its positions lie inside the units of another group, or around them", "", "")
"""Why of several axes that make up a dimension one alone is pruned, though others could be."""


def build_groups(
    propagation: Propagation, tensors: Mapping[str, TensorInfo]
) -> tuple[CouplingGroup, ...]:
    """Return the coupling groups of a propagated program, in execution order.

    Two prunable groups never share a parameter dimension as factors of one product: where they
    would, one is frozen.
    """
    return tuple(groups_by_axis(propagation, tensors).values())


def groups_by_axis(
    propagation: Propagation, tensors: Mapping[str, TensorInfo]
) -> dict[int, CouplingGroup]:
    """Return the coupling groups by their axes, in execution order.

    Every free axis that some parameter produces or consumes becomes a group.
    """
    axes = propagation.axes
    occurrences, uneven = _locate(propagation)
    slots = _all_slots(propagation, occurrences)
    freezes = {
        axis: [*axes.freezes(axis), *uneven.get(axis, ())] or list(_unusable(slots[axis]))
        for axis in slots
    }
    heads = frozenset().union(*(axes.leaves(layout) for layout, _ in propagation.findings.heads))
    written = frozenset().union(*(axes.leaves(layout) for layout in propagation.findings.written))
    factors = _beside(axes, occurrences, freezes, heads, written)
    for axis in factors:
        freezes[axis] = freezes[axis] or [NESTED]
    naming = Naming(propagation, slots, factors)
    return {
        axis: CouplingGroup(
            name=naming.names[axis],
            kind=naming.kinds[axis],
            units=axes.axis_size(axis),
            slots=slots[axis],
            removable=removable(slots[axis], tensors),
            frozen=tuple(freezes[axis]),
        )
        for axis in slots
    }


# ---- occurrences ------------------------------------------------------------------------


def _locate(
    propagation: Propagation,
) -> tuple[dict[int, list[Occurrence]], dict[int, list[Freeze]]]:
    """Find every free axis in every tensor dimension, and those that no slot can describe."""
    axes = propagation.axes
    occurrences: dict[int, list[Occurrence]] = defaultdict(list)
    uneven: dict[int, list[Freeze]] = defaultdict(list)
    for tensor, dims in propagation.tensors.items():
        for dim, layout in enumerate(dims):
            for factor, occurrence in _factors(axes, Occurrence(tensor, dim, (), 1, 1, 0), layout):
                if axes.parts(factor) is None and occurrence.segment.count(factor) == 1:
                    occurrences[factor].append(occurrence)
                    continue
                where = f"dimension {dim} of {tensor}"
                for axis in axes.leaves(((factor,),)):
                    reason = f"its units are not evenly spaced in {where}"
                    uneven[axis].append(Freeze(reason, "", ""))
    return occurrences, uneven


_MOST_COPIES = 16
"""Of a concatenation that lies inside a product, each of which has slots of its own."""


def _factors(
    axes: Axes, around: Occurrence, layout: Layout, after: Segment = ()
) -> Iterator[tuple[int, Occurrence]]:
    """Find the factors of a layout that lies in a dimension.

    around: Where it lies: its offset, the distance of its positions (`inner`), and the factors
        before it in a product.
    after: The factors after it in that product.
    """
    offset = around.offset
    for segment in axes.resolve(layout):
        flat = [_flat(axes, factor) for factor in segment]
        for position, factor in enumerate(segment):
            outer, inner = segment[:position], segment[position + 1 :]
            copies, width = axes.size((outer,)), axes.size((inner,)) * around.inner
            before = around.segment + sum(flat[:position], ())
            behind = sum(flat[position + 1 :], ()) + after
            bound = axes.parts(factor)
            if bound is None or copies > _MOST_COPIES:
                whole = before + flat[position] + behind
                yield (
                    factor,
                    replace(around, segment=whole, outer=copies, inner=width, offset=offset),
                )
                continue
            for copy in range(copies):
                start = offset + copy * axes.axis_size(factor) * width
                inside = replace(around, segment=before, inner=width, offset=start)
                yield from _factors(axes, inside, bound, behind)
        offset += axes.size((segment,)) * around.inner


def _flat(axes: Axes, factor: int) -> Segment:
    """Return what a factor consists of, in its order, each axis once; itself if it is free."""
    bound = axes.parts(factor)
    if bound is None:
        return (factor,)
    inside = (leaf for segment in axes.resolve(bound) for f in segment for leaf in _flat(axes, f))
    return tuple(dict.fromkeys(inside))


def _beside(
    axes: Axes,
    occurrences: Mapping[int, list[Occurrence]],
    freezes: Mapping[int, list[Freeze]],
    heads: frozenset[int],
    written: frozenset[int],
) -> dict[int, Factor]:
    """Choose, among axes that are factors of one product, the one whose units may be removed.

    Heads come first, the outer ones before the inner ones, and what lies beside them is their
    width, even where the heads themselves must stay.  Otherwise an axis whose size the code infers
    goes before one whose size is written in it, and then the axis with most units wins.

    Returns for every other axis, how it stands to the chosen one.
    """

    def rank(axis: int) -> tuple[bool, bool, int, int]:
        depth = max(occurrence.segment.index(axis) for occurrence in occurrences[axis])
        if axis in heads:
            return False, False, 0, depth
        return True, axis in written, -axes.axis_size(axis), depth

    chosen: set[int] = set()
    beside: dict[int, Factor] = {}
    for axis in sorted(freezes, key=rank):
        leads = (
            (lead, occurrence.segment.index(axis) < occurrence.segment.index(lead))
            for occurrence in occurrences[axis]
            for lead in occurrence.segment
            if lead in chosen
        )
        lead = next(leads, None)
        if lead is not None:
            beside[axis] = lead
        elif axis in heads or not freezes[axis]:
            chosen.add(axis)
    return beside


# ---- slots -------------------------------------------------------------------------------


def _all_slots(
    propagation: Propagation, occurrences: Mapping[int, list[Occurrence]]
) -> dict[int, tuple[Slot, ...]]:
    """Draw up the slots of every axis that a parameter computes, axes in execution order."""
    roles = _roles(propagation)
    readers = {
        tensor: operator.order
        for operator in reversed(propagation.operators)
        for tensor in operator.tensors
    }
    slots: dict[int, tuple[Slot, ...]] = {}
    for axis, found in occurrences.items():
        drawn = [
            slot
            for occurrence in found
            for slot in _slots(propagation.axes, axis, occurrence, roles, readers)
        ]
        if any(slot.role is not Role.PASS_THROUGH for slot in drawn):
            slots[axis] = tuple(sorted(drawn, key=_position))
    return dict(sorted(slots.items(), key=lambda item: _position(item[1][0])))


def _position(slot: Slot) -> tuple[int, str, int, int, int]:
    return slot.order, slot.tensor, slot.dim, slot.offset, slot.outer


def _roles(propagation: Propagation) -> dict[tuple[str, int, int], dict[Role, Use]]:
    """Find the first use in each role of every axis of every tensor dimension."""
    roles: dict[tuple[str, int, int], dict[Role, Use]] = defaultdict(dict)
    for use in propagation.findings.uses:
        for axis in propagation.axes.leaves(use.layout):
            roles[use.tensor, use.dim, axis].setdefault(use.role, use)
    return roles


def _slots(
    axes: Axes,
    axis: int,
    occurrence: Occurrence,
    roles: Mapping[tuple[str, int, int], dict[Role, Use]],
    readers: Mapping[str, int],
) -> Iterator[Slot]:
    """One slot for each role; passing through is no role beside another one."""
    if occurrence.tensor not in readers:
        return
    seen = dict(roles.get((occurrence.tensor, occurrence.dim, axis), {}))
    if len(seen) > 1:
        seen.pop(Role.PASS_THROUGH, None)
    home = occurrence.tensor.rpartition(".")[0]
    default = Use(
        occurrence.tensor, occurrence.dim, (), Role.PASS_THROUGH, home, readers[occurrence.tensor]
    )
    for role, use in (seen or {Role.PASS_THROUGH: default}).items():
        yield Slot(
            tensor=occurrence.tensor,
            dim=occurrence.dim,
            role=role,
            module=use.module,
            units=axes.axis_size(axis),
            outer=occurrence.outer,
            inner=occurrence.inner,
            offset=occurrence.offset,
            order=use.order,
        )


def _unusable(slots: tuple[Slot, ...]) -> Iterator[Freeze]:
    roles = {slot.role for slot in slots}
    if Role.PRODUCER not in roles:
        yield Freeze("no parameter produces it", "", "")
    if Role.CONSUMER not in roles:
        yield Freeze("no parameter reads it, so that nothing could make up for its units", "", "")


def removable(slots: Iterable[Slot], tensors: Mapping[str, TensorInfo]) -> int:
    """How many parameters leave with one unit; where dimensions cross they count once."""
    widths: dict[str, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for slot in slots:
        widths[slot.tensor][slot.dim][slot.offset] = slot.width
    removed = 0
    for tensor, dims in widths.items():
        shape = tensors[tensor].shape
        kept = [
            size - sum(dims[dim].values()) if dim in dims else size
            for dim, size in enumerate(shape)
        ]
        removed += tensors[tensor].is_parameter * (math.prod(shape) - math.prod(kept))
    return removed
