"""Tables of what can solve a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from osscar.report.tables import new_table

if TYPE_CHECKING:
    from solvers import BackendInfo, Capabilities, SubsetProblem


def backends_table(infos: Sequence[BackendInfo]) -> Table:
    """Return one row for each registered backend."""
    table = new_table("", "backend", "kind", "takes", "options", "what it does", "available")
    for info in infos:
        options = ", ".join(f"{key}={value}" for key, value in info.options.items())
        available = Text("yes", style="green") if info.unavailable is None else info.unavailable
        table.add_row(
            info.name, info.kind, _takes(info.capabilities), options, info.summary, available
        )
    return table


def _takes(capabilities: Capabilities) -> str:
    limits = [
        "" if capabilities.wide_units else "units of one row",
        "" if capabilities.several_consumers else "one consumer",
        f"up to {capabilities.max_units} units" if capabilities.max_units is not None else "",
        "" if "cuda" in capabilities.devices else "CPU only",
    ]
    return ", ".join(limit for limit in limits if limit) or "everything"


def takers_table(infos: Sequence[BackendInfo], problem: SubsetProblem) -> Table:
    """Return one row for each backend: whether it takes this problem, and if not why."""
    table = new_table("", "backend", "kind", "takes this problem")
    for info in infos:
        refusal = info.unavailable or info.capabilities.refusal(problem)
        table.add_row(info.name, info.kind, "yes" if refusal is None else refusal)
    return table
