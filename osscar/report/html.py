"""One self-contained page that a person reads from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osscar.base.files import write_text
from osscar.report.page import Picture, asked_rows, render
from osscar.report.plots import draw_plots
from osscar.report.summary import Case, Summary
from osscar.report.tables import share
from osscar.study.records import WINDOW, Record

if TYPE_CHECKING:
    from osscar.study.design import StudyDesign
    from osscar.study.directory import Study

REPORT_FILE = "report.html"

_CAPTIONS = {
    "gaps": "How far each answer can be from the optimum: the gap between its loss and the best "
    "lower bound, as a share of the loss. An answer without a filled bar is proved optimal.",
    "curves": "Loss of the best answer, and the lower bound that no choice of units can beat, "
    "against the share of units removed. Both are relative to the loss of removing everything. The "
    "true optimum lies in the shaded band.",
    "ratios": "What heuristics lose against proven optima, one dot a problem.",
    "times": "Wall time of exact solves.",
}


def write_report(
    study: Study, design: StudyDesign, records: Sequence[Record], summary: Summary, *, jobs: int = 1
) -> Path:
    """Draw the plots and write the page into the study's directory.

    Parameters
    ----------
    study, design, records, summary
        What was asked, and what came of it.
    jobs
        Processes that solved at once, which the times depend on.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    OutputError
        If something cannot be written.
    """
    page = study.directory / REPORT_FILE
    plots = draw_plots(summary, study.directory)
    figures = [
        Picture.read(name, caption, plots[name].file, plots[name].width)
        for name, caption in _CAPTIONS.items()
        if name in plots
    ]
    layers = [case for case in summary.cases if case.best.kind != WINDOW]
    text = render(
        "gap.html.j2",
        asked=_asked(study, design, jobs),
        summary=summary,
        figures=figures,
        layers=[(case, _relative_bound(case)) for case in layers],
        windows=[
            (case, _relative_bound(case)) for case in summary.cases if case.best.kind == WINDOW
        ],
        records=records,
    )
    write_text(page, text)
    return page


def _asked(study: Study, design: StudyDesign, jobs: int) -> dict[str, str]:
    asked: dict[str, Any] = dict(study.source)
    files = _file_names(asked.get("problems"))
    if files:
        del asked["problems"]
        asked["problem files"] = ", ".join(files)
    asked["share of units removed"] = ", ".join(map(share, design.sparsities))
    asked["backends"] = ", ".join(design.backends)
    asked["exact backends on"] = f"problems of at most {design.exact_units} units"
    asked["limits"] = (
        f"{design.time_limit:g} s for an exact solve, or a gap of {design.gap_tolerance:g}"
    )
    if design.window_units is not None:
        asked["windows"] = (
            f"{design.windows} of {design.window_units} units for each larger problem and "
            "sparsity, the other units held as local_search left them"
        )
    asked["processes at once"] = str(jobs)
    return asked_rows(asked)


def _file_names(problems: object) -> list[str]:
    """Return the names of problem files, if that is what a source holds."""
    entries = problems if isinstance(problems, list) else []
    return [str(e["file"]) for e in entries if isinstance(e, Mapping) and "file" in e]


def _relative_bound(case: Case) -> float | None:
    if case.bound is None or case.loss <= 0:
        return None
    return max(0.0, case.bound) / case.loss * (case.best.relative_loss or 0.0)
