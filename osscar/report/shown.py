"""What results show of themselves: text for a terminal, and a part of a page for a notebook."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console

from osscar.report import gap_page, html, prune_page, recovery, sweep_page
from osscar.report.evaluation_tables import comparison_table, evaluation_table
from osscar.report.run_tables import estimate_tables
from osscar.report.sections import Section
from osscar.report.terminal import print_section

_SECTIONS: dict[str, Callable[[Any], Iterable[Section]]] = {
    "PruningResult": lambda result: prune_page.sections(result.record()),
    "Recovery": lambda result: recovery.sections(result.document()),
    "SweepResult": sweep_page.sections,
    "Summary": gap_page.sections,
    "Evaluation": lambda result: [evaluation_table(result, "model")],
    "Comparison": lambda result: [comparison_table(result)],
    "Estimate": estimate_tables,
}
"""By the name of a class: some lie in rooms above, and all that is read is what they hold."""


def summary(result: Any) -> str:
    """Return what a result shows as text, in lines as wide as commands write to files."""
    file = io.StringIO()
    console = Console(file=file, width=140, color_system=None)
    for section in _SECTIONS[type(result).__name__](result):
        print_section(console, section)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def fragment(result: Any) -> str:
    """Return what a result shows as HTML that may stand among other things."""
    return html.page("", _SECTIONS[type(result).__name__](result))
