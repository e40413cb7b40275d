"""Tables of the groups of a model, and of backends."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graph.groups import CouplingGroup, Slot
from osscar.base.printable import listed
from osscar.report.sections import Table, table

if TYPE_CHECKING:
    from solvers import BackendInfo, Capabilities


def skipped_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """Return one row for each skipped group."""
    return table(
        "Skipped groups, which keep all their units",
        {
            "group": lambda one: one["name"],
            "units >": lambda one: f"{one['units']} {one['kind']}",
            "why": lambda one: one["reason"],
        },
        groups,
    )


def groups_table(groups: Sequence[CouplingGroup], residual: Collection[str] = ()) -> Table:
    """Return one row for each group; those named in `residual` are residual streams."""
    return table(
        "",
        {
            "group": lambda one: one.name,
            "kind": lambda one: f"{one.kind}{', residual' if one.name in residual else ''}",
            "units >": lambda one: str(one.units),
            "rows/unit >": lambda one: str(max((slot.width for slot in one.consumers), default=0)),
            "producers": lambda one: _modules(one.producers),
            "consumers": lambda one: _modules(one.consumers),
            "parameters >": lambda one: (
                f"{one.removable * one.units:,}" if one.prunable else "frozen"
            ),
        },
        groups,
    )


def _modules(slots: Sequence[Slot]) -> str:
    """Return the last part of each module's name, and what a number is counted in."""
    names = []
    for slot in slots:
        parts = slot.module.split(".")
        last = next((i for i, part in enumerate(reversed(parts)) if not part.isdecimal()), 0)
        names.append(".".join(parts[-last - 1 :]) or slot.tensor)
    return listed(list(dict.fromkeys(names)))


def backends_table(infos: Sequence[BackendInfo], title: str = "") -> Table:
    """Return one row for each registered backend."""
    return table(
        title,
        {
            "backend": lambda info: info.name,
            "kind": lambda info: info.kind,
            "takes": lambda info: _takes(info.capabilities),
            "options": lambda info: ", ".join(f"{k}={v}" for k, v in info.options.items()),
            "what it does": lambda info: info.summary,
            "available": lambda info: info.unavailable or "yes",
        },
        infos,
    )


def _takes(capabilities: Capabilities) -> str:
    limits = [
        "" if capabilities.several_consumers else "one consumer",
        f"up to {capabilities.max_units} units" if capabilities.max_units is not None else "",
        "" if "cuda" in capabilities.devices else "CPU only",
    ]
    return ", ".join(filter(None, limits)) or "everything"
