"""What results show of themselves: text for a terminal, and a part of a page for a notebook."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from osscar.report import prune_page, recovery, sweep_page
from osscar.report.evaluation_tables import comparison_table, evaluation_table
from osscar.report.gap_tables import cases_table, overview_table, scores_table
from osscar.report.page import Part, render
from osscar.report.run_tables import estimate_table, sizes_line, solved_line
from osscar.report.summary import Summary

_WIDTH = 140
"""Columns of a text: as many as the commands write where there is no terminal."""


def _of_study(summary: Summary) -> Iterator[Part]:
    yield summary.answer
    yield overview_table(summary)
    yield cases_table(summary.layers)
    yield scores_table(summary)
    yield from summary.headline


_PARTS: dict[str, Callable[[Any], Iterator[Part]]] = {
    "PruningResult": lambda result: prune_page.parts(result.record()),
    "Recovery": lambda result: recovery.parts(result.document()),
    "SweepResult": sweep_page.parts,
    "Summary": _of_study,
    "Evaluation": lambda result: iter([evaluation_table(result, "model")]),
    "Comparison": lambda result: iter([comparison_table(result)]),
    "Estimate": lambda it: iter([estimate_table(it), solved_line(it), sizes_line(it)]),
}
"""By the name of a class: some lie in rooms above, and all that is read is what they hold."""


def summary(result: Any) -> str:
    """Return what a result shows as text."""
    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None)
    for part in _PARTS[type(result).__name__](result):
        if isinstance(part, str | Table):
            console.print(part, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def fragment(result: Any) -> str:
    """Return what a result shows as HTML that may stand among other things."""
    return render("shown.html.j2", parts=list(_PARTS[type(result).__name__](result)))
