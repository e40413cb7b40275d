"""The tables and figures of a sweep, made from its JSON document alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from osscar.base.printable import engineering, share
from osscar.report.sections import (
    Figure,
    Section,
    Table,
    described,
    facts,
    legend,
    new_figure,
    settings,
    settings_table,
    shares,
    skipped_table,
    stages_table,
    table,
)
from osscar.report.shown import page
from osscar.request import BASELINES, METHODS, BudgetKind, PruningRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Point: TypeAlias = Mapping[str, Any]
"""One of the ``points[]`` of an ``osscar.sweep/8``."""

_DENSE = "dense"
_UNIFORM = "uniform shares, each layer refitted by itself"
_METHODS = {
    _DENSE: "the model as it is",
    **METHODS,
    **{name: f"{_UNIFORM}; {what}" for name, what in BASELINES.items()},
}


class _Measure(NamedTuple):
    """A measure of quality: its name, format, and which end is better."""

    label: str
    written: str
    better: str = "higher"

    def text(self, value: float | None) -> str:
        return "" if value is None else format(value, self.written)


_MEASURES = {
    "perplexity": _Measure("perplexity", ".2f", "lower"),
    "top1": _Measure("top-1", ".2%"),
    "top5": _Measure("top-5", ".2%"),
    "agreement": _Measure("agreement with dense", ".2%"),
    "divergence": _Measure("divergence, nats", ".4f", "lower"),
    "relative": _Measure("held-out squared error", ".2g", "lower"),
    "own": _Measure("held-out distance", ".4g", "lower"),
}


def _values(point: Point) -> dict[str, float]:
    """Return the quality of a point by measure."""
    quality, distance = point["quality"], point["distance"]
    values = {name: quality.get(name) for name in ("perplexity", "top1", "top5", "agreement")}
    values |= {f"errors.{name}": one for name, one in (quality.get("errors") or {}).items()}
    values["divergence"] = point["divergence"]
    if distance is not None and distance["measure"] != "nats":
        values[distance["measure"]] = distance["value"]
    return {name: float(value) for name, value in values.items() if value is not None}


def _known(points: Sequence[Point]) -> dict[str, _Measure]:
    """Return the measures of the quality of pruned models, the most important first."""
    names = {name for point in points if point["method"] != _DENSE for name in _values(point)}
    errors = {
        name: _Measure(f"squared error of {name.removeprefix('errors.')}", ".2g", "lower")
        for name in sorted(names - _MEASURES.keys())
    }
    return {name: one for name, one in {**_MEASURES, **errors}.items() if name in names}


def sweep_table(document: Mapping[str, Any]) -> Table:
    """Return one row for each point of an ``osscar.sweep/8``."""
    written = "{:g}x".format if document["budget"] == BudgetKind.SPEEDUP else share
    shapes = ", ".join("x".join(map(str, shape)) for shape in document["shapes"].values())
    columns: dict[str, Any] = {
        "method": lambda point: point["method"],
        f"{document['budget']} >": lambda point: written(point["value"]),
        "speed >": lambda point: f"{point['speedup']:.2f}x",
        "between >": lambda point: "{:.2f} to {:.2f}".format(*_between(point)),
    }
    for name, one in _known(document["points"]).items():
        columns[f"{one.label} >"] = lambda point, n=name, one=one: one.text(_values(point).get(n))
    return table(
        "Quality against speed",
        {
            **columns,
            "parameters >": lambda point: f"{point['parameters']:,}",
            "FLOPs per sample >": lambda point: engineering(point["flops"]),
        },
        document["points"],
        note=f"Speed is that of a forward pass of one sample ({shapes}), timed in turns with the "
        "dense model: the median, and the range of half of the turns. Divergence is measured on "
        "calibration samples that were held out of the refits of measured, but not of the "
        "baselines.",
    )


def _between(point: Point) -> tuple[float, float]:
    """Return the quartiles of the speed-up of a point."""
    median = point["speedup"] * point["seconds"]  # of the dense model, in the same turns
    fast, slow = point["seconds_between"]
    return median / slow, median / fast


def sections(document: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the tables and figures of a sweep."""
    points = document["points"]
    yield sweep_table(document)
    (name, measure), *_ = _known(points).items()
    yield Figure(
        measure.label,
        f"Against speed: {measure.label} ({measure.better} is better). Star and line: dense. "
        "A bar spans half of the turns of a timing.",
        partial(_figure, points, name, measure),
        wide=True,
    )


def sweep_page(document: Mapping[str, Any]) -> str:
    """Return the page of a sweep, from the same document."""
    points = document["points"]
    stages: Counter[str] = Counter()
    for point in points:
        stages.update(point["stages"])
    methods = dict.fromkeys(point["method"] for point in points)
    shown = [
        *sections(document),
        facts("Methods", ((name, _METHODS.get(name, "")) for name in methods)),
        stages_table(stages),
        skipped_table(document["skipped"]),
        settings_table(
            settings({"model": document["model"], **document["scored"]}),
            settings(document["settings"], PruningRequest),
            described(document["calibration"], "calibration"),
        ),
    ]
    return page(f"{document['model']}: quality against speed", shown)


def _figure(points: Sequence[Point], name: str, measure: _Measure) -> Drawing:
    """Draw a measure over speed, a line a method."""
    figure, (axes,) = new_figure(width=7.2, height=3.6)
    dense = next(point for point in points if point["method"] == _DENSE)
    level = _values(dense).get(name, 0.0 if measure.better == "lower" else None)
    levels = [v for p in points if (v := _values(p).get(name))]
    log = measure.better == "lower" and levels and max(levels) > 10 * min(levels)
    if log and not level:
        level = None
    start = [] if level is None else [(float(dense["speedup"]), level)]
    look: Any = {"linewidth": 1.2, "markersize": 5}
    methods = dict.fromkeys(p["method"] for p in points if p["method"] != _DENSE)
    for index, method in enumerate(methods):
        mine = [point for point in points if point["method"] == method]
        found = [(p, v) for p in mine if (v := _values(p).get(name)) is not None]
        if found:
            at = [*start, *((float(p["speedup"]), v) for p, v in found)]
            axes.plot(*zip(*at, strict=True), "o-", color=f"C{index}", label=method, **look)
        for point, value in found:
            axes.hlines(value, *_between(point), color=f"C{index}", linewidth=3, alpha=0.2)
    if level is not None:
        axes.plot(*start[0], "k*", markersize=8, zorder=3)
        axes.axhline(level, color="k", linewidth=0.6, alpha=0.4)
    axes.set_xlabel("speed, times that of dense")
    axes.set_ylabel(measure.label)
    if log:
        axes.set_yscale("log")
    if measure.written.endswith("%"):
        axes.yaxis.set_major_formatter(shares)
    legend(figure)
    return figure
