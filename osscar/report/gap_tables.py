"""Tables of optimality gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from osscar.report.tables import new_table
from osscar.study.records import WINDOW

if TYPE_CHECKING:
    from osscar.report.summary import Summary


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
