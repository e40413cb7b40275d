"""What was removed from a model, as a value that can be written and replayed."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from annotated_types import Interval, Len, Predicate
from pydantic import AfterValidator, with_config
from torch import Tensor

from graph.groups import CouplingGroup, Role, Slot, UnitKind
from osscar.base.json_files import MOST_NUMBERS, STRICT

_MOST = 2**31
"""No dimension of a tensor has as many entries."""

_Identifier: TypeAlias = Annotated[str, Predicate(str.isidentifier)]


def _checked_group(group: GroupPlan) -> GroupPlan:
    kept = group.kept
    for slot in group.slots:
        if min(slot.dim, slot.offset, slot.units - 1, slot.outer - 1, slot.inner - 1) < 0:
            raise ValueError(f"group {group.name!r} has no such units in {slot.tensor!r}")
    ascending = all(a < b for a, b in itertools.pairwise(kept))
    if not kept or not ascending or not 0 <= kept[0] <= kept[-1] < group.units < _MOST:
        raise ValueError(f"group {group.name!r} keeps units that it does not have")
    return group


class Form(enum.StrEnum):
    """What of a model is shrunk."""

    EAGER = "eager"
    """Its modules, whose code has to work with fewer units."""
    EXPORTED = "exported"
    """Its exported program, in which every size is known."""


@dataclass(frozen=True)
class GroupPlan:
    """The units of a `graph.CouplingGroup` that stay, `kept` in ascending order."""

    name: str
    kind: UnitKind
    units: int
    kept: tuple[int, ...]
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, group: CouplingGroup, kept: tuple[int, ...]) -> GroupPlan:
        """Plan to keep some units of a group."""
        return cls(group.name, group.kind, group.units, kept, group.slots)

    @property
    def gone(self) -> tuple[int, ...]:
        """The units that leave, in ascending order."""
        return tuple(sorted(set(range(self.units)) - set(self.kept)))

    @property
    def consumers(self) -> tuple[Slot, ...]:
        """The slots that read the units."""
        return tuple(slot for slot in self.slots if slot.role is Role.CONSUMER)

    def scaled(self, count: int) -> int:
        """Return what is left of a number that is a multiple of the group's units."""
        return count * len(self.kept) // self.units


Number: TypeAlias = Annotated[int, Interval(gt=-_MOST, lt=_MOST)]
"""A whole number that a module keeps."""


@dataclass(frozen=True)
class Integer:
    """A number, or a tuple of them, that a module keeps and that follows a group."""

    module: str
    attribute: _Identifier
    value: Number | tuple[Number, ...]


@dataclass(frozen=True)
class TracedInput:
    """The form of a tensor that a program was traced with.

    varies: Dimensions whose sizes were left open.
    """

    name: _Identifier
    shape: Annotated[tuple[Annotated[int, Interval(gt=0, lt=_MOST)], ...], Len(1)]
    dtype: str
    varies: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor, varies: Iterable[int] = ()) -> TracedInput:
        """Describe a tensor."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, tuple(tensor.shape), dtype, tuple(varies))

    def example(self) -> Tensor:
        """Return zeros of that form."""
        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype))


def _checked_input(given: TracedInput) -> TracedInput:
    known = isinstance(getattr(torch, given.dtype, None), torch.dtype)
    if not known or not {*given.varies}.issubset(range(len(given.shape))):
        raise ValueError(f"{given.name!r} is no input of a model")
    return given


def _checked_inputs(given: tuple[TracedInput, ...]) -> tuple[TracedInput, ...]:
    if sum(math.prod(one.shape) for one in given) > MOST_NUMBERS:
        raise ValueError(f"a model is traced with at most {MOST_NUMBERS:,} numbers")
    return given


@with_config(STRICT)
@dataclass(frozen=True, repr=False)
class PruningPlan:
    """Everything that one pruning run removed.

    Parameters
    ----------
    groups
        One entry for each group that lost units.
    integers
        Numbers that modules keep and that follow the groups, as far as slicing does not know them
        by itself.
    traced
        The inputs with which the model was traced, if it is its exported program that was shrunk;
        empty if it is its modules.
    """

    groups: tuple[Annotated[GroupPlan, AfterValidator(_checked_group)], ...]
    integers: tuple[Integer, ...] = ()
    traced: Annotated[
        tuple[Annotated[TracedInput, AfterValidator(_checked_input)], ...],
        AfterValidator(_checked_inputs),
    ] = ()

    def __repr__(self) -> str:
        kept = ", ".join(f"{g.name} {len(g.kept)} of {g.units}" for g in self.groups[:3])
        more = f" and {len(self.groups) - 3} groups more" if len(self.groups) > 3 else ""
        return f"PruningPlan({kept}{more})"

    @property
    def form(self) -> Form:
        """What of the model was shrunk."""
        return Form.EXPORTED if self.traced else Form.EAGER

    @property
    def tensors(self) -> frozenset[str]:
        """The names of all tensors that lose a part."""
        return frozenset(slot.tensor for group in self.groups for slot in group.slots)


@dataclass(frozen=True)
class Structure:
    """What is equal in the programs of a smaller model and of the dense one without units.

    Parameters
    ----------
    operators, numbers, tensors
        How many calls of operators, numbers in their arguments, and parameters and buffers.
    sizes
        The sizes of inputs for which it holds, in words for each pair of programs.
    untried
        Sizes that the dense model takes, and of which nothing is proved.
    """

    operators: int
    numbers: int
    tensors: int
    sizes: tuple[str, ...]
    untried: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Say it."""
        untried = f"; nothing is proved for {' or '.join(self.untried)}" if self.untried else ""
        return (
            "the smaller model's program is the dense model's without these units "
            f"({self.operators:,} operators, {self.numbers:,} numbers and {self.tensors:,} "
            "tensors are equal), in evaluation mode, with the arguments of the calibration data, "
            f"for {'; or '.join(self.sizes)}{untried}"
        )


@with_config(STRICT)
@dataclass(frozen=True)
class Certificate:
    """Evidence that a smaller model equals the dense one without the units that a plan removes.

    Parameters
    ----------
    error
        Largest difference between outputs of the smaller and of the masked model, relative to the
        largest value of the column.
    ties
        Whole numbers among the outputs that differ, as what they come from is equal up to rounding.
    structure
        What is equal in the programs of both; None if programs could not be compared.
    unproved
        Why they could not.
    """

    error: float
    ties: int = 0
    structure: Structure | None = None
    unproved: str = ""

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Say what was proved of the program, and what was compared of outputs."""
        found = self.structure
        ties = f"; {self.ties} whole numbers differ by rounding" if self.ties else ""
        program = ("not proved, but compared", self.unproved)
        if found is not None:
            program = ("proved", found.sentence())
        return program, (
            "outputs",
            f"differ from the masked model's by at most {self.error:.1e} of a column's largest "
            f"value{ties}",
        )


def combined_groups(plans: Iterable[PruningPlan]) -> list[GroupPlan]:
    """Merge plans in a row into one plan a group, which says how many units stay, not which."""
    found: dict[str, GroupPlan] = {}
    for group in (group for plan in plans for group in plan.groups):
        units, kept = found.get(group.name, group).units, tuple(range(len(group.kept)))
        found[group.name] = dataclasses.replace(group, units=units, kept=kept)
    return list(found.values())
