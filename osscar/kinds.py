"""Kinds of groups that are `graph.UnitKind.routed`: each has a room that knows all about it.

No trace finds their units.  What differs about them is asked of the room, so that no other code
asks for a kind by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import nn

from graph import CouplingGroup, DependencyGraph, TraceError, UnitKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    import solvers
    from osscar.consumers.consumer import LinearMap
    from osscar.preparation.prepare import Prepared
    from osscar.proof.plan import GroupPlan
    from osscar.walk import experts
    from osscar.walk.layer_step import DenseTensors, Solved
    from osscar.walk.targets import Target


class Found(Protocol):
    """A group that a room has found."""

    @property
    def group(self) -> CouplingGroup:
        """The group, which is frozen where its units cannot leave."""


class Step(Protocol):
    """A group that all batches have reached, as `osscar.walk.layer_step.LayerStep` is of others."""

    @property
    def group(self) -> CouplingGroup:
        """The group."""

    @property
    def consumers(self) -> tuple[LinearMap, ...]:
        """What is refitted."""

    def solve(
        self, keep: int, backend: solvers.Backend, damp: float | None, weight: float | None
    ) -> Solved:
        """Choose the units that stay, and commit the refit."""

    def alone(
        self, keep: int, damp: float | None, shaped: bool
    ) -> AbstractContextManager[NDArray[np.float64]]:
        """Let the model run with this group pruned while the block does.

        Yielded is the shape of its curve, if that is asked for.
        """


class Room(Protocol):
    """What a room does for groups of its kind."""

    def groups_in(self, prepared: Prepared) -> Sequence[Found]:
        """Return the groups of a model that is prepared, in its own order."""

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

    def without(
        self, prepared: Prepared, kept: Mapping[str, Sequence[int]]
    ) -> AbstractContextManager[Prepared]:
        """Let a model run among the units that stay of groups, by name, while the block does."""

    def steps(
        self,
        prepared: Prepared,
        groups: Sequence[CouplingGroup],
        *,
        target: Target = ...,
        held: int = 0,
        committed: Mapping[str, DenseTensors] | None = None,
    ) -> Iterable[Any]:
        """Yield a `Step` for each group; arguments are those of `osscar.walk.walk.Walk`."""

    def linear_maps(self, prepared: Prepared, group: CouplingGroup) -> tuple[LinearMap, ...]:
        """Return what is refitted where units of a group leave, while all are there."""


_ROOMS = {UnitKind.EXPERTS: "osscar.walk.experts"}


@cache
def room_of(kind: UnitKind) -> Room:
    """Return the room of a kind; it is imported when it is first asked for."""
    return cast("Room", import_module(_ROOMS[kind]))


def rooms() -> Iterator[Room]:
    """Yield all rooms."""
    yield from map(room_of, _ROOMS)


if TYPE_CHECKING:
    _CHECKED: Room = experts
