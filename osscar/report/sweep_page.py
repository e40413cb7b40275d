"""The table and the page of a sweep, made of its JSON document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from matplotlib.figure import Figure
from rich.table import Table

from osscar.allocation.costs import ROUNDING
from osscar.base.printable import capitalized
from osscar.report.evaluation_tables import dense_remarks
from osscar.report.figures import COLORS, SHARES, legend, picture, small_figure
from osscar.report.page import asked_table, render
from osscar.report.run_tables import skipped_table
from osscar.report.tables import engineering, new_table, share
from osscar.request import BASELINES, METHODS, BudgetKind

Point: TypeAlias = Mapping[str, Any]
"""One of the ``points[]`` of an ``osscar.sweep/5``."""

_DENSE = "dense"
_UNIFORM = "uniform shares, each layer refitted by itself"
_METHODS = {
    _DENSE: "the model as it is",
    **METHODS,
    **{name: f"{_UNIFORM}; {what}" for name, what in BASELINES.items()},
}

_TOLD = 3
"""Points that the sentence at the top names at most."""


class _Measure(NamedTuple):
    """A number of quality: its name, how it is called and written, and which end is good."""

    name: str
    label: str
    written: str
    more_is_better: bool = True

    @property
    def title(self) -> str:
        """The label at the beginning of a sentence."""
        return capitalized(self.label)

    def of(self, point: Point) -> float | None:
        """Return it for a point; None where it is not known."""
        errors = {f"errors.{k}": v for k, v in (point["quality"].get("errors") or {}).items()}
        value = {**point, **point["quality"], **errors}.get(self.name)
        return None if value is None else float(value)

    def text(self, point: Point) -> str:
        """Write it for a point."""
        value = self.of(point)
        return "" if value is None else format(value, self.written)


_MEASURES = (
    _Measure("perplexity", "perplexity", ".2f", more_is_better=False),
    _Measure("top1", "top-1", ".2%"),
    _Measure("top5", "top-5", ".2%"),
    _Measure("agreement", "agreement with dense", ".2%"),
    _Measure("divergence", "divergence, nats", ".4f", more_is_better=False),
)


def _known(points: Sequence[Point]) -> list[_Measure]:
    """Return what was measured of quality, the most telling first."""
    outputs = dict.fromkeys(name for p in points for name in p["quality"].get("errors") or ())
    errors = [
        _Measure(f"errors.{name}", f"squared error of {name}", ".2g", more_is_better=False)
        for name in outputs
    ]
    pruned = [point for point in points if point["method"] != _DENSE] or points
    return [m for m in (*_MEASURES, *errors) if any(m.of(point) is not None for point in pruned)]


class _Varied(NamedTuple):
    """What the points of a sweep differ in, and whether it is counted in parameters."""

    kind: BudgetKind
    counts: bool

    def at(self, point: Point) -> float:
        """Return where a point lies; the dense model is not asked for, but has its place."""
        dense = point["method"] == _DENSE
        return float(point["parameters"] if dense and self.counts else point["value"])

    def text(self, point: Point) -> str:
        """Write where a point lies."""
        value = self.at(point)
        if self.counts:
            return f"{value:,.0f}"
        return f"{value:g}x" if self.kind is BudgetKind.SPEEDUP else share(value)


def _varied(document: Mapping[str, Any]) -> _Varied:
    counts = any(isinstance(point["value"], int) for point in document["points"][1:])
    return _Varied(BudgetKind(document["budget"]), counts)


def sweep_table(document: Mapping[str, Any]) -> Table:
    """Return one row for each point.

    Parameters
    ----------
    document
        An ``osscar.sweep/5``, as ``docs/json.md`` describes it.
    """
    points, varied = document["points"], _varied(document)
    measures = _known(points)
    return new_table(
        "",
        *("method", f"{varied.kind} >", "speed >", *(f"{measure.label} >" for measure in measures)),
        *("parameters >", "FLOPs a sample >", "of the budget >"),
        rows=(
            (
                *(point["method"], varied.text(point), f"{point['speedup']:.2f}x"),
                *(measure.text(point) for measure in measures),
                *(f"{point['parameters']:,}", engineering(point["flops"]), _spent(point)),
            )
            for point in points
        ),
    )


def _spent(point: Point) -> str:
    """Write what a point came to as a share of its budget."""
    if point["limit"] is None:
        return ""
    spent = point["reached"] / point["limit"]
    return f"{spent:.1%}{' (over)' if spent > 1 + ROUNDING else ''}"


def sweep_page(document: Mapping[str, Any]) -> str:
    """Return the page of a sweep, of the same document."""
    points, varied = document["points"], _varied(document)
    methods = dict.fromkeys(point["method"] for point in points)
    asked = {"model": document["model"], **document["scored"], **document["settings"]}
    return render(
        "sweep.html.j2",
        model=document["model"],
        answer=_answer(points, varied),
        remarks=list(dense_remarks(document)),
        points=sweep_table(document),
        methods=new_table("", "", "", rows=((name, _METHODS.get(name, "")) for name in methods)),
        pictures=list(_pictures(points, varied)),
        skipped=skipped_table(document["skipped"]),
        asked=asked_table(asked, document["calibration"]),
        shapes=", ".join("x".join(map(str, shape)) for shape in document["shapes"].values()),
    )


def _answer(points: Sequence[Point], varied: _Varied) -> str:
    """Say in a sentence what the method itself comes to, and how far the baselines are."""
    dense = next(point for point in points if point["method"] == _DENSE)
    mine = [point for point in points if point["method"] in METHODS]
    known = _known(points)
    if not mine or not known:
        return "Nothing was measured of quality: the model puts out no logits."
    measure, last = known[0], mine[-1]
    told = [mine[0], mine[len(mine) // 2], last] if len(mine) > _TOLD else mine
    said = [
        f"{measure.text(point)} with {varied.kind} {varied.text(point)}, at "
        f"{point['speedup']:.2f} times the speed"
        for point in told
    ]
    listed = f"{'; '.join(said[:-1])}; and {said[-1]}" if said[1:] else said[0]
    others = [
        (value, point["method"])
        for point in points
        if point["method"] in BASELINES and point["value"] == last["value"]
        if (value := measure.of(point)) is not None
    ]
    against = ""
    if others:
        value, method = (max if measure.more_is_better else min)(others)
        against = f" The best baseline comes to {value:{measure.written}} there ({method})."
    begins = measure.text(dense)  # nothing where a number is that of a comparison with it
    goes = f"goes from {begins} to" if begins else "comes to"
    return f"{measure.title} {goes} {listed}.{against}"


# ---- in pictures -------------------------------------------------------------------------


def _pictures(points: Sequence[Point], varied: _Varied) -> Iterator[dict[str, object]]:
    known = _known(points)
    divergence = [measure for measure in known if measure.name == "divergence"]
    for measure in [m for m in known if m not in divergence] or known:
        better = "higher" if measure.more_is_better else "lower"
        yield picture(
            f"{measure.label} against speed",
            f"{measure.title} against speed, relative to the dense model (star); {better} and "
            "further to the right is better.",
            _figure(points, measure, lambda p: float(p["speedup"]), "speed, times that of dense"),
        )
    for measure in dict.fromkeys((*known[:1], *divergence)):
        dashed = "; dashed what was predicted" if measure in divergence else ""
        figure = _figure(points, measure, varied.at, str(varied.kind))
        (axes,) = figure.axes
        if not varied.counts and varied.kind is not BudgetKind.SPEEDUP:
            axes.xaxis.set_major_formatter(SHARES)
        predicted = [(varied.at(p), p["predicted"]) for p in points if p["predicted"] is not None]
        if dashed and predicted:
            axes.plot(*zip(*predicted, strict=True), "--", color=COLORS[0], linewidth=1)
        yield picture(
            f"{measure.label} against {varied.kind}",
            f"{measure.title} against {varied.kind}{dashed}.",
            figure,
        )


def _figure(
    points: Sequence[Point], measure: _Measure, across: Callable[[Point], float], label: str
) -> Figure:
    """Draw a measure over something, a line a method."""
    figure, axes = small_figure()
    for color, method in zip(
        COLORS, (m for m in dict.fromkeys(p["method"] for p in points) if m != _DENSE), strict=False
    ):
        mine = [(across(p), measure.of(p)) for p in points if p["method"] == method]
        known = [(x, y) for x, y in mine if y is not None]
        if known:
            axes.plot(
                *zip(*known, strict=True), "o-", color=color, markersize=3.5, linewidth=1,
                label=method,
            )  # fmt: skip
    dense = next(point for point in points if point["method"] == _DENSE)
    level = measure.of(dense)
    if level:
        axes.plot([across(dense)], [level], "k*", markersize=8)
        axes.axhline(level, color="k", linewidth=0.6, alpha=0.4)
    values = [value for point in points if (value := measure.of(point))]
    if not measure.more_is_better and values and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.margins(x=0.06, y=0.08)
    if measure.written.endswith("%"):
        axes.yaxis.set_major_formatter(SHARES)
    axes.set_xlabel(label)
    axes.set_ylabel(measure.label)
    legend(figure, 3)
    return figure
