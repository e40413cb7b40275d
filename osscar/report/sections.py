"""Tables, figures and texts, which pages and terminals show, and the look of all figures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from osscar.base.printable import listed, share
from osscar.base.timing import OTHER

if TYPE_CHECKING:  # a terminal needs no matplotlib, which figures load when they are drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

    from graph.groups import CouplingGroup, Slot
    from solvers import BackendInfo, Capabilities


@dataclass(frozen=True)
class Text:
    """Paragraphs, or lines of code."""

    lines: tuple[str, ...]
    title: str = ""
    look: Literal["answer", "note", "code"] = "note"


@dataclass(frozen=True)
class Table:
    """Rows below the titles of their columns; a title that ends in ``>`` is that of numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False
    """Whether a page shows it only on a click."""


@dataclass(frozen=True)
class Figure:
    """A plot, drawn once a page shows it."""

    name: str
    caption: str
    draw: Callable[[], Drawing]
    wide: bool = False

    @cached_property
    def svg(self) -> bytes:
        """The file."""
        return file_of(self.draw(), "svg")


Section: TypeAlias = Table | Figure | Text


def table(
    title: str,
    columns: Mapping[str, Callable[[Any], str | None]],
    of: Iterable[Any],
    *,
    note: str = "",
    folded: bool = False,
) -> Table:
    """Return a table with a row `of` each thing, without empty columns; `columns` writes cells."""
    things = list(of)
    cells = {title: [write(one) or "" for one in things] for title, write in columns.items()}
    shown = {title: column for title, column in cells.items() if any(column)}
    rows = tuple(zip(*shown.values(), strict=True))
    return Table(title, tuple(shown), rows, note, folded)


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and facts, without empty facts."""
    return Table(title, ("", ""), tuple(row for row in rows if row[1]))


def stages_table(stages: Mapping[str, float], title: str = "Where the time went") -> Table:
    """Return one row for each stage of a run, in its order."""
    total = sum(stages.values()) or 1.0
    rows = tuple((name, f"{took:.1f}", share(took / total, 2)) for name, took in stages.items())
    return Table(title, ("stage", "seconds >", "share >"), rows)


def longest_stages(stages: Mapping[str, float]) -> str:
    """Say in parentheses which stages took longest; with the rest it adds up to the whole."""
    # What no stage counts is part of the rest.
    longest = sorted(stages.items(), key=lambda stage: (stage[0] == OTHER, -stage[1]))
    named = [*(name for name, _ in longest[:3]), *(["the rest"] if longest[3:] else [])]
    sums = [round(one, 1) for one in accumulate((took for _, took in longest), initial=0.0)]
    ends = [*sums[: 1 + min(3, len(longest))], *(sums[-1:] if longest[3:] else [])]
    parts = zip(named, pairwise(ends), strict=True)
    told = ", ".join(f"{name} {end - start:.1f}" for name, (start, end) in parts)
    return f" ({told})" if told else ""


def settings(
    values: Mapping[str, Any],
    request: type[Any] | None = None,
    prefix: str = "",
    chosen: Mapping[str, Any] = MappingProxyType({}),
    origin: str = "asked",
) -> Iterator[tuple[str, str, str]]:
    """Yield each setting that is not empty, with its value and origin; defaults may be `chosen`."""
    usual: dict[str, Any] = {}
    for one in fields(request) if request else ():
        default = one.default if one.default_factory is MISSING else one.default_factory()
        usual[one.name] = json.loads(json.dumps(default))
    for name, value in {**values, **chosen}.items():
        asked = name not in usual or values.get(name, usual[name]) != usual[name]
        found = values[name] if asked else value
        if found is not None and found is not False and found not in ("", [], {}):
            known = origin if asked else "chosen" if name in chosen else "by default"
            yield prefix + name.replace("_", " "), _as_text(found), known


def settings_table(*parts: Iterable[tuple[str, str, str]]) -> Table:
    """Return a table of settings, first those that the user gave."""
    rows = sorted((row for part in parts for row in part), key=lambda row: row[2] != "asked")
    return Table("Settings", ("setting", "value", "origin"), tuple(rows))


def described(data: Mapping[str, Any], name: str) -> Iterator[tuple[str, str, str]]:
    """Return the settings of data, without their fingerprints."""
    told = {key: one for key, one in data.items() if key != "seen"}
    return settings(told, prefix=f"{name} ", origin="data")


def _as_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_as_text(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ---- the look of all figures, and how they become files --------------------------------

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
) -> tuple[Drawing, list[Axes]]:
    """Return an empty figure and its panels; a phone shows it at its default width in inches."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)


def legend(figure: Drawing) -> None:
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


def file_of(figure: Drawing, kind: str) -> bytes:
    """Return a figure as a file of a form, the same bytes each time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    file, unstable = io.BytesIO(), FORMS[kind]
    look: Any = {"dpi": 192, "transparent": kind == "svg", "metadata": {unstable: None}}
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind, **look)
    return file.getvalue()


# ---- groups of a model, and backends -----------------------------------------------------


def skipped_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """Return one row for each skipped group."""
    return table(
        "Skipped groups, which keep all their units",
        {
            "group": lambda one: one["name"],
            "units >": lambda one: f"{one['units']} {one['kind']}",
            "why": lambda one: one["reason"],
        },
        groups,
    )


def groups_table(groups: Sequence[CouplingGroup], residual: Collection[str] = ()) -> Table:
    """Return one row for each group; those named in `residual` are residual streams."""
    return table(
        "",
        {
            "group": lambda one: one.name,
            "kind": lambda one: f"{one.kind}{', residual' if one.name in residual else ''}",
            "units >": lambda one: str(one.units),
            "rows/unit >": lambda one: str(max((slot.width for slot in one.consumers), default=0)),
            "producers": lambda one: _modules(one.producers),
            "consumers": lambda one: _modules(one.consumers),
            "parameters >": lambda one: (
                f"{one.removable * one.units:,}" if one.prunable else "frozen"
            ),
        },
        groups,
    )


def _modules(slots: Sequence[Slot]) -> str:
    """Return the last part of each module's name, and what a number is counted in."""
    names = []
    for slot in slots:
        parts = slot.module.split(".")
        last = next((i for i, part in enumerate(reversed(parts)) if not part.isdecimal()), 0)
        names.append(".".join(parts[-last - 1 :]) or slot.tensor)
    return listed(list(dict.fromkeys(names)))


def backends_table(infos: Sequence[BackendInfo], title: str = "") -> Table:
    """Return one row for each registered backend."""
    return table(
        title,
        {
            "backend": lambda info: info.name,
            "kind": lambda info: info.kind,
            "takes": lambda info: _takes(info.capabilities),
            "options": lambda info: ", ".join(f"{k}={v}" for k, v in info.options.items()),
            "what it does": lambda info: info.summary,
            "available": lambda info: info.unavailable or "yes",
        },
        infos,
    )


def _takes(capabilities: Capabilities) -> str:
    limits = [
        "" if capabilities.several_consumers else "one consumer",
        f"up to {capabilities.max_units} units" if capabilities.max_units is not None else "",
        "" if "cuda" in capabilities.devices else "CPU only",
    ]
    return ", ".join(filter(None, limits)) or "everything"
