"""Tables of what can be pruned in a model, of what a run will take, and of what it pruned."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from graph.groups import CouplingGroup, Slot
from osscar.base.printable import listed
from osscar.report.tables import decimals, in_bytes, limit_cell, new_table
from osscar.walk.layer_step import GROWN

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
    columns: dict[str, list[str]] = {
        "group": [layer["name"].removeprefix(prefix) for layer in layers],
        "kept >": [f"{layer['kept']} of {layer['units']}" for layer in layers],
        "loss >": [decimals(layer["relative_loss"]) for layer in layers],
        "refitted >": [decimals(layer.get("refitted_loss")) for layer in layers],
        "bound >": [_bound(layer) for layer in layers],
        "gap >": ["" if one["gap"] is None else f"{one['gap']:.1%}" for one in layers],
        "limit >": [_limit(one) for one in layers],
        "certificate": [_certificate(layer) for layer in layers],
        f"predicted, {unit} >": [decimals(predicted.get(one["name"]), 5) for one in layers],
        f"measured alone, {unit}": [_measured(measured.get(one["name"]) or ()) for one in layers],
        "status": [layer["status"].lower().replace("_", " ") for layer in layers],
        "seconds >": [f"{layer['solve_seconds']:.2f}" for layer in layers],
        "dead >": [str(layer["dead"] or "") for layer in layers],
        "fixed >": [str(layer.get("fixed") or "") for layer in layers],
        "unrefitted >": [str(len(layer["unrefitted"]) or "") for layer in layers],
        "tied >": [str(len(layer.get("tied", ())) or "") for layer in layers],
        "growth >": [f"{g:,.3g}x" if (g := layer["growth"]) > GROWN else "" for layer in layers],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells) or name == "group"}
    return new_table("loss by layer", *shown, rows=zip(*shown.values(), strict=True))


def _measured(points: Sequence[Mapping[str, Any]]) -> str:
    """Say what a group was measured to cost, and at which widths."""
    return "; ".join(f"{decimals(one['distance'], 5)} with {one['kept']}" for one in points)


def _bound(layer: Mapping[str, Any]) -> str:
    bound = layer["relative_bound"]
    return "" if bound is None else decimals(max(0.0, bound))


def _limit(layer: Mapping[str, Any]) -> str:
    limit = layer.get("bound_limit")
    if limit is None or not layer["loss"] > 0:
        return ""
    return limit_cell(1 - limit / layer["loss"], digits=1)


def _certificate(layer: Mapping[str, Any]) -> str:
    if layer["lower_bound"] is None:
        return ""
    known = "optimal" if layer["proved_optimal"] else "bounded"
    return known if layer["recomputed_bound"] is None else f"{known}, recomputed"


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
