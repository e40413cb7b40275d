"""Plots of an optimality-gap study, as SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import solvers
from osscar.base.files import atomic_write
from osscar.base.numbers import share
from osscar.report.figures import COLORS, ROOM_ABOVE, SHARES, STYLE, picture, svg_of
from osscar.report.names import common_prefix
from osscar.report.summary import HIT, Case, Summary

_COLUMNS = 6
_NARROW = 4.8
"""Inches: as wide as a phone shows it without being moved."""

_TICKS = 5
_LEGEND_ENTRY = 1.7
"""Inches that an entry of a legend takes."""

_LONGEST_NAME = 40
_SHORTEST = 1e-3
"""Seconds below which times are not told apart."""

_FLOOR = 1e-7
"""Where excesses that count as zero are drawn on a logarithmic axis."""


_CAPTIONS = {
    "gaps": "How far each answer can be from the optimum: the gap between its loss and the best "
    "lower bound, as a share of the loss. An answer without a filled bar is proved optimal.",
    "curves": "Loss of the best answer, and the lower bound that no choice of units can beat, "
    "against the share of units removed. Both are relative to the loss of removing everything. The "
    "true optimum lies in the shaded band. Panels of one kind of units share their scale.",
    "profiles": "Performance profiles: the share of all problems on which a backend found the best "
    "loss of this study within so many times the seconds of the fastest that did.",
    "ratios": "What heuristics lose against proven optima, one dot a problem.",
}


def draw_plots(summary: Summary, directory: Path) -> list[dict[str, object]]:
    """Draw what a study has data for, as NAME.svg and NAME.png; return the pictures for its page.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    drawn: list[dict[str, object]] = []
    with matplotlib.rc_context(STYLE):
        figures = {
            "gaps": _gaps([case for case in summary.layers if case.gap is not None]),
            "curves": _curves(summary.layers),
            "ratios": _ratios(summary.closed),
            "profiles": _profiles(summary.layers),
        }
        for name, figure in figures.items():
            if figure is not None:
                FigureCanvasAgg(figure)
                figure.draw_without_rendering()  # lays it out, once for both files
                figure.set_layout_engine(None)
                with atomic_write(directory / f"{name}.png") as png:
                    figure.savefig(png, format="png", dpi=150)
                svg = svg_of(figure)
                with atomic_write(directory / f"{name}.svg") as file:
                    file.write_bytes(svg)
                drawn.append(picture(name, _CAPTIONS[name], figure, svg))
    return drawn


def _short_names(cases: Sequence[Case]) -> dict[str, str]:
    """Return how the problems of cases are called in a plot: without what all names begin with."""
    names = list(dict.fromkeys(case.best.instance for case in cases))
    prefix = common_prefix(names)
    short = {name: name.removeprefix(prefix) for name in names}
    return {
        name: text if len(text) <= _LONGEST_NAME else f"…{text[1 - _LONGEST_NAME :]}"
        for name, text in short.items()
    }


def _curves(layers: Sequence[Case]) -> Figure | None:
    """Draw loss and bound against sparsity, a panel a layer, those of a kind on one scale."""
    if not layers:
        return None
    kinds: dict[str, dict[str, list[tuple[float, Case]]]] = {}
    for case in layers:
        mine = kinds.setdefault(case.best.kind, {}).setdefault(case.best.instance, [])
        mine += [(sparsity, case) for sparsity in case.sparsities]
    if max(len(points) for panels in kinds.values() for points in panels.values()) == 1:
        return _levels(layers)
    columns = _even_columns([len(panels) for panels in kinds.values()])
    lines = sum(math.ceil(len(panels) / columns) for panels in kinds.values())
    width = max(_NARROW, 1.9 * columns + 0.6)
    figure, grid = _subplots(lines, columns, width=width, height=1.6 * lines + 0.9)
    short, begin = _short_names(layers), 0
    for panels in kinds.values():
        room = columns * math.ceil(len(panels) / columns)
        for axes, (name, points) in zip(grid[begin : begin + room], panels.items(), strict=False):
            _curve(axes, sorted(points, key=lambda point: point[0]))
            axes.set_title(short[name], fontsize=7, loc="left", parse_math=False)
        _share_scale(grid[begin : begin + len(panels)], columns)
        for axes in grid[begin + len(panels) : begin + room]:
            axes.set_visible(False)
        begin += room
    _legend(figure, grid)
    figure.supxlabel("share of units removed", fontsize=9)
    figure.supylabel("relative loss", fontsize=9)
    return figure


def _even_columns(counts: Sequence[int]) -> int:
    """Return into how many columns panels break most evenly, each kind in lines of its own."""
    if max(counts) <= _COLUMNS:
        return max(counts)
    choices = range(_COLUMNS, _COLUMNS // 2, -1)
    return min(choices, key=lambda columns: sum(-count % columns for count in counts))


def _share_scale(panels: Sequence[Axes], columns: int) -> None:
    """Give panels that are compared the same scale, told once a line."""
    highest = max(axes.get_ylim()[1] for axes in panels)
    for place, axes in enumerate(panels):
        axes.set_ylim(0, highest)
        axes.tick_params(labelleft=place % columns == 0)


def _levels(layers: Sequence[Case]) -> Figure:
    """Draw loss and bound of each layer, where there is one share of units removed."""
    kinds = list(dict.fromkeys(case.best.kind for case in layers))
    short = _short_names(layers)
    width = max(_NARROW, 0.26 * len(layers) + 1.2 * len(kinds))
    figure, grid = _subplots(1, len(kinds), width=width, height=3.8)
    for axes, kind in zip(grid, kinds, strict=True):
        mine = [case for case in layers if case.best.kind == kind]
        _draw_levels(axes, list(range(len(mine))), mine)
        names = [short[case.best.instance] for case in mine]
        axes.set_xticks(range(len(mine)), names, rotation=90, fontsize=7, parse_math=False)
        axes.margins(x=0.3 / len(mine))
    grid[0].set_ylabel("relative loss")
    _legend(figure, grid)
    return figure


def _legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """Put one legend above, of what any of the panels shows."""
    shown: dict[str, Any] = {}  # the first layer need not have a bound
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, loc="outside upper left", ncols=len(shown), frameon=False)


