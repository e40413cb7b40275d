"""What a run will take, and how far off that was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from osscar.base.printable import counted, listed
from osscar.report.tables import in_bytes, new_table

if TYPE_CHECKING:
    from osscar.estimation.values import Estimate, StageEstimate


def estimate_table(estimate: Estimate) -> Table:
    """Return one row for each stage, and one for the whole run."""
    table = new_table(
        "estimate", "stage", "seconds >", "between >", "memory >", "read >", "written >"
    )
    for one in estimate.stages:
        table.add_row(
            one.stage,
            _seconds(one.seconds),
            between(one.low, one.high),
            *(in_bytes(size) if size else "" for size in _sizes(one)),
        )
    table.add_section()
    table.add_row(
        "all",
        _seconds(estimate.seconds),
        between(estimate.low, estimate.high),
        *map(in_bytes, _sizes(estimate)),
    )
    return table


def _sizes(one: StageEstimate | Estimate) -> tuple[int, int, int]:
    return one.peak_bytes, one.read_bytes, one.written_bytes


def extrapolated(estimate: Estimate) -> str:
    """Say which layers were solved, and for how many others each stands."""
    told = [
        f"{counted(one.extrapolated, 'group')} with {one.rows:,} inputs from layer {one.source!r}"
        for one in estimate.classes
        if one.extrapolated
    ]
    solved = len({one.source for one in estimate.classes})
    if not told:
        return f"layers: all {solved} were solved"
    return f"layers: {solved} solved; extrapolated {listed(told)}"


def between(low: float, high: float | None) -> str:
    """Return a range of seconds; one without an end says so."""
    return f"{_seconds(low)} to {_seconds(high)}" if high is not None else f"{_seconds(low)} and up"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def comparison_line(found: Mapping[str, Any]) -> str:
    """Say how far off an estimate was, of what `EstimateDocument.against` returned."""
    seconds, estimated = found["seconds"], found["estimated_seconds"]
    line = f"estimated {_seconds(estimated)} s, took {_seconds(seconds)} s"
    if seconds > 0:
        line += f" ({estimated / seconds:.2f} of it)"
    peak, told = found["peak_bytes"], found["estimated_peak_bytes"]
    if peak:
        line += f"; estimated {in_bytes(told)} of memory, had {in_bytes(peak)} ({told / peak:.2f})"
    return line
