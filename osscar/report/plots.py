"""Plots of an optimality-gap study, as SVG and PNG."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import solvers
from osscar.base.files import atomic_write
from osscar.report.page import COLORS, STYLE
from osscar.report.prune_plots import ROOM_ABOVE, SHARES
from osscar.report.summary import HIT, Case, Summary, excess, is_exact
from osscar.report.tables import share
from osscar.study.records import WINDOW, Record
from solvers import Status

_COLUMNS = 6
_NARROW = 4.8
"""Inches: as wide as a phone shows it without being moved."""

_TICKS = 5
_LEGEND_ENTRY = 1.7
"""Inches that an entry of a legend takes."""

_LONGEST_NAME = 40
_FLOOR = 1e-7
"""Where excesses that count as zero are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Drawn:
    """An SVG file, and how wide it is in inches; a PNG lies beside it."""

    file: Path
    width: float


def draw_plots(summary: Summary, directory: Path) -> dict[str, Drawn]:
    """Draw what the study has data for.

    Parameters
    ----------
    summary
        The study.
    directory
        Where to; an SVG and a PNG of each plot.

    Returns
    -------
    dict
        What was drawn, by name: ``curves``, ``gaps``, ``ratios``, ``times``; those without data are
        left out.
    """
    layers = [case for case in summary.cases if case.best.kind != WINDOW]
    closed = [case for case in summary.cases if case.closed]
    written: dict[str, Drawn] = {}
    with matplotlib.rc_context(STYLE):
        figures = {
            "curves": _curves(layers) if layers else None,
            "gaps": _gaps([case for case in layers if case.gap is not None]),
            "ratios": _ratios(closed),
            "times": _times(summary.cases),
        }
        for name, figure in figures.items():
            if figure is not None:
                FigureCanvasAgg(figure)
                figure.draw_without_rendering()  # lays it out, once for both files
                figure.set_layout_engine(None)
                file = directory / f"{name}.svg"
                written[name] = Drawn(file, figure.get_figwidth())
                with atomic_write(file.with_suffix(".png")) as png:
                    figure.savefig(png, format="png", dpi=150)
                with atomic_write(file) as svg:
                    figure.savefig(svg, format="svg", metadata={"Date": None})
    return written


def short_name(name: str) -> str:
    """Return a group's name without what all models share: ``layers.3.mlp.neurons``."""
    short = re.sub(r"^(model|transformer|decoder|gpt_neox)\.(decoder\.|model\.)?", "", name)
    return short if len(short) <= _LONGEST_NAME else f"{short[: _LONGEST_NAME - 1]}…"


def _curves(layers: Sequence[Case]) -> Figure:
    """Draw loss and bound against sparsity, a panel a layer."""
    names = list(dict.fromkeys(case.best.instance for case in layers))
    columns = min(_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure, grid = _subplots(lines, columns, width=max(6.0, 2.1 * columns), height=1.75 * lines + 1)
    for axes, name in zip(grid, names, strict=False):
        points = sorted(
            ((s, c) for c in layers if c.best.instance == name for s in c.sparsities),
            key=lambda point: point[0],
        )
        with _panel(axes, short_name(name)):
            _curve(axes, points)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    shown: dict[str, Any] = {}  # the first layer need not have a bound
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, loc="outside upper left", ncols=len(shown), frameon=False)
    figure.supxlabel("share of units removed", fontsize=9)
    figure.supylabel("relative loss", fontsize=9)
    return figure


def _curve(axes: Axes, points: Sequence[tuple[float, Case]]) -> None:
    """Draw one layer's loss and bound, given with the sparsities that they belong to."""
    scales = [(c.best.relative_loss or 0.0) / c.loss if c.loss > 0 else 0.0 for _, c in points]
    x = [sparsity for sparsity, _ in points]
    loss = [case.loss * scale for (_, case), scale in zip(points, scales, strict=True)]
    axes.set_xticks(x[:: math.ceil(len(x) / _TICKS)])
    axes.plot(x, loss, "o-", color=COLORS[0], markersize=3, linewidth=1, label="best loss")
    bounded = [
        (sparsity, max(0.0, case.bound) * scale, case.loss * scale)
        for (sparsity, case), scale in zip(points, scales, strict=True)
        if case.bound is not None
    ]
    if bounded:
        at, low, high = zip(*bounded, strict=True)
        # Hollow and larger, so that a loss that meets its bound is still seen.
        axes.plot(
            at, low, "s--", color=COLORS[1], markersize=5, markerfacecolor="none", linewidth=1,
            label="lower bound",
        )  # fmt: skip
        axes.fill_between(at, low, high, color=COLORS[1], alpha=0.2, linewidth=0)
        if len(at) == 1:  # a band of no width
            axes.vlines(at, low, high, color=COLORS[1], alpha=0.2, linewidth=4)


