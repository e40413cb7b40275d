"""Kinds of groups that are `graph.UnitKind.routed`: each has a room that knows all about it.

No trace finds their units.  What differs about them is asked of the room, so that no other code
asks for a kind by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import nn

from graph import CouplingGroup, DependencyGraph, TraceError, UnitKind

if TYPE_CHECKING:
    from osscar import experts
    from osscar.proof.plan import GroupPlan


class Found(Protocol):
    """A group that a room has found."""

    @property
    def group(self) -> CouplingGroup:
        """The group, which is frozen where its units cannot leave."""


class Room(Protocol):
    """What a room does for groups of its kind."""

    def find(self, model: nn.Module, example: Mapping[str, Any]) -> Sequence[Found]:
        """Run a model in evaluation mode, and return its groups, in its own order."""

    def traced_around(
        self,
        model: nn.Module,
        example: Mapping[str, Any],
        small: Mapping[str, Any],
        error: TraceError,
    ) -> tuple[DependencyGraph, tuple[CouplingGroup, ...]]:
        """Trace a model around code that cannot be traced; raise the error where none is known.

        Returned are also groups in that code, which are frozen.  `small` are the inputs to trace
        with.
        """

    def masked(self, model: nn.Module, groups: Sequence[GroupPlan]) -> AbstractContextManager[None]:
        """Let a model run without the units that plans remove while the block does."""


_ROOMS = {UnitKind.EXPERTS: "osscar.experts"}


@cache
def room_of(kind: UnitKind) -> Room:
    """Return the room of a kind; it is imported when it is first asked for."""
    return cast("Room", import_module(_ROOMS[kind]))


def rooms() -> Iterator[Room]:
    """Yield all rooms."""
    yield from map(room_of, _ROOMS)


if TYPE_CHECKING:
    _CHECKED: Room = experts
