"""What all figures share: one look, and how they become files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from osscar.base.printable import share

if TYPE_CHECKING:  # a terminal needs no matplotlib, which every function here loads
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "osscar",
}
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")
ROOM_ABOVE = 1.08
"""How far an axis goes on beyond what is drawn, so that no marker is cut."""


def shares(value: float, _: object = None) -> str:
    """Write the ticks of an axis in per cent."""
    return share(value)


def color(index: int) -> str:
    """Return one of the colours, which begin anew once they have all been used."""
    return COLORS[index % len(COLORS)]


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 4.4, height: float = 2.9, **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of some panels; at its default width in inches a phone shows it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)


def legend(figure: Figure, columns: int = 3) -> None:
    """Put one legend above the panels, of what any of them shows."""
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(
        shown.values(), shown, loc="outside upper left", ncols=columns, frameon=False, fontsize=8
    )


def from_zero(axes: Axes) -> None:
    """Begin the upward axis at zero, with room above what is drawn."""
    top = axes.dataLim.ymax
    axes.set_ylim(0, ROOM_ABOVE * top if 0 < top < float("inf") else 1)


def svg_of(figure: Figure) -> bytes:
    """Return a figure as an SVG file, the same bytes each time."""
    return _file(figure, "svg", metadata={"Date": None})


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG file, twice as fine as a screen shows it."""
    return _file(figure, "png", dpi=192, metadata={"Software": None})


def _file(figure: Figure, kind: str, **options: Any) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind, transparent=kind == "svg", **options)
    return file.getvalue()
