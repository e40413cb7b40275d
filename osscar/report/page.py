"""What all pages share: one look, one way to write numbers and names, pictures in the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from osscar import __version__
from osscar.base.printable import printable
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
"""Of every plot."""

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")

_PIXELS = 96
"""An inch on the screen."""


@dataclass(frozen=True)
class Picture:
    """A plot as a page embeds it.

    Parameters
    ----------
    name
        What it shows, for those who do not see it.
    caption
        How to read it.
    data
        An SVG file, base64.
    width
        In pixels, at which its letters are as large as those of a caption.
    """

    name: str
    caption: str
    data: str
    width: int

    @classmethod
    def of(cls, name: str, caption: str, figure: Figure) -> Picture:
        """Take a figure, drawn in `STYLE`."""
        FigureCanvasAgg(figure)
        file = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(file, format="svg", metadata={"Date": None})
        width = round(figure.get_figwidth() * _PIXELS)
        return cls(name, caption, base64.b64encode(file.getvalue()).decode(), width)

    @classmethod
    def read(cls, name: str, caption: str, file: Path, width: float) -> Picture:
        """Take a file whose figure is so many inches wide."""
        data = base64.b64encode(file.read_bytes()).decode()
        return cls(name, caption, data, round(width * _PIXELS))


def render(template: str, **content: Any) -> str:
    """Return a page; all text in it is escaped, and control characters are shown as such."""
    return _environment().get_template(template).render(version=__version__, **content)


def asked_rows(
    asked: Mapping[str, Any], calibration: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return what was asked by name, as text, without what was not.

    Parameters
    ----------
    asked
        By name.
    calibration
        What the calibration data are, of whose samples only the number is told.
    """
    data = {
        f"calibration {key}": len(value) if key in ("images", "fingerprints") else value
        for key, value in (calibration or {}).items()
    }
    return {
        key.replace("_", " "): _as_text(value)
        for key, value in {**asked, **data}.items()
        if value is not None and value is not False and value not in ("", [], {})
    }


def _as_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_as_text(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@cache
def _environment() -> jinja2.Environment:
    def read(name: str) -> str:
        return files("osscar.report").joinpath("templates", name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters.update(
        percent=_percent, number=_number, removed=_removed, breakable=_breakable
    )
    return environment


def _shown(value: object) -> object:
    """Names come from strangers: nothing in them may move or hide what stands beside them."""
    return printable(value, keep="\n") if type(value) is str else value


def _percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many decimals, or so many digits where those would be zeros."""
    if value is None:
        return ""
    if value and math.isfinite(value) and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def _breakable(name: str) -> Markup:
    """Let a long name go on in the next line after its dots, slashes and dashes."""
    text = escape(printable(name))
    for mark in "./-":  # none of them is part of what replaces another
        text = text.replace(mark, Markup(f"{mark}<wbr>"))
    return text


def _removed(sparsities: Sequence[float]) -> str:
    return ", ".join(map(share, sparsities))
