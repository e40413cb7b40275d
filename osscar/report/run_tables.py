"""Tables of what can be pruned in a model, and of what a run pruned."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from graph.groups import CouplingGroup, Slot
from osscar.base.printable import listed
from osscar.report.tables import new_table
from osscar.walk.layer_step import GROWN

if TYPE_CHECKING:
    from osscar.pruning.result import LayerReport
    from osscar.pruning.trial import LeftAlone


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """Return one row for each pruned group."""
    dead = any(layer.dead for layer in layers)
    dense = any(layer.unrefitted for layer in layers)
    grown = any(layer.growth > GROWN for layer in layers)
    bounds = any(layer.lower_bound is not None for layer in layers)
    columns = ["group", "kept >", "loss >", "status", "seconds >"]
    columns += ["dead >"] if dead else []
    columns += ["unrefitted >"] if dense else []
    columns += ["growth >"] if grown else []
    columns += ["gap >"] if bounds else []
    table = new_table("loss by layer", *columns)
    for layer in layers:
        cells = [
            layer.name,
            f"{layer.kept} of {layer.units}",
            f"{layer.relative_loss:.4f}",
            layer.status.lower().replace("_", " "),
            f"{layer.solve_seconds:.2f}",
        ]
        if dead:
            cells.append(str(layer.dead) if layer.dead else "")
        if dense:
            cells.append(str(len(layer.unrefitted)) if layer.unrefitted else "")
        if grown:
            cells.append(f"{layer.growth:,.3g}x" if layer.growth > GROWN else "")
        if bounds:
            cells.append("" if layer.gap is None else f"{layer.gap:.1%}")
        table.add_row(*cells)
    return table


def left_alone_table(groups: Sequence[LeftAlone]) -> Table:
    """Return one row for each group that could not follow."""
    table = new_table("left alone, since they cannot follow", "group", "units >", "why")
    for group in groups:
        table.add_row(group.name, f"{group.units} {group.kind}", group.reason)
    return table


def groups_table(groups: Sequence[CouplingGroup], residual: Collection[str] = ()) -> Table:
    """Return one row for each coupling group, with the parameters that all its units hold.

    Parameters
    ----------
    groups
        The groups.
    residual
        The names of those that are residual streams.
    """
    table = new_table(
        "", "group", "kind", "units >", "rows/unit >", "producers", "consumers", "parameters >"
    )
    for group in groups:
        table.add_row(
            Text(group.name, style="" if group.prunable else "dim"),
            f"{group.kind}, residual" if group.name in residual else str(group.kind),
            str(group.units),
            str(max((slot.width for slot in group.consumers), default=0)),
            _modules(group.producers),
            _modules(group.consumers),
            f"{group.removable * group.units:,}" if group.prunable else "frozen",
        )
    return table


def _modules(slots: Sequence[Slot]) -> str:
    names = list(dict.fromkeys(_short(slot) for slot in slots))
    return listed(names)


def _short(slot: Slot) -> str:
    """Return the last part of a module's name, and what a number is counted in."""
    parts = slot.module.split(".")
    last = next((i for i, part in enumerate(reversed(parts)) if not part.isdecimal()), 0)
    return ".".join(parts[-last - 1 :]) or slot.tensor
