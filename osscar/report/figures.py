"""The look of all figures, and how they become files."""

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


def shares(value: float, _: object = None) -> str:
    """Write the ticks of an axis in per cent."""
    return share(value)


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 4.4, height: float = 2.9, **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its panels; a phone shows it at its default width in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)


def legend(figure: Figure) -> None:
    """Put one legend of all panels above them."""
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(
        shown.values(), shown, loc="outside upper left", ncols=3, frameon=False, fontsize=8
    )


def from_zero(axes: Axes) -> None:
    """Begin the upward axis at zero, and end it above what is drawn, so that no marker is cut."""
    top = axes.dataLim.ymax
    axes.set_ylim(0, 1.08 * top if 0 < top < float("inf") else 1)


FORMS = {"svg": "Date", "png": "Software", "pdf": "CreationDate"}
"""Forms of files, with what would differ from one file to the next."""


def file_of(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of a form, the same bytes each time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    file, unstable = io.BytesIO(), FORMS[kind]
    look: Any = {"dpi": 192, "transparent": kind == "svg", "metadata": {unstable: None}}
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind, **look)
    return file.getvalue()