def _gaps(cases: Sequence[Case]) -> Figure | None:
    """Draw the gap of each layer as bars, solid what is open and hollow what the root bound left.

    The hollow bar shows how far the root bound alone is from the answer.
    """
    if not cases:
        return None
    names = list(dict.fromkeys(case.best.instance for case in cases))
    sparsities = sorted({sparsity for case in cases for sparsity in case.sparsities})
    step = 0.8 / len(sparsities)
    width = max(_NARROW, 0.26 * len(names) + 2)
    figure, (axes,) = _subplots(1, 1, width=width, height=3.8)
    for index, sparsity in enumerate(sparsities):
        mine = {c.best.instance: c for c in cases if sparsity in c.sparsities}
        x = [i + (index - (len(sparsities) - 1) / 2) * step for i in range(len(names))]
        color = COLORS[index % len(COLORS)]
        root = [_or_zero(mine[n].root_gap) if n in mine else 0.0 for n in names]
        left = [_or_zero(mine[n].gap) if n in mine else 0.0 for n in names]
        axes.bar(x, root, step * 0.9, facecolor="none", edgecolor=color, linewidth=0.7)
        axes.bar(x, left, step * 0.9, color=color, label=f"{share(sparsity)} removed")
    axes.set_xticks(
        range(len(names)), [short_name(n) for n in names], rotation=90, fontsize=7, parse_math=False
    )
    axes.yaxis.set_major_formatter(SHARES)
    axes.set_ylabel("gap to the lower bound")
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.01)
    figure.legend(
        title="filled: what remains; outline: with the root bound alone",
        loc="outside upper left", ncols=min(len(sparsities), int(width / _LEGEND_ENTRY)),
        frameon=False, alignment="left",
    )  # fmt: skip
    return figure


def _ratios(closed: Sequence[Case]) -> Figure | None:
    """Draw how far each heuristic lies above the proven optimum, a dot a problem."""
    names = list(
        dict.fromkeys(
            record.backend
            for case in closed
            for record in case.records
            if solvers.backend_class(record.backend).kind is solvers.BackendKind.HEURISTIC
        )
    )
    if not names:
        return None
    figure, (axes,) = _subplots(1, 1, width=_NARROW, height=0.45 * len(names) + 1.6)
    for line, name in enumerate(names):
        over = sorted(
            excess(record, case)
            for case in closed
            for record in case.records
            if record.backend == name
        )
        hits = sum(value <= HIT for value in over)
        spread = [line + 0.6 * ((0.5 + i * 0.618034) % 1 - 0.5) for i in range(len(over))]
        axes.scatter(
            [value if value > HIT else _FLOOR for value in over], spread,
            s=9, alpha=0.5, linewidth=0, color=COLORS[line % len(COLORS)],
        )  # fmt: skip
        axes.annotate(
            f"optimal: {hits} of {len(over)}", (1.01, line), xycoords=("axes fraction", "data"),
            fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(_FLOOR / 2, None)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(
        f"loss above the proven optimum, relative to it\n(at the left edge: below {HIT:g})"
    )
    return figure


def _times(cases: Sequence[Case]) -> Figure | None:
    """Draw the time of exact solves against the number of units, hollow where not closed."""
    records = [
        record for case in cases for record in case.records if is_exact(record) and record.seconds
    ]
    if not records:
        return None
    figure, (axes,) = _subplots(1, 1, width=_NARROW, height=3.4)
    sizes = sorted({record.units for record in records})
    names = list(dict.fromkeys(record.backend for record in records))
    spread = _spread(sizes)
    for index, name in enumerate(names):
        color = COLORS[index % len(COLORS)]
        mine = [record for record in records if record.backend == name]
        closed = [record for record in mine if record.status == Status.OPTIMAL.name]
        others = [record for record in mine if record.status != Status.OPTIMAL.name]
        # Side by side, so that none hides another, and close to where they belong.
        shift = spread ** ((index - (len(names) - 1) / 2) / max(len(names) - 1, 1))
        axes.scatter(*_points(closed, shift), s=16, color=color, alpha=0.7, linewidth=0, label=name)
        axes.scatter(
            *_points(others, shift), s=20, facecolor="none", edgecolor=color, linewidth=0.8
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator())
    axes.set_xlabel("units (filled: proved optimal, hollow: stopped before)")
    axes.set_ylabel("seconds")
    figure.legend(loc="outside upper left", ncols=min(len(names), 3), frameon=False)
    return figure


def _spread(sizes: Sequence[int]) -> float:
    """Return the ratio between the last and the first of points that all stand for one size."""
    apart = min((b / a for a, b in itertools.pairwise(sizes)), default=math.inf)
    return min(1.06, float(apart**0.4))


def _points(records: Sequence[Record], shift: float) -> tuple[list[float], list[float]]:
    return [record.units * shift for record in records], [
        record.seconds or 0.0 for record in records
    ]


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value


def _subplots(
    lines: int, columns: int, *, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    return figure, list(grid.flat)


@contextmanager
def _panel(axes: Axes, title: str) -> Iterator[None]:
    """Set up a small panel; what is drawn in it decides the range of its axis."""
    yield
    axes.set_title(title, fontsize=7, loc="left", parse_math=False)
    # From zero, with room above: markers of a flat curve would be cut in half.
    top = axes.dataLim.ymax
    axes.set_ylim(0, ROOM_ABOVE * top if top > 0 else 1)
    axes.tick_params(labelsize=6)
    axes.xaxis.set_major_formatter(SHARES)
