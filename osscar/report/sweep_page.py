"""The table and the page of a sweep, made of its JSON document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from osscar.allocation.costs import ROUNDING
from osscar.report.evaluation_tables import dense_remarks
from osscar.report.page import COLORS, Picture, asked_rows, render
from osscar.report.prune_plots import SHARES, legend, small_figure
from osscar.report.tables import engineering, new_table, share
from osscar.request import BASELINES, METHODS, BudgetKind

_DENSE = "dense"
_METHODS = {
    _DENSE: "the model as it is",
    **METHODS,
    **{
        name: f"uniform shares, each layer refitted by itself; {what}"
        for name, what in BASELINES.items()
    },
}

_TOLD = 3
"""Points that the sentence at the top names at most."""


@dataclass(frozen=True)
class _Measure:
    """A number of quality: by what name it is known, how it is written, and which end is good.

    Those of single outputs lie `within` a mapping.
    """

    name: str
    label: str
    written: str
    more_is_better: bool = True
    within: str = ""

    @property
    def title(self) -> str:
        """The label at the beginning of a sentence."""
        return self.label[0].upper() + self.label[1:]

    def of(self, point: Mapping[str, Any]) -> float | None:
        """Return it for a point; None where it is not known."""
        numbers = point["quality"]
        known = numbers.get(self.within) or {} if self.within else {**point, **numbers}
        value = known.get(self.name)
        return None if value is None else float(value)

    def text(self, point: Mapping[str, Any]) -> str:
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


@dataclass(frozen=True)
class _Varied:
    """What the points of a sweep differ in.

    Parameters
    ----------
    kind
        The budget.
    counts
        Whether it is counted, rather than a share or a ratio.
    """

    kind: BudgetKind
    counts: bool = False

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> _Varied:
        """Return that of a sweep."""
        counts = any(isinstance(point["value"], int) for point in document["points"][1:])
        return cls(BudgetKind(document["budget"]), counts)

    def at(self, point: Mapping[str, Any]) -> float:
        """Return where a point lies; the dense model is not asked for, but has its place."""
        dense = point["method"] == _DENSE
        return float(point["parameters"] if dense and self.counts else point["value"])

    def text(self, point: Mapping[str, Any]) -> str:
        """Write where a point lies."""
        if self.counts:
            return f"{self.at(point):,.0f}"
        value = self.at(point)
        return f"{value:g}x" if self.kind is BudgetKind.SPEEDUP else share(value)


def _known(points: Sequence[Mapping[str, Any]]) -> list[_Measure]:
    """Return what was measured of quality, the most telling first."""
    outputs = dict.fromkeys(name for p in points for name in p["quality"].get("errors") or ())
    errors = [
        _Measure(name, f"squared error of {name}", ".2g", more_is_better=False, within="errors")
        for name in outputs
    ]
    measures = (*_MEASURES, *errors)
    pruned = [point for point in points if point["method"] != _DENSE] or points
    return [m for m in measures if any(m.of(point) is not None for point in pruned)]


def sweep_table(document: Mapping[str, Any]) -> Table:
    """Return one row for each point.

    Parameters
    ----------
    document
        An ``osscar.sweep/4``, as ``docs/json.md`` describes it.
    """
    columns, rows = _table(document["points"], _Varied.of(document))
    table = new_table("", *columns)
    for row in rows:
        table.add_row(*row)
    return table


def _table(
    points: Sequence[Mapping[str, Any]], varied: _Varied
) -> tuple[list[str], list[list[str]]]:
    measures = _known(points)
    columns = [
        "method",
        f"{varied.kind.column} >",
        "speed >",
        *(f"{measure.label} >" for measure in measures),
    ]
    columns += ["parameters >", "FLOPs a sample >", "of the budget >"]
    rows = [
        [
            point["method"],
            varied.text(point),
            f"{point['speedup']:.2f}x",
            *(measure.text(point) for measure in measures),
            f"{point['parameters']:,}",
            engineering(point["flops"]),
            _spent(point),
        ]
        for point in points
    ]
    return columns, rows


def _spent(point: Mapping[str, Any]) -> str:
    """Write what a point came to as a share of its budget."""
    if point["limit"] is None:
        return ""
    spent = point["reached"] / point["limit"]
    return f"{spent:.1%}{' (over)' if spent > 1 + ROUNDING else ''}"


def sweep_page(document: Mapping[str, Any]) -> str:
    """Return the page of a sweep.

    Parameters
    ----------
    document
        An ``osscar.sweep/4``, as ``docs/json.md`` describes it.
    """
    points, varied = document["points"], _Varied.of(document)
    columns, rows = _table(points, varied)
    methods = list(dict.fromkeys(point["method"] for point in points))
    return render(
        "sweep.html.j2",
        model=document["model"],
        answer=_answer(points, varied),
        remarks=list(dense_remarks(document)),
        columns=[(name.removesuffix(" >"), name.endswith(">")) for name in columns],
        rows=rows,
        methods={name: _METHODS.get(name, "") for name in methods},
        pictures=list(_pictures(points, varied)),
        left_alone=document["left_alone"],
        asked=asked_rows(
            {"model": document["model"], **document["scored"], **document["settings"]},
            document["calibration"],
        ),
        shapes=", ".join("x".join(map(str, shape)) for shape in document["shapes"].values()),
    )


def _answer(points: Sequence[Mapping[str, Any]], varied: _Varied) -> str:
    """Say in a sentence what the method itself comes to, and how far the baselines are."""
    dense = next(point for point in points if point["method"] == _DENSE)
    mine = [point for point in points if point["method"] in METHODS]
    known = _known(points)
    if not mine or not known:
        return "Nothing was measured of quality: the model puts out no logits."
    measure, last = known[0], mine[-1]
    told = [mine[0], mine[len(mine) // 2], last] if len(mine) > _TOLD else mine
    said = [
        f"{measure.text(point)} with {varied.kind.told.format(varied.text(point))}, at "
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
    best = (max if measure.more_is_better else min)(others, default=None)
    against = (
        ""
        if best is None
        else (f" The best baseline comes to {best[0]:{measure.written}} there ({best[1]}).")
    )
    begins = measure.text(dense)  # nothing where a number is that of a comparison with it
    goes = f"goes from {begins} to" if begins else "comes to"
    return f"{measure.title} {goes} {listed}.{against}"


# ---- in pictures -------------------------------------------------------------------------


def _pictures(points: Sequence[Mapping[str, Any]], varied: _Varied) -> Iterator[Picture]:
    known = _known(points)
    for measure in known:
        if measure.name == "divergence" and known[1:]:
            continue  # quality is there to be shown
        better = "higher" if measure.more_is_better else "lower"
        yield Picture.of(
            f"{measure.label} against speed",
            f"{measure.title} against speed, relative to the dense model (star); {better} and "
            "further to the right is better.",
            _quality_figure(
                points, measure, lambda point: float(point["speedup"]), "speed, times that of dense"
            ),
        )
    for measure in (*known[:1], *(m for m in known[1:] if m.name == "divergence")):
        dashed = "; dashed what was predicted" if measure.name == "divergence" else ""
        yield Picture.of(
            f"{measure.label} against {varied.kind.axis}",
            f"{measure.title} against {varied.kind.axis}{dashed}.",
            _quality_figure(points, measure, varied.at, varied.kind.column, varied),
        )


def _quality_figure(
    points: Sequence[Mapping[str, Any]],
    measure: _Measure,
    across: Callable[[Mapping[str, Any]], float],
    label: str,
    varied: _Varied | None = None,
) -> Figure:
    """Draw a measure over something; over what the points differ in, if that is given."""
    figure, axes = small_figure()
    methods = [m for m in dict.fromkeys(p["method"] for p in points) if m != _DENSE]
    for color, method in zip(COLORS, methods, strict=False):
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
    if measure.name == "divergence" and varied is not None:
        predicted = [(across(p), p["predicted"]) for p in points if p["predicted"] is not None]
        if predicted:
            axes.plot(*zip(*predicted, strict=True), "--", color=COLORS[0], linewidth=1)
    values = [value for point in points if (value := measure.of(point))]
    if not measure.more_is_better and values and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.margins(x=0.06, y=0.08)
    if varied is not None and not varied.counts and varied.kind is not BudgetKind.SPEEDUP:
        axes.xaxis.set_major_formatter(SHARES)
    if measure.written.endswith("%"):
        axes.yaxis.set_major_formatter(SHARES)
    axes.set_xlabel(label)
    axes.set_ylabel(measure.label)
    legend(figure, 3)
    return figure
