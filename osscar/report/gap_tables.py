"""Tables of backends, and of the gaps that they leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from osscar.report.tables import new_table
from osscar.study.records import WINDOW

if TYPE_CHECKING:
    from osscar.report.summary import Summary
    from solvers import BackendInfo, Capabilities, SubsetProblem


def cases_table(summary: Summary) -> Table:
    """Return one row for each problem and number of kept units, windows left out."""
    table = new_table(
        "best answers", "problem", "kept >", "loss >", "bound >", "gap >", "found by", "proof"
    )
    for case in summary.cases:
        best = case.best
        if best.kind == WINDOW:
            continue
        bound = None if case.bound is None or not best.loss else case.bound / best.loss
        relative = best.relative_loss or 0.0
        table.add_row(
            best.instance,
            f"{best.keep} of {best.units}",
            f"{relative:.4f}",
            "" if bound is None else f"{max(0.0, bound) * relative:.4f}",
            "" if case.gap is None else f"{case.gap:.2%}",
            best.backend,
            case.proof,
        )
    return table


def scores_table(summary: Summary) -> Table:
    """Return one row for each backend that answered problems whose optimum is known."""
    table = new_table(
        "on problems with a proven optimum",
        *(
            "backend",
            "problems",
            "solved >",
            "optimal >",
            "mean excess >",
            "worst >",
            "median seconds >",
        ),
    )
    for score in summary.scores:
        table.add_row(
            score.backend,
            score.kind,
            str(score.cases),
            f"{score.hits} ({score.hits / score.cases:.0%})",
            f"{score.mean_excess:.3%}",
            f"{score.worst_excess:.2%}",
            f"{score.seconds:.3f}",
        )
    return table


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
