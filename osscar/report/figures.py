"""What all figures share: one look, and how they get into a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from osscar.base.numbers import share

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "osscar",
}
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")
SHARES = FuncFormatter(lambda value, _: share(value))
ROOM_ABOVE = 1.08
"""How far an axis goes on beyond what is drawn, so that no marker is cut."""

_SMALL = (4.4, 2.9)
"""Inches: a phone shows it as it is."""

_TALL = (4.4, 4.4)
"""The same, of two panels, one above the other."""

_LINE = 0.065
"""Of the height of a small figure's axes: that of a line of text."""

_PIXELS = 96
"""An inch on the screen."""


def small_figure() -> tuple[Figure, Axes]:
    """Return an empty figure of one panel."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SMALL, layout="constrained")
        return figure, figure.subplots()


def tall_figure() -> tuple[Figure, Sequence[Axes]]:
    """Return an empty figure of two panels that share their horizontal axis."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_TALL, layout="constrained")
        return figure, figure.subplots(2, 1, sharex=True)


def whole_numbers() -> MaxNLocator:
    """Return what places ticks at whole numbers, and a single one where there is only one."""
    return MaxNLocator(integer=True, min_n_ticks=1)


def legend(figure: Figure, columns: int) -> None:
    """Put the legend above, where it hides nothing."""
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8)


def label_lines(axes: Axes, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """Put names beside the axes, each as high as its line ends, and none over another.

    Ends are x, y, name and colour; the limits of the axes have to be final.
    """
    axes.autoscale_view()
    scaled = axes.transScale + axes.transLimits
    sorted_ends = sorted((scaled.transform((x, y))[1], name, color) for x, y, name, color in ends)
    top = 1.0 - _LINE * (len(sorted_ends) - 1)
    height = -math.inf
    for index, (level, name, color) in enumerate(sorted_ends):
        # What is above still has to find room.
        height = max(min(level, top + _LINE * index), height + _LINE)
        axes.annotate(
            name, (1.02, height), xycoords="axes fraction", color=color, fontsize=7.5, va="center",
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def svg_of(figure: Figure) -> bytes:
    """Return a figure as an SVG file, the same bytes each time."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG file, twice as fine as a screen shows it."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=2 * _PIXELS, metadata={"Software": None})
    return file.getvalue()


def picture(name: str, caption: str, figure: Figure, svg: bytes | None = None) -> dict[str, object]:
    """Return a figure as pages embed it, so wide that its letters are as large as a caption's."""
    data = base64.b64encode(svg or svg_of(figure)).decode()
    width = round(figure.get_figwidth() * _PIXELS)
    return {"name": name, "caption": caption, "data": data, "width": width}
