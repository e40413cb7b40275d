"""Coupling groups: the vocabulary in which the structure of a network is described.

A *unit* (an attention head, an FFN neuron, a convolution channel) is the smallest structure that
can be removed from a network.  It owns a slice of several tensors at once: the rows that produce
it, the biases and normalizations that it passes through, and the columns that read it.  A
`CouplingGroup` lists those tensors as `Slot` s, one for each (tensor, dimension), or several where
its units lie in several places of it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class UnitKind(enum.StrEnum):
    """What the units of a group are, in the words of the field."""

    HEADS = "heads"
    NEURONS = "neurons"
    CHANNELS = "channels"
    HIDDEN = "hidden"
    EXPERTS = "experts"
    """Of a mixture, to which a router sends tokens."""
    OTHER = "other"

    @property
    def routed(self) -> bool:
        """Whether a router decides, token by token, which units compute.

        No trace finds such units, and fewer of them save no operations.
        """
        return self is UnitKind.EXPERTS


class Role(enum.StrEnum):
    """How a tensor takes part in a group."""

    PRODUCER = "producer"
    """Its slice computes the unit (the output rows of a linear map, an embedding column)."""
    PASS_THROUGH = "pass-through"
    """Its slice is applied to the unit element-wise (bias, normalization, depthwise filter)."""
    CONSUMER = "consumer"
    """Its slice reads the unit and is contracted over it (the input columns of a linear map)."""


@dataclass(frozen=True)
class Slot:
    """One tensor dimension that belongs to a group, and where in it each unit lies.

    Along dimension `dim` of the tensor, unit ``u`` owns the indices
    ``offset + (o * units + u) * inner + i`` for ``0 <= o < outer`` and ``0 <= i < inner``.

    Parameters
    ----------
    tensor
        Qualified name of the parameter or buffer, as in ``model.named_parameters()``.  Tied
        tensors are named once, by the first of their names.  Where each unit is a member of a list
        of modules, the name of that list, which is `module`, too.
    dim
        The dimension of that tensor.
    role
        How the tensor takes part.
    module
        Qualified name of the module that uses the tensor.
    units, outer, inner, offset
        The strides of the formula above.
    order
        Position of the operator in the execution order of the traced graph.
    """

    tensor: str
    dim: int
    role: Role
    module: str
    units: int
    outer: int = 1
    inner: int = 1
    offset: int = 0
    order: int = 0

    @property
    def location(self) -> tuple[object, ...]:
        """What tells the indices that units own from others."""
        return self.tensor, self.dim, self.units, self.outer, self.inner, self.offset

    @property
    def width(self) -> int:
        """How many indices along `dim` one unit owns."""
        return self.outer * self.inner

    def indices(self, units: Iterable[int]) -> list[int]:
        """Return, sorted, the indices along `dim` that the given units own."""
        return sorted(
            self.offset + (o * self.units + u) * self.inner + i
            for u in units
            for o in range(self.outer)
            for i in range(self.inner)
        )


@dataclass(frozen=True)
class Freeze:
    """Why a group must not be pruned.

    Parameters
    ----------
    reason
        One sentence that a person can act on.
    operator
        The ATen operator that froze it, such as ``aten.softmax.int``; empty if none did.
    module
        Qualified name of the module in which that operator was called.
    """

    reason: str
    operator: str
    module: str


@dataclass(frozen=True)
class CouplingGroup:
    """Tensor slices that are kept or removed together, unit by unit.

    Parameters
    ----------
    name
        Unique in the model and stable between traces, such as ``model.layers.3.mlp.neurons``.
    kind
        What the units are.
    units
        How many units there are.
    slots
        Every tensor dimension that the units own, in execution order.
    removable
        How many parameters leave the model with one unit.
    frozen
        Why the group must not be pruned; empty when it may be.
    step
        The number of units that stay has to be a multiple of this, or all.
    fewest
        So many units stay at least.
    """

    name: str
    kind: UnitKind
    units: int
    slots: tuple[Slot, ...]
    removable: int
    frozen: tuple[Freeze, ...] = ()
    step: int = 1
    fewest: int = 1

    @property
    def prunable(self) -> bool:
        """Whether units may be removed."""
        return not self.frozen

    @property
    def producers(self) -> tuple[Slot, ...]:
        """The slots that compute the units."""
        return tuple(s for s in self.slots if s.role is Role.PRODUCER)

    @property
    def consumers(self) -> tuple[Slot, ...]:
        """The slots that read the units, in execution order."""
        return tuple(s for s in self.slots if s.role is Role.CONSUMER)
