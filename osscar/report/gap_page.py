"""The page of an optimality-gap study, written beside its plots."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osscar.base.files import write_text
from osscar.base.numbers import share
from osscar.report.gap_tables import (
    cases_table,
    open_table,
    overview_table,
    records_table,
    refused_table,
    scores_table,
)
from osscar.report.names import common_prefix, without_prefix
from osscar.report.page import Settings, render
from osscar.report.plots import draw_plots
from osscar.report.stages import stages_table
from osscar.report.summary import Summary
from osscar.report.tables import LIMIT_IN_WORDS
from osscar.study.design import SPARSITIES
from osscar.study.records import Record

if TYPE_CHECKING:
    from osscar.study.design import StudyDesign
    from osscar.study.directory import Study

REPORT_FILE = "report.html"
_NARROW = 600
"""Pixels: pictures that are wider have a line of their own."""


def write_report(
    study: Study,
    design: StudyDesign,
    records: Sequence[Record],
    summary: Summary,
    *,
    jobs: int = 1,
    stages: Mapping[str, float] | None = None,
    usual: Collection[str] = (),
) -> Path:
    """Draw the plots and write the page into the study's directory; return where it lies.

    Parameters
    ----------
    study, design, records, summary
        What was asked, and what came of it.
    jobs
        Processes that solved at once, which the times depend on.
    stages
        Seconds of this run by stage, where they are known.
    usual
        Entries of the study's source, and perhaps ``jobs``, that nobody has asked for.

    Raises
    ------
    OutputError
        If something cannot be written.
    """
    prefix = common_prefix([case.best.instance for case in summary.layers])
    text = render(
        "gap.html.j2",
        summary=summary,
        pictures=draw_plots(summary, study.directory),
        overviews=overview_table(summary),
        limit_in_words=LIMIT_IN_WORDS,
        layers=cases_table(summary.layers, prefix),
        windows=cases_table(summary.windows, prefix),
        names=without_prefix(prefix),
        narrow=_NARROW,
        stages=stages_table(stages or {}),
        scores=scores_table(summary),
        still_open=open_table(summary.still_open, prefix),
        refused=refused_table(summary.refused, prefix),
        records=records_table(records, prefix),
        settings=_settings(study, design, jobs, usual),
    )
    write_text(study.directory / REPORT_FILE, text)
    return study.directory / REPORT_FILE


def _settings(study: Study, design: StudyDesign, jobs: int, usual: Collection[str]) -> Settings:
    source, default = dict(study.source), type(design)()
    if "problems" in source:
        source["problems"] = [one["file"] for one in source["problems"]]
    asked = {name: value for name, value in source.items() if name not in usual}
    found = Settings(asked, {name: value for name, value in source.items() if name in usual})
    processes = {"processes at once": jobs}
    found |= Settings(default=processes) if "jobs" in usual else Settings(processes)
    said: dict[str, tuple[str, Any]] = {
        "sparsities": (
            "share of units removed",
            [share(one) for one in design.sparsities or SPARSITIES]
            if design.sparsities or "problems" not in study.source
            else "as each problem says, or 25%, 50% and 75%",
        ),
        "backends": ("backends", list(design.backends)),
        "exact_units": ("exact backends on", f"problems of at most {design.exact_units} units"),
        "time_limit": ("limit of an exact solve", f"{design.time_limit:g} s"),
        "gap_tolerance": ("an exact solve ends at", f"a gap of {design.gap_tolerance:g}"),
        "window_units": (
            "windows",
            f"{design.windows} of {design.window_units} units for each larger problem and "
            "sparsity, the other units held as local_search left them"
            if design.window_units is not None
            else None,
        ),
    }
    for field, (name, value) in said.items():
        is_usual = getattr(design, field) == getattr(default, field)
        found |= Settings(default={name: value}) if is_usual else Settings({name: value})
    return found
