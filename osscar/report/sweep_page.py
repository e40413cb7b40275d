"""The table and the page of a sweep, made of its JSON document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from matplotlib.figure import Figure
from rich.table import Table

from osscar.allocation.costs import ROUNDING
from osscar.base.numbers import engineering, share
from osscar.base.printable import capitalized, pluralize
from osscar.recovery.request import RecoveryRequest
from osscar.report.evaluation_tables import dense_remarks
from osscar.report.figures import COLORS, SHARES, label_lines, picture, small_figure
from osscar.report.page import Part, Settings, render, told
from osscar.report.prune_page import verdict
from osscar.report.run_tables import skipped_table
from osscar.report.stages import stages_table, summed_stages
from osscar.report.tables import new_table
from osscar.request import BASELINES, METHODS, BudgetKind, PruningRequest

Point: TypeAlias = Mapping[str, Any]
"""One of the ``points[]`` of an ``osscar.sweep/6``."""

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
        """Return it for a point in one shot; None where it is not known."""
        recovered = point["recovered"]
        held_out = {} if recovered is None else {_HELD_OUT: recovered["before"]}
        return self._among({"divergence": point["divergence"], **held_out}, point["quality"])

    def recovered(self, point: Point) -> float | None:
        """Return it for a point after its recovery; None where it is not known."""
        recovered = point["recovered"]
        if recovered is None:
            return None
        return self._among({_HELD_OUT: recovered["after"]}, recovered["quality"])

    def _among(self, numbers: Mapping[str, Any], quality: Mapping[str, Any]) -> float | None:
        errors = {f"errors.{k}": v for k, v in (quality.get("errors") or {}).items()}
        value = {**numbers, **quality, **errors}.get(self.name)
        return None if value is None else float(value)

    def text(self, value: float | None) -> str:
        """Write it; nothing where it is not known."""
        return "" if value is None else format(value, self.written)

    def best(self, values: Iterable[tuple[float | None, str]]) -> tuple[float, str] | None:
        """Return the best value, and of whom it is; None if there is none."""
        known = [(value, whose) for value, whose in values if value is not None]
        return (max if self.more_is_better else min)(known, default=None)


_HELD_OUT = "held_out"
"""The distance by which a recovery is decided, which it also knows of the model in one shot."""

_DISTANCES = {
    "nats": _Measure(_HELD_OUT, "held-out divergence, nats", ".4f", more_is_better=False),
    "relative": _Measure(_HELD_OUT, "held-out squared error", ".2g", more_is_better=False),
    "loss": _Measure(_HELD_OUT, "held-out loss", ".4g", more_is_better=False),
}
"""By the measure of a recovery."""

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
    decided = {p["recovered"]["measure"] for p in pruned if p["recovered"] is not None}
    measures = (*_MEASURES, *errors, *(_DISTANCES[one] for one in sorted(decided)))
    known = [m for m in measures if any(m.of(point) is not None for point in pruned)]
    # That of a recovery is known before and after, and one column of them is enough.
    return [m for m in known if m.name != "divergence" or "nats" not in decided]


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
        An ``osscar.sweep/6``, as ``docs/json.md`` describes it.
    """
    points, varied = document["points"], _varied(document)
    columns = {
        "method": [point["method"] for point in points],
        f"{varied.kind} >": [varied.text(point) for point in points],
        "speed >": [f"{point['speedup']:.2f}x" for point in points],
        "between >": ["{:.2f} to {:.2f}".format(*_between(point)) for point in points],
    }
    for measure in _known(points):
        columns[f"{measure.label} >"] = [measure.text(measure.of(point)) for point in points]
        if _is_recovered(measure, points):
            texts = [measure.text(measure.recovered(point)) for point in points]
            columns[f"{measure.label}, recovered >"] = texts
    if document["recover"] is not None:
        columns["recovery >"] = [_recovery(point) for point in points]
    columns["parameters >"] = [f"{point['parameters']:,}" for point in points]
    columns["FLOPs a sample >"] = [engineering(point["flops"]) for point in points]
    columns["of the budget >"] = [_spent(point) for point in points]
    return new_table("", *columns, rows=zip(*columns.values(), strict=True))


def _between(point: Point) -> tuple[float, float]:
    """Return between what speed-ups half of the turns lie in which a point was timed."""
    median = point["speedup"] * point["seconds"]  # of the dense model, in the same turns
    fast, slow = point["seconds_between"]
    return median / slow, median / fast


def _is_recovered(measure: _Measure, points: Sequence[Point]) -> bool:
    """Whether it is known of points after their recovery."""
    return any(measure.recovered(point) is not None for point in points)


def _recovery(point: Point) -> str:
    recovered = point["recovered"]
    return "" if recovered is None else f"{_step(recovered)}, {recovered['seconds']:,.0f} s"


