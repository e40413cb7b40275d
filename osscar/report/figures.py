"""What all figures share: one look, and how they get into a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from osscar.report.tables import share

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

_PIXELS = 96
"""An inch on the screen."""


def small_figure() -> tuple[Figure, Axes]:
    """Return an empty figure of one panel."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SMALL, layout="constrained")
        return figure, figure.subplots()


def whole_numbers() -> MaxNLocator:
    """Return what places ticks at whole numbers, and a single one where there is only one."""
    return MaxNLocator(integer=True, min_n_ticks=1)


def legend(figure: Figure, columns: int) -> None:
    """Put the legend above, where it hides nothing."""
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8)


def svg_of(figure: Figure) -> bytes:
    """Return a figure as an SVG file, the same bytes each time."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def picture(name: str, caption: str, figure: Figure, svg: bytes | None = None) -> dict[str, object]:
    """Return a figure as pages embed it, so wide that its letters are as large as a caption's."""
    data = base64.b64encode(svg or svg_of(figure)).decode()
    width = round(figure.get_figwidth() * _PIXELS)
    return {"name": name, "caption": caption, "data": data, "width": width}
