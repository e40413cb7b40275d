"""Which positions of every value of a program stay, when units of some groups leave."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from graph.axes import Layout
from graph.call import Value
from graph.errors import TraceError, UnknownGroupError
from graph.grouping import NESTED, groups_by_axis
from graph.groups import CouplingGroup, Slot
from graph.propagate import Propagation, propagate
from graph.rules import PROGRAM
from graph.tracing.export import varies
from graph.tracing.standalone import Standalone


@dataclass(frozen=True, eq=False)
class Extent:
    """A dimension of a value, and what stays of it.

    size: How many positions it has in the example.
    stays: Which of them stay, (size,) bool; None if all do.
    ratio: The share that stays, if it is the same whatever the sizes of the inputs are; else None.
    varies: Whether it varies with the sizes of the inputs.
    """

    size: int
    stays: Tensor | None = None
    ratio: Fraction | None = Fraction(1)
    varies: bool = False

    @property
    def whole(self) -> bool:
        """Whether every position stays."""
        return self.stays is None

    @cached_property
    def kept(self) -> int:
        """How many positions stay."""
        return self.size if self.stays is None else int(self.stays.sum())

    def before(self, position: int) -> int:
        """Return how many of the first positions stay."""
        return position if self.stays is None else int(self.stays[:position].sum())


Extents: TypeAlias = tuple[Extent, ...]
"""The dimensions of one value."""


@dataclass(frozen=True, eq=False)
class TracedProgram:
    """A program with the layouts `found` of all values, and the coupling groups by their axes."""

    standalone: Standalone
    found: Propagation = field(repr=False)
    groups: Mapping[int, CouplingGroup] = field(repr=False)

    def axis_of(self, slots: Iterable[Slot]) -> int:
        """Return the axis whose units own the given slots alone, or raise UnknownGroupError."""
        wanted = _locations(slots)
        for axis, group in self.groups.items():
            if _locations(group.slots) == wanted:
                # What lies inside other units, or around them, may go in their place.
                if set(group.frozen) - {NESTED}:
                    raise UnknownGroupError(
                        f"it is frozen in the exported program: {group.frozen[0].reason}"
                    )
                return axis
        raise UnknownGroupError("the exported program has no such group")


def _locations(slots: Iterable[Slot]) -> set[tuple[object, ...]]:
    """Return where units lie, whether they do so several times in one slot or in several."""
    return {
        replace(s, outer=1, offset=s.offset + copy * s.units * s.inner).location
        for s in slots
        for copy in range(s.outer)
    }


class Staying:
    """What stays of every value of a program.

    kept: For the axis of each group that loses units, those that stay.
    """

    def __init__(self, program: TracedProgram, kept: Mapping[int, Collection[int]]) -> None:
        self._program, self._axes = program, program.found.axes
        self._masks: dict[int, Tensor] = {}
        for axis, units in kept.items():
            self._masks[axis] = torch.zeros(self._axes.axis_size(axis), dtype=torch.bool)
            self._masks[axis][torch.tensor(sorted(units), dtype=torch.int64)] = True
        self._known: dict[Layout, Extent] = {}

    def of(self, node: Node) -> tuple[Extents, ...]:
        """Return the dimensions of what a node returns, for each tensor in it."""
        result, traced = self._program.found.values.get(node), node.meta.get("val")
        values = result if isinstance(result, tuple | list) else (result,)
        tensors = traced if isinstance(traced, tuple | list) else (traced,)
        return tuple(
            tuple(map(_marked, self._of_dims(value.dims), tensor.shape))
            for value, tensor in zip(values, tensors, strict=False)
            if isinstance(value, Value) and isinstance(tensor, Tensor)
        )

    def is_written(self, node: Node) -> bool:
        """Whether a node stands for a tensor that is written in the code."""
        holders = self._program.standalone.program.holders
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        return node.op == "get_attr" and is_tensor and node.name not in holders

    def of_tensor(self, name: str) -> Extents:
        """Return the dimensions of a parameter or buffer."""
        return self._of_dims(self._program.found.tensors[name])

    def _of_dims(self, dims: Iterable[Layout]) -> Extents:
        return tuple(self._of_layout(layout) for layout in dims)

    def _of_layout(self, layout: Layout) -> Extent:
        if layout not in self._known:
            self._known[layout] = self._computed(self._axes.resolve(layout))
        return self._known[layout]

    def _computed(self, layout: Layout) -> Extent:
        size = self._axes.size(layout)
        if self._axes.leaves(layout).isdisjoint(self._masks):
            return Extent(size)
        stays = torch.cat([self._of_segment(segment) for segment in layout])
        ratio = Fraction(int(stays.sum()), size) if len(layout) == 1 else None
        return Extent(size, stays, ratio)

    def _of_segment(self, segment: tuple[int, ...]) -> Tensor:
        """Return which positions of a product stay: those all of whose factors do."""
        stays = torch.ones(1, dtype=torch.bool)
        for axis in segment:
            stays = (stays[:, None] & self._of_axis(axis)[None, :]).flatten()
        return stays

    def _of_axis(self, axis: int) -> Tensor:
        bound = self._axes.parts(axis)
        if bound is not None:
            extent = self._of_layout(bound)
            if extent.stays is not None:
                return extent.stays
        elif axis in self._masks:
            return self._masks[axis]
        return torch.ones(self._axes.axis_size(axis), dtype=torch.bool)


def _marked(extent: Extent, size: int | torch.SymInt) -> Extent:
    """Say of a dimension whether it varies with the sizes of the inputs."""
    return replace(extent, varies=True) if varies(size) else extent


def with_axes(standalone: Standalone) -> TracedProgram:
    """Find the axes of all values of a program.

    Open sizes have the numbers of the example here.  If units are prunable at these and not at
    others that the program takes, a TraceError names a group: the sizes must not be left open.
    """
    program = standalone.program
    found = propagate(program, PROGRAM)
    groups = groups_by_axis(found, program.tensors)
    others = standalone.generic_sizes()
    if others:
        again = propagate(program, PROGRAM, sizes=others)
        kept = groups_by_axis(again, program.tensors).values()
        known = [_locations(group.slots) for group in kept if not set(group.frozen) - {NESTED}]
        for group in groups.values():
            if not set(group.frozen) - {NESTED} and _locations(group.slots) not in known:
                sizes = ", ".join(f"{size} = {number}" for size, number in others.items())
                raise TraceError(
                    f"group {group.name!r} can be pruned at the example's sizes, and not at others "
                    f"({sizes})",
                    "",
                    "Fix the sizes of the inputs.",
                )
    return TracedProgram(standalone, found, groups)