def _step(recovered: Mapping[str, Any]) -> str:
    """Say which step of a recovery was kept."""
    if not recovered["kept"]:
        return f"none of {pluralize(recovered['steps'], 'step')}"
    return f"step {recovered['kept']} of {recovered['steps']}"


def recovered_line(recovered: Mapping[str, Any]) -> str:
    """Say what a recovery has come to: the ``recovered`` of a point."""
    measure = _DISTANCES[recovered["measure"]]
    before, after = (measure.text(recovered[name]) for name in ("before", "after"))
    return (
        f"recovered: {measure.label}, {before} to {after}, with {_step(recovered)} kept, in "
        f"{recovered['seconds']:,.0f} s"
    )


def _spent(point: Point) -> str:
    """Write what a point came to as a share of its budget."""
    if point["limit"] is None:
        return ""
    spent = point["reached"] / point["limit"]
    return f"{spent:.1%}{' (over)' if spent > 1 + ROUNDING else ''}"


def parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """Yield what a sweep shows of itself."""
    points, varied = document["points"], _varied(document)
    yield _answer(document)
    yield sweep_table(document)
    yield from dense_remarks(document)
    yield from _pictures(points, varied)


def sweep_page(document: Mapping[str, Any]) -> str:
    """Return the page of a sweep, of the same document."""
    points, varied = document["points"], _varied(document)
    methods = dict.fromkeys(point["method"] for point in points)
    settings = Settings({"model": document["model"], **document["scored"]})
    settings |= Settings.of(document["settings"], PruningRequest)
    settings |= Settings.of(document["recover"] or {}, RecoveryRequest, "recover: ")
    return render(
        "sweep.html.j2",
        model=document["model"],
        answer=_answer(document),
        recovered=next((p["recovered"] for p in points if p["recovered"] is not None), None),
        remarks=list(dense_remarks(document)),
        points=sweep_table(document),
        methods=new_table("", "", "", rows=((name, _METHODS.get(name, "")) for name in methods)),
        pictures=list(_pictures(points, varied)),
        key=[(color, method) for method, color in _colors(points).items()],
        stages=stages_table(summed_stages(point["stages"] for point in points)),
        skipped=skipped_table(document["skipped"]),
        settings=settings | Settings(known=told(document["calibration"], "calibration")),
        shapes=", ".join("x".join(map(str, shape)) for shape in document["shapes"].values()),
    )


def sweep_verdict(document: Mapping[str, Any]) -> str:
    """Say in a sentence from which point of the method itself on much was lost; nothing if none."""
    varied, lost = _varied(document), []
    for point in document["points"]:
        of_run = {"recovery": point["recovered"], "calibration": document["calibration"]}
        said = verdict({**point, **of_run}) if point["method"] in METHODS else ""
        if said:
            lost.append((varied.text(point), said))
    if not lost:
        return ""
    (first, said), *others = lost
    also = (
        f"; much was also lost with {_listed((text for text, _ in others), ',')}" if others else ""
    )
    return f"with {varied.kind} {first}: {said}{also}"


