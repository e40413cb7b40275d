"""What an optimality-gap study shows: tables, plots, and the page in its directory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osscar.base.files import atomic_write, write_text
from osscar.base.printable import decimals, percent, share
from osscar.base.shown import columns
from osscar.report.figures import color, from_zero, legend, new_figure, shares
from osscar.report.html import page
from osscar.report.sections import (
    Figure,
    Section,
    Table,
    Text,
    facts,
    settings,
    settings_table,
    stages_table,
    table,
)
from osscar.report.summary import HIT, Case, Summary
from osscar.study.design import SPARSITIES
from osscar.study.records import WINDOW, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

    from osscar.study.design import StudyDesign
    from osscar.study.directory import Study

REPORT_FILE = "report.html"
_COLUMNS = 4
"""Panels of a plot beside each other."""

_LONGEST_NAME = 40
_SHORTEST = 1e-3
"""Seconds below which times are not told apart."""


def write_report(
    study: Study,
    design: StudyDesign,
    records: Sequence[Record],
    summary: Summary,
    *,
    jobs: int = 1,
    stages: Mapping[str, float] | None = None,
) -> Path:
    """Write the page into the study's directory, and each plot as NAME.svg; return its path.

    Parameters
    ----------
    study, design, records, summary
        What was asked, and what came of it.
    jobs
        Processes that solved at once, which the times depend on.
    stages
        Seconds of this run by stage, where they are known.

    Raises
    ------
    OutputError
        If something cannot be written.
    """
    source = dict(study.source)
    removed = ", ".join(map(share, SPARSITIES))
    if "problems" in source:
        source["problems"] = [one["file"] for one in source["problems"]]
        removed = f"as each problem says, or {removed}"
    shown = [
        *sections(summary),
        stages_table(stages or {}, "Where the time of this run went"),
        table(
            "Every solve",
            {**columns(Record), "command": lambda row: row["command"]},
            ({**vars(record), "command": record.command} for record in records),
            note="The command solves it again in the directory of the study; results.csv has the "
            "same records with the units that stay.",
            folded=True,
        ),
        settings_table(
            settings({**source, "processes at once": jobs}),
            settings(asdict(design), type(design), chosen={"sparsities": removed}),
        ),
    ]
    for section in shown:
        if isinstance(section, Figure):
            with atomic_write(study.directory / f"{section.name}.svg") as file:
                file.write_bytes(section.svg)
    path = study.directory / REPORT_FILE
    write_text(path, page("How far from optimal?", shown))
    return path


def sections(summary: Summary) -> Iterator[Section]:
    """Yield what a study shows of itself."""
    yield Text((summary.answer,), look="answer")
    yield overview_table(summary)
    yield facts("What else was found", summary.facts())
    gaps = [case for case in summary.layers if case.gap is not None]
    if any(not case.closed or (case.root_gap or 0.0) > HIT for case in gaps):
        yield Figure(
            "gaps",
            "The gap between the loss of each answer and the best lower bound, as a share of the "
            "loss. Filled: what remains; outline: with the root bound alone. An answer without a "
            "filled bar is proved optimal.",
            partial(_gaps, gaps),
            wide=len(gaps) > 16,
        )
    if summary.layers:
        yield Figure(
            "curves",
            "Loss of the best answer, and the lower bound that no choice of units can beat, "
            "relative to the loss of removing everything. The optimum lies in the shaded band.",
            partial(_curves, summary.layers),
            wide=len({case.best.instance for case in summary.layers}) > 2,
        )
    ratios = _ratios(summary.layers)
    if len(summary.layers) > 1 and len(ratios) > 1:
        yield Figure(
            "profiles",
            "Performance profiles: the share of all problems on which a backend found the best "
            "loss of this study within so many times the seconds of the fastest that did.",
            partial(_profiles, ratios, len(summary.layers)),
        )
    yield scores_table(summary)
    yield cases_table(summary.layers)
    yield cases_table(summary.windows, "Windows")


# ---- tables ------------------------------------------------------------------------------


def overview_table(summary: Summary) -> Table:
    """Return one row for each kind of units and share removed; windows come last."""
    kinds = dict.fromkeys(case.best.kind for case in summary.cases)
    rows = []
    for kind in sorted(kinds, key=lambda kind: kind == WINDOW):
        mine = [case for case in summary.cases if case.best.kind == kind]
        for sparsity in sorted({one for case in mine for one in case.sparsities}):
            cases = [case for case in mine if sparsity in case.sparsities]
            closed = [case.seconds for case in cases if case.closed]
            gaps = [case.gap for case in cases if not case.closed and case.gap is not None]
            rows.append(
                (
                    *(kind, share(sparsity), str(len(cases)), str(len(closed))),
                    percent(statistics.median(gaps)) if gaps else "",
                    percent(max(gaps, default=None)),
                    f"{max(closed):.2g}" if closed else "",
                )
            )
    columns = ("units", "removed >", "problems >", "proved optimal >", "median gap of others >")
    return Table(
        "Overview",
        (*columns, "widest gap >", "slowest proof, s >"),
        tuple(rows),
        note="Losses are relative to the loss of removing every unit, and recomputed in float64 "
        "from each problem alone.",
    )


def cases_table(cases: Sequence[Case], title: str = "Best answers") -> Table:
    """Return one row for each problem and number of kept units."""
    windows = (
        "The units of a window are chosen anew and exactly, while the others of its layer stay as "
        "local_search left them. A window that cannot be improved is no bound on the layer."
    )
    return table(
        title,
        {
            "problem": lambda case: case.best.instance,
            "removed >": lambda case: ", ".join(map(share, case.sparsities)),
            "kept >": lambda case: f"{case.best.keep} of {case.best.units}",
            "loss >": lambda case: decimals(case.best.relative_loss),
            "bound >": lambda case: decimals(case.relative_bound),
            "gap >": lambda case: percent(case.gap),
            "root gap >": lambda case: percent(case.root_gap),
            "limit >": lambda case: (
                "none known" if case.limit_gap == 0 else percent(case.limit_gap)
            ),
            "found by": lambda case: case.best.backend,
            "proof": lambda case: case.proof,
            "why open": lambda case: case.why_open,
        },
        cases,
        note=(windows if title == "Windows" else LIMIT),
        folded=title == "Windows",
    )


LIMIT = (
    "Limit: the gap that every root bound leaves, however long it is searched for. Proof: what the "
    "optimum, or the bound of what is open, rests on: recomputed from the problem and a "
    "certificate alone, the solver's word where it gives none, or as recorded where that was in an "
    "earlier run."
)


def scores_table(summary: Summary) -> Table:
    """Return one row for each backend and kind of problems whose optimum is known."""
    pairs: dict[tuple[str, str], list[tuple[Record, Case]]] = {}
    for case in summary.closed:
        for record in case.answers:
            pairs.setdefault((record.backend, record.kind), []).append((record, case))

    def excess(row: Any) -> list[float]:
        return [max(0.0, case.excess(record)) for record, case in row[1]]

    def hits(row: Any) -> str:
        count = sum(value <= HIT for value in excess(row))
        return f"{count} ({count / len(row[1]):.0%})"

    return table(
        "Backends on problems with a proven optimum",
        {
            "backend": lambda row: row[0][0],
            "problems": lambda row: row[0][1],
            "solved >": lambda row: str(len(row[1])),
            "optimal >": hits,
            "mean excess >": lambda row: percent(statistics.fmean(excess(row)), 3),
            "worst >": lambda row: percent(max(excess(row))),
            "median seconds >": lambda row: decimals(
                statistics.median(record.seconds or 0.0 for record, _ in row[1]), 3
            ),
        },
        pairs.items(),
    )


# ---- plots -------------------------------------------------------------------------------


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _curves(layers: Sequence[Case]) -> Drawing:
    """Draw loss and bound over the share removed, a panel for each problem."""
    panels: dict[str, list[tuple[float, Case]]] = {}
    for case in layers:
        points = panels.setdefault(case.best.instance, [])
        points += [(sparsity, case) for sparsity in case.sparsities]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(4.4, 2.4 * columns), 1.7 * rows + 0.9
    figure, grid = new_figure(rows, columns, width=width, height=height, sharex=True)
    for axes, (name, points) in zip(grid, panels.items(), strict=False):
        _curve(axes, sorted(points, key=lambda point: point[0]))
        axes.set_title(_short(name), fontsize=6.5, loc="left", parse_math=False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    legend(figure)
    figure.supxlabel("share of units removed", fontsize=9)
    figure.supylabel("relative loss", fontsize=9)
    return figure


def _curve(axes: Axes, points: Sequence[tuple[float, Case]]) -> None:
    x, loss = zip(*((at, case.best.relative_loss or 0.0) for at, case in points), strict=True)
    axes.plot(x, loss, "o-", color=color(0), markersize=3, linewidth=1, label="best loss")
    bounded = [
        (at, case.relative_bound, high)
        for (at, case), high in zip(points, loss, strict=True)
        if case.relative_bound is not None
    ]
    if bounded:
        at, low, high = zip(*bounded, strict=True)
        # Hollow and larger, so that a loss that meets its bound is still seen.
        axes.plot(at, low, "s--", color=color(1), markersize=5, markerfacecolor="none", linewidth=1,
                  label="lower bound")  # fmt: skip
        axes.vlines(at, low, high, color=color(1), alpha=0.2, linewidth=4)
        axes.fill_between(at, low, high, color=color(1), alpha=0.2, linewidth=0)
    from_zero(axes)
    axes.xaxis.set_major_formatter(shares)
    axes.tick_params(labelsize=7)


def _gaps(cases: Sequence[Case]) -> Drawing:
    """Draw the gap of each problem as bars, solid what is open, hollow what the root bound left."""
    names = list(dict.fromkeys(case.best.instance for case in cases))
    sparsities = sorted({sparsity for case in cases for sparsity in case.sparsities})
    step = 0.8 / len(sparsities)
    figure, (axes,) = new_figure(width=max(4.4, 0.26 * len(names) + 2), height=3.8)
    for index, sparsity in enumerate(sparsities):
        offset = (index - (len(sparsities) - 1) / 2) * step
        mine = [case for case in cases if sparsity in case.sparsities]
        x = [names.index(case.best.instance) + offset for case in mine]
        axes.bar(x, [case.root_gap or 0.0 for case in mine], step * 0.9, facecolor="none",
                 edgecolor=color(index), linewidth=0.7)  # fmt: skip
        axes.bar(x, [0.0 if case.closed else case.gap or 0.0 for case in mine], step * 0.9,
                 color=color(index), label=f"{share(sparsity)} removed")  # fmt: skip
    axes.set_xticks(range(len(names)), list(map(_short, names)), rotation=90, fontsize=7,
                    parse_math=False)  # fmt: skip
    axes.yaxis.set_major_formatter(shares)
    axes.set_ylabel("gap to the lower bound")
    axes.grid(axis="x", visible=False)
    legend(figure)
    return figure


def _ratios(cases: Sequence[Case]) -> dict[str, list[float]]:
    """Return by backend how many times the seconds of the fastest it took to each best loss."""
    ratios: dict[str, list[float]] = {r.backend: [] for case in cases for r in case.answers}
    for case in cases:
        hits = {r.backend: r.seconds or 0.0 for r in case.answers if case.excess(r) <= HIT}
        fastest = max(min(hits.values()), _SHORTEST)
        for backend, seconds in hits.items():
            ratios[backend].append(max(seconds / fastest, 1.0))
    return ratios


def _profiles(ratios: Mapping[str, Sequence[float]], count: int) -> Drawing:
    """Draw performance profiles (Dolan and More, 2002) of the time to the best loss."""
    widest = max([2.0, *(ratio for mine in ratios.values() for ratio in mine)])
    figure, (axes,) = new_figure(height=3.8)
    for index, (backend, mine) in enumerate(ratios.items()):
        share_done = [done / count for done in (*range(1, len(mine) + 1), len(mine))]
        axes.plot([*sorted(mine), widest], share_done, drawstyle="steps-post", linewidth=1.2,
                  color=color(index), label=backend)  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(shares)
    axes.set_xlabel("times the seconds of the fastest")
    axes.set_ylabel("best loss found")
    legend(figure)
    return figure
