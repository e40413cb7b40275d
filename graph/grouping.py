"""From related axes to coupling groups, their kinds, and the names by which people know them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from graph.axes import Axes, Layout, Segment
from graph.call import Use
from graph.groups import CouplingGroup, Freeze, Role, Slot, UnitKind
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

Factor = tuple[int, bool]
"""How an axis stands to the prunable one with which it makes up a dimension: that one, and whether
its units lie inside this axis, not the other way round."""


def groups_by_axis(
    propagation: Propagation, tensors: Mapping[str, TensorInfo]
) -> dict[int, CouplingGroup]:
    """Return the coupling groups of a propagated program by their axes, in execution order.

    Every free axis that some parameter produces or consumes becomes a group.  Two prunable groups
    never share a parameter dimension as factors of one product: where they would, one is frozen.
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
    naming = _Naming(propagation, slots, factors)
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
    goes before one whose size is written in it, and then the axis with most units wins.  Returned
    is how every other axis stands to the chosen one.
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


# ---- names -------------------------------------------------------------------------------


class _Naming:
    """Names for all groups at once, so that each is unique.

    A group is called after the innermost module that holds all of it (``mlp.neurons``).  Where
    several groups would get the same name, each is called after the owner of its first producer.
    `factors` says how an axis stands to another one that was preferred to it.
    """

    def __init__(
        self,
        propagation: Propagation,
        slots: Mapping[int, Sequence[Slot]],
        factors: Mapping[int, Factor],
    ) -> None:
        self._slots = slots
        self._factors = factors
        self._targets = {operator.order: operator.target for operator in propagation.operators}
        self._heads: dict[int, str] = {}
        for layout, module in propagation.findings.heads:
            for axis in propagation.axes.leaves(layout):
                self._heads.setdefault(axis, module)
        self._producing: dict[str, set[tuple[int, int]]] = {}
        for axis, own in slots.items():
            for slot in own:
                if slot.role is Role.PRODUCER:
                    self._producing.setdefault(slot.tensor, set()).add((slot.dim, axis))
        self.kinds = {axis: self._kind(axis) for axis in slots}
        self.names = self._unique()

    def _kind(self, axis: int) -> UnitKind:
        slots = self._slots[axis]
        produced = [slot.order for slot in slots if slot.role is Role.PRODUCER]
        consumed = [slot.order for slot in slots if slot.role is Role.CONSUMER]
        if axis in self._factors or not produced or not consumed:
            return UnitKind.OTHER
        # A head of one row is a gate that code multiplies by as if it were one.
        beside = self._made_beside(axis)
        if axis in self._heads and (beside or any(slot.width > 1 for slot in slots)):
            return UnitKind.HEADS
        if any(other in self._heads for other in beside):
            return UnitKind.OTHER
        if any("conv" in self._targets[slot.order] for slot in slots):
            return UnitKind.CHANNELS
        # What is read and then written again is a residual stream.
        embedded = all("embedding" in self._targets[order] for order in produced)
        if embedded or min(consumed) <= max(produced):
            return UnitKind.HIDDEN
        return UnitKind.NEURONS

    def _made_beside(self, axis: int) -> set[int]:
        """Return the axes, such as the width of heads, that the same tensors produce elsewhere."""
        places = {(s.tensor, s.dim) for s in self._slots[axis] if s.role is Role.PRODUCER}
        tensors = {tensor for tensor, _ in places}
        return {
            other
            for tensor in tensors
            for dim, other in self._producing.get(tensor, ())
            if (tensor, dim) not in places
        }

    def _unique(self) -> dict[int, str]:
        preferred = {axis: self._name(axis, self._home(axis)) for axis in self._slots}
        shared = Counter(preferred.values())
        taken: Counter[str] = Counter()
        names: dict[int, str] = {}
        for axis, name in preferred.items():
            if shared[name] > 1 and axis not in self._factors:
                name = self._name(axis, self._first(axis))
            taken[name] += 1
            names[axis] = name if taken[name] == 1 else f"{name}.{taken[name]}"
        return names

    def _name(self, axis: int, module: str) -> str:
        return ".".join(part for part in (module, self._word(axis)) if part)

    def _word(self, axis: int) -> str:
        """Return the last part of a name."""
        if self.kinds[axis] is not UnitKind.OTHER:
            return self.kinds[axis].value
        factor = self._factors.get(axis)
        if factor is not None:
            lead, outer = factor
            return f"{self._word(lead)}.{'outer' if outer else 'inner'}"
        produced = any(slot.role is Role.PRODUCER for slot in self._slots[axis])
        return "outputs" if produced else "inputs"

    def _home(self, axis: int) -> str:
        """Find the module that a group is preferably called after."""
        axis = self._factors[axis][0] if axis in self._factors else axis
        if self.kinds[axis] is UnitKind.HEADS:
            return self._heads[axis]
        if self.kinds[axis] in (UnitKind.NEURONS, UnitKind.HIDDEN):
            return _common(slot.module for slot in self._slots[axis])
        return self._first(axis)

    def _first(self, axis: int) -> str:
        """Find the owner of the first producer, or of the first slot if there is none."""
        slots = self._slots[axis]
        slot = next((slot for slot in slots if slot.role is Role.PRODUCER), slots[0])
        return slot.tensor.rpartition(".")[0]


def _common(modules: Iterable[str]) -> str:
    """Find the innermost module that contains all the given ones."""
    paths = [module.split(".") for module in modules]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
