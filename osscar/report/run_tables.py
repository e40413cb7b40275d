"""Tables of what can be pruned in a model, of what a run will take, and of what it pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from graph.groups import CouplingGroup, Slot
from osscar.base.columns import columns
from osscar.base.numbers import decimals, in_bytes
from osscar.base.printable import listed
from osscar.report.tables import new_table
from osscar.walk.layer_report import LayerReport

if TYPE_CHECKING:
    from osscar.pruning.dry_run import Estimate


def layers_table(
    layers: Sequence[Mapping[str, Any]],
    budget: Mapping[str, Any] | None = None,
    *,
    prefix: str = "",
) -> Table:
    """Return one row for each pruned group.

    Parameters
    ----------
    layers
        As in ``osscar.prune/5``; a column of which all layers say nothing is left out.
    budget
        As there, where groups share one.
    prefix
        What names of groups begin with, and are shown without.
    """
    widths, measured = (dict((budget or {}).get(key) or {}) for key in ("widths", "measured"))
    unit = "relative" if (budget or {}).get("measure") == "relative" else "nats"
    predicted = {name: width["predicted"] for name, width in widths.items()}
    rows = [
        {**one, "predicted": predicted.get(one["name"]), "measured": measured.get(one["name"], ())}
        for one in layers
    ]
    found: dict[str, Callable[[Mapping[str, Any]], str]] = {
        **columns(LayerReport),
        f"predicted, {unit} >": lambda one: decimals(one["predicted"], 5),
        f"measured alone, {unit}": lambda one: "; ".join(
            f"{decimals(at['distance'], 5)} with {at['kept']}" for at in one["measured"]
        ),
    }
    cells = {title: [text(row) for row in rows] for title, text in found.items()}
    cells["group"] = [row["name"].removeprefix(prefix) for row in rows]
    shown = {title: found for title, found in cells.items() if any(found) or title == "group"}
    return new_table("loss by layer", *shown, rows=zip(*shown.values(), strict=True))


def skipped_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """Return one row for each group that keeps all its units."""
    rows = ((one["name"], f"{one['units']} {one['kind']}", one["reason"]) for one in groups)
    title = "skipped: they keep all their units"
    return new_table(title, "group", "units >", "why", rows=rows)


def groups_table(groups: Sequence[CouplingGroup], residual: Collection[str] = ()) -> Table:
    """Return one row for each coupling group, with the parameters that all its units hold.

    Parameters
    ----------
    groups
        The groups.
    residual
        The names of those that are residual streams.
    """
    columns = ("group", "kind", "units >", "rows/unit >", "producers", "consumers")
    return new_table(
        "",
        *(*columns, "parameters >"),
        rows=(
            (
                Text(group.name, style="" if group.prunable else "dim"),
                f"{group.kind}, residual" if group.name in residual else str(group.kind),
                str(group.units),
                str(max((slot.width for slot in group.consumers), default=0)),
                _modules(group.producers),
                _modules(group.consumers),
                f"{group.removable * group.units:,}" if group.prunable else "frozen",
            )
            for group in groups
        ),
    )


def _modules(slots: Sequence[Slot]) -> str:
    return listed(list(dict.fromkeys(map(_short, slots))))


def _short(slot: Slot) -> str:
    """Return the last part of a module's name, and what a number is counted in."""
    parts = slot.module.split(".")
    last = next((i for i, part in enumerate(reversed(parts)) if not part.isdecimal()), 0)
    return ".".join(parts[-last - 1 :]) or slot.tensor


# ---- what a run will take ----------------------------------------------------------------


def estimate_table(estimate: Estimate) -> Table:
    """Return one row for each stage, and one for the whole run."""
    table = new_table("estimate", "stage", "seconds >")
    for stage, seconds in estimate.stages.items():
        table.add_row(str(stage), _seconds(seconds))
    table.add_section()
    table.add_row("all", _seconds(estimate.seconds))
    return table


def sizes_line(estimate: Estimate) -> str:
    """Say what a run takes of memory and of files."""
    sizes = (estimate.peak_bytes, estimate.read_bytes, estimate.written_bytes)
    memory, read, written = map(in_bytes, sizes)
    return f"memory: {memory} at most; files: {read} read, {written} written"


def solved_line(estimate: Estimate) -> str:
    """Say what seconds rest on, and how sure they are."""
    return (
        f"seconds: between half and twice as many; {estimate.solved!r} was solved, and stands for "
        "all groups by the cube of what they read"
    )


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
