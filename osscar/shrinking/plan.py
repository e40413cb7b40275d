"""What was removed from a model, as a value that can be written and replayed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graph.groups import CouplingGroup, Role, Slot, UnitKind
from osscar.core.errors import CheckpointError

PLAN_FILE = "osscar_plan.json"
"""Marks a checkpoint whose shapes no stock config can express."""


@dataclass(frozen=True)
class GroupPlan:
    """The units of one coupling group that stay.

    Parameters
    ----------
    name, kind, units, slots
        Of the group, as in `graph.CouplingGroup`.
    kept
        The units that stay, in ascending order.
    """

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
    def consumers(self) -> tuple[Slot, ...]:
        """The slots that read the units."""
        return tuple(slot for slot in self.slots if slot.role is Role.CONSUMER)

    def scaled(self, count: int) -> int:
        """Return what is left of a number that is a multiple of the group's units."""
        return count * len(self.kept) // self.units


@dataclass(frozen=True)
class Integer:
    """A number, or a tuple of them, that a module keeps and that follows a group.

    Parameters
    ----------
    module
        Qualified name of the module.
    attribute
        Name of the number.
    value
        What it is in the shrunk model.
    """

    module: str
    attribute: str
    value: int | tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """Everything that one pruning run removed.

    Parameters
    ----------
    groups
        One entry for each group that lost units.
    integers
        Numbers that modules keep and that follow the groups, as far as `osscar.shrink` does not
        know them by itself.
    """

    groups: tuple[GroupPlan, ...]
    integers: tuple[Integer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able data."""
        return {
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "integers": [dataclasses.asdict(integer) for integer in self.integers],
        }

    @classmethod
    def from_json(cls, data: Any) -> PruningPlan:
        """Read what `to_json` wrote.

        Raises
        ------
        CheckpointError
            If a field is missing, unknown or out of range.
        """
        try:
            return cls(
                tuple(_group_from_json(entry) for entry in data["groups"]),
                tuple(_integer_from_json(entry) for entry in data.get("integers", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the pruning plan cannot be read: {error!r}") from error


def _group_from_json(data: dict[str, Any]) -> GroupPlan:
    slots = tuple(_slot_from_json(slot) for slot in data["slots"])
    units, kept = int(data["units"]), tuple(int(unit) for unit in data["kept"])
    if not kept or sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < units:
        raise ValueError(f"group {data['name']!r} keeps units that it does not have")
    return GroupPlan(data["name"], UnitKind(data["kind"]), units, kept, slots)


def _integer_from_json(data: dict[str, Any]) -> Integer:
    value = tuple(data["value"]) if isinstance(data["value"], list) else data["value"]
    sizes = value if isinstance(value, tuple) else (value,)
    if any(type(size) is not int for size in sizes) or not str(data["attribute"]).isidentifier():
        raise ValueError(f"{data!r} is no number of a module")
    return Integer(data["module"], data["attribute"], value)


def _slot_from_json(data: dict[str, Any]) -> Slot:
    least = {"dim": 0, "units": 1, "outer": 1, "inner": 1, "offset": 0, "order": 0}
    for name, smallest in least.items():
        if type(data[name]) is not int or not smallest <= data[name] < 2**31:
            raise ValueError(f"slot has {name} {data[name]!r}")
    for name in ("tensor", "module"):
        if not isinstance(data[name], str):
            raise ValueError(f"slot has {name} {data[name]!r}")
    return Slot(**{**data, "role": Role(data["role"])})