def _answer(document: Mapping[str, Any]) -> str:
    """Say what the method itself comes to, how far the baselines are, and what was too much."""
    points, varied, lost = document["points"], _varied(document), sweep_verdict(document)
    dense = next(point for point in points if point["method"] == _DENSE)
    mine = [point for point in points if point["method"] in METHODS]
    known = _known(points)
    if not mine or not known:
        return "Nothing was measured of quality: the model puts out no logits."
    measure, last = known[0], mine[-1]
    told = [mine[0], mine[len(mine) // 2], last] if len(mine) > _TOLD else mine
    listed = _listed(
        f"{measure.text(measure.of(point))} with {varied.kind} {varied.text(point)}, at "
        f"{point['speedup']:.2f} times the speed"
        for point in told
    )
    others = [p for p in points if p["method"] in BASELINES and p["value"] == last["value"]]
    best = measure.best((measure.of(point), point["method"]) for point in others)
    against = (
        ""
        if best is None
        else f" The best baseline comes to {measure.text(best[0])} there ({best[1]})."
    )
    begins = measure.text(measure.of(dense))  # nothing where it is that of a comparison with it
    goes = f"goes from {begins} to" if begins else "comes to"
    too_much = f" {capitalized(lost)}." if lost else ""
    recovered = _after_recovery(known, told, others)
    return f"{measure.title} {goes} {listed}.{against}{recovered}{too_much}"


def _after_recovery(
    known: Sequence[_Measure], told: Sequence[Point], others: Sequence[Point]
) -> str:
    """Say what recovery brings the told points to, and whether the choice of units still pays."""
    measure = next((one for one in known if _is_recovered(one, told)), None)
    if measure is None:
        return ""
    listed = _listed((measure.text(measure.recovered(point)) for point in told), ",")
    best = measure.best((measure.recovered(point), point["method"]) for point in others)
    against = (
        ""
        if best is None
        else f"; the best baseline then comes to {measure.text(best[0])} ({best[1]})"
    )
    return f" Recovery brings {measure.label} to {listed}{against}."


def _listed(said: Iterable[str], mark: str = ";") -> str:
    *most, last = said
    return f"{f'{mark} '.join(most)}{mark} and {last}" if most else last


# ---- in pictures -------------------------------------------------------------------------


def _pictures(points: Sequence[Point], varied: _Varied) -> Iterator[dict[str, object]]:
    known = _known(points)
    divergence = [m for m in known if m.name in ("divergence", _HELD_OUT)]
    for measure in [m for m in known if m not in divergence] or known:
        better = "higher" if measure.more_is_better else "lower"
        yield picture(
            f"{measure.label} against speed",
            f"{measure.title} against speed, relative to the dense model (star); {better} and "
            f"further to the right is better. A bar spans half of the turns of its timing"
            f"{_dashed(measure, points)}.",
            _figure(
                *(points, measure, lambda p: float(p["speedup"]), "speed, times that of dense"),
                between=_between,
            ),
        )
    for measure in dict.fromkeys((*known[:1], *divergence)):
        dashed = _dashed(measure, points)
        predicted = [(varied.at(p), p["predicted"]) for p in points if p["predicted"] is not None]
        if not predicted or measure not in divergence[:1]:
            predicted = []
        figure = _figure(points, measure, varied.at, str(varied.kind), predicted=predicted)
        (axes,) = figure.axes
        if not varied.counts and varied.kind is not BudgetKind.SPEEDUP:
            axes.xaxis.set_major_formatter(SHARES)
        yield picture(
            f"{measure.label} against {varied.kind}",
            f"{measure.title} against {varied.kind}{dashed}"
            f"{'; dotted what was predicted' if predicted else ''}.",
            figure,
        )


def _dashed(measure: _Measure, points: Sequence[Point]) -> str:
    """Say what lines mean, at the end of a caption."""
    return "; dashed in one shot, solid recovered" if _is_recovered(measure, points) else ""


def _colors(points: Sequence[Point]) -> dict[str, str]:
    """Return the colour of each method, the same in all plots."""
    methods = dict.fromkeys(p["method"] for p in points if p["method"] != _DENSE)
    return dict(zip(methods, COLORS, strict=False))


def _figure(
    points: Sequence[Point],
    measure: _Measure,
    across: Callable[[Point], float],
    label: str,
    *,
    between: Callable[[Point], tuple[float, float]] | None = None,
    predicted: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Draw a measure over something, a line a method, which bears its name at its end."""
    figure, axes = small_figure()
    dense = next(point for point in points if point["method"] == _DENSE)
    level = 0.0 if measure.name == _HELD_OUT else measure.of(dense)
    log = _spans_decades(measure, points)
    start = [] if level is None or (log and not level) else [(across(dense), level)]
    ends = []
    for method, color in _colors(points).items():
        mine = [point for point in points if point["method"] == method]
        one_shot, recovered = (
            [(across(p), y) for p in mine if (y := of(p)) is not None]
            for of in (measure.of, measure.recovered)
        )
        if recovered:
            dashed = zip(*start, *one_shot, strict=True)
            axes.plot(*dashed, ".--", color=color, linewidth=0.8, alpha=0.6)
        if shown := recovered or one_shot:
            solid = zip(*start, *shown, strict=True)
            axes.plot(*solid, "o-", color=color, markersize=3.5, linewidth=1)
            ends.append((*shown[-1], method, color))
        if shown and between:
            lows, highs = zip(*map(between, mine), strict=True)
            levels = [y for _, y in shown]
            axes.hlines(levels, lows, highs, color=color, linewidth=3, alpha=0.2)
    if predicted:
        axes.plot(*zip(*start, *predicted, strict=True), ":", color=COLORS[0], linewidth=1.2)
    if start:
        axes.plot(*start[0], "k*", markersize=8, zorder=3)
        axes.axhline(start[0][1], color="k", linewidth=0.6, alpha=0.4)
    if log:
        axes.set_yscale("log")
    axes.margins(x=0.06, y=0.08)
    if measure.written.endswith("%"):
        axes.yaxis.set_major_formatter(SHARES)
    axes.set_xlabel(label)
    axes.set_ylabel(measure.label)
    label_lines(axes, ends)
    return figure


def _spans_decades(measure: _Measure, points: Sequence[Point]) -> bool:
    """Tell whether a scale has to be logarithmic for all points to be told apart."""
    values = [v for p in points for v in (measure.of(p), measure.recovered(p)) if v]
    return not measure.more_is_better and bool(values) and max(values) > 10 * min(values)
