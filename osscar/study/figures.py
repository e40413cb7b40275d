"""The figures of a study: losses and bounds, and gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from osscar.base.printable import share
from osscar.report.figures import color, from_zero, legend, new_figure, shares
from osscar.study.cases import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


_COLUMNS = 4
"""Panels of a plot beside each other."""

_LONGEST_NAME = 40


# ---- plots -------------------------------------------------------------------------------


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def curves_figure(layers: Sequence[Case]) -> Drawing:
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


def gaps_figure(cases: Sequence[Case]) -> Drawing:
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