def _curve(axes: Axes, points: Sequence[tuple[float, Case]]) -> None:
    """Draw one layer's loss and bound, given with the sparsities that they belong to."""
    x = [sparsity for sparsity, _ in points]
    _draw_levels(axes, x, [case for _, case in points], line="-")
    axes.set_xticks(x[:: math.ceil(len(x) / _TICKS)])
    axes.tick_params(labelsize=6)
    axes.xaxis.set_major_formatter(SHARES)


def _draw_levels(axes: Axes, x: Sequence[float], cases: Sequence[Case], line: str = "") -> None:
    """Draw loss and bound of cases, and what lies between them."""
    loss = [case.best.relative_loss or 0.0 for case in cases]
    look: dict[str, Any] = {"markersize": 3, "linewidth": 1, "label": "best loss"}
    axes.plot(x, loss, f"o{line}", color=COLORS[0], **look)
    bounds = [case.relative_bound for case in cases]
    bounded = [b for b in zip(x, bounds, loss, strict=True) if b[1] is not None]
    if bounded:
        at, low, high = zip(*bounded, strict=True)
        # Hollow and larger, so that a loss that meets its bound is still seen.
        axes.plot(
            at, low, f"s{line and '--'}", color=COLORS[1], markersize=5, markerfacecolor="none",
            linewidth=1, label="lower bound",
        )  # fmt: skip
        if line and len(at) > 1:
            axes.fill_between(at, low, high, color=COLORS[1], alpha=0.2, linewidth=0)
        else:  # a band of no width
            axes.vlines(at, low, high, color=COLORS[1], alpha=0.2, linewidth=4)
    # From zero, with room above: markers of a flat curve would be cut in half.
    top = axes.dataLim.ymax
    axes.set_ylim(0, ROOM_ABOVE * top if top > 0 else 1)


def _gaps(cases: Sequence[Case]) -> Figure | None:
    """Draw the gap of each layer as bars, solid what is open and hollow what the root bound left.

    The hollow bar shows how far the root bound alone is from the answer.
    """
    if not cases:
        return None
    short = _short_names(cases)
    names = list(short)
    sparsities = sorted({sparsity for case in cases for sparsity in case.sparsities})
    step = 0.8 / len(sparsities)
    width = max(_NARROW, 0.26 * len(names) + 2)
    figure, (axes,) = _subplots(1, 1, width=width, height=3.8)
    for index, sparsity in enumerate(sparsities):
        mine = {c.best.instance: c for c in cases if sparsity in c.sparsities}
        x = [i + (index - (len(sparsities) - 1) / 2) * step for i in range(len(names))]
        color = COLORS[index % len(COLORS)]
        root = [(mine[n].root_gap or 0.0) if n in mine else 0.0 for n in names]
        left = [(mine[n].gap or 0.0) if n in mine else 0.0 for n in names]
        axes.bar(x, root, step * 0.9, facecolor="none", edgecolor=color, linewidth=0.7)
        axes.bar(x, left, step * 0.9, color=color, label=f"{share(sparsity)} removed")
    axes.set_xticks(
        range(len(names)),
        list(short.values()),
        rotation=90,
        fontsize=7,
        parse_math=False,
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
            for record in case.answers
            if solvers.backend_class(record.backend).kind is solvers.BackendKind.HEURISTIC
        )
    )
    if not names:
        return None
    figure, (axes,) = _subplots(1, 1, width=_NARROW, height=0.45 * len(names) + 1.6)
    for line, name in enumerate(names):
        over = sorted(
            case.excess(record)
            for case in closed
            for record in case.answers
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


def _profiles(cases: Sequence[Case]) -> Figure | None:
    """Draw performance profiles (Dolan and More, 2002) of the time to the best loss."""
    ratios: dict[str, list[float]] = {r.backend: [] for case in cases for r in case.answers}
    if len(cases) < 2 or len(ratios) < 2:
        return None
    for case in cases:
        hits = {r.backend: r.seconds or 0.0 for r in case.answers if case.excess(r) <= HIT}
        fastest = max(min(hits.values()), _SHORTEST)
        for backend, seconds in hits.items():
            ratios[backend].append(max(seconds / fastest, 1.0))
    widest = max([2.0, *(ratio for mine in ratios.values() for ratio in mine)])
    figure, (axes,) = _subplots(1, 1, width=_NARROW, height=3.8)
    for index, (backend, mine) in enumerate(ratios.items()):
        x = [*sorted(mine), widest]
        y = [(i + 1) / len(cases) for i in range(len(mine))] + [len(mine) / len(cases)]
        look: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 1.2, "label": backend}
        axes.plot(x, y, color=COLORS[index % len(COLORS)], **look)
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(SHARES)
    axes.set_xlabel("times the seconds of the fastest")
    axes.set_ylabel("best loss found")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def _subplots(
    lines: int, columns: int, *, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    return figure, list(grid.flat)
