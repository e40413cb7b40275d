"""Quality over size, as the pages of runs and of sweeps draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from osscar.report.figures import color, legend, new_figure, shares
from osscar.request import TargetKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_LOST = {TargetKind.PERPLEXITY: "rise of perplexity", TargetKind.TOP1: "drop of top-1"}


class Line(NamedTuple):
    """Sizes with the quality at each, how matplotlib draws them, and the bounds of the quality."""

    points: Sequence[tuple[float, float]]
    style: str
    color: str
    label: str | None = None
    bounds: Sequence[float] = ()
    alpha: float = 1.0


def draw_over_size(axes: Axes, lines: Sequence[Line], size: str) -> None:
    """Draw lines over the size, which is counted in `size`."""
    for line in filter(lambda line: line.points, lines):
        x, y = zip(*line.points, strict=True)
        look: Any = {"color": line.color, "alpha": line.alpha, "linewidth": 1.2, "markersize": 5}
        axes.plot(x, y, line.style, label=line.label, **look)
        if line.bounds:
            axes.vlines(x, y, line.bounds, color=line.color, linewidth=1.2)
            axes.plot(x, line.bounds, "_", color=line.color, markersize=8)
    axes.set_xlabel(size)


def frontier_figure(budget: Mapping[str, Any], measured: float | None) -> Drawing:
    """Draw the predicted distance over the budget, and where a run lies."""
    limit, highest = budget["limits"][0], max(budget["frontier"]["distance"])
    at = limit["reached"] / limit["dense"]
    here = (("predicted", "o", budget["predicted"]), ("measured", "D", measured))
    own = [
        Line([(at, value)], style, color(index), label)
        for index, (label, style, value) in enumerate(here, 1)
        if value
    ]
    figure, (axes,) = new_figure()
    draw_over_size(axes, [_least(budget), *own], f"{limit['cost']} kept")
    axes.set_yscale("log")
    # What is far below both ends of the curve and this run is not drawn.
    shown = [line.points[0][1] for line in own]
    axes.set_ylim(min([*shown, 1e-4 * highest]) / 3, 3 * max([*shown, highest]))
    axes.xaxis.set_major_formatter(shares)
    axes.set_ylabel(_distance(budget["measure"]))
    legend(figure)
    return figure


def target_figure(target: Mapping[str, Any], budget: Mapping[str, Any]) -> Drawing:
    """Draw what was measured at each size that was tried, with its bound, and what was chosen.

    The prediction is drawn where it is in the unit of the target.
    """
    kind, dense = TargetKind(target["quality"]), target["dense"]
    sizes = [walk["reached"] / dense for walk in target["walks"]]
    lost = [walk["measured"] for walk in target["walks"]]
    tried = [(size, one["value"]) for size, one in zip(sizes, lost, strict=True)]
    chosen, last = tried[target["chosen"]], target["reported"]
    lines = [
        Line(tried, "o", color(1), "walks", [one["bound"] for one in lost]),
        Line([(chosen[0], last["value"])], "D", color(2), "reported", [last["bound"]]),
    ]
    figure, (axes,) = new_figure()
    if kind is TargetKind.DIVERGENCE and budget["limits"][0]["cost"] == target["cost"]:
        wide = max(0.05, max(sizes) - min(sizes))
        least = _least(budget)
        near = [one for one in least.points if min(sizes) - wide <= one[0] <= max(sizes) + wide]
        lines.insert(0, least._replace(points=near))
    draw_over_size(axes, lines, f"{target['cost']} kept")
    axes.axhline(target["most"], color="k", linestyle="--", linewidth=0.9, label="target")
    axes.plot(*chosen, "o", color="k", markersize=11, markerfacecolor="none", label="chosen")
    if kind is TargetKind.DIVERGENCE:
        axes.set_yscale("log")
        axes.set_ylabel(_distance(target["measure"]))
    else:
        axes.yaxis.set_major_formatter(shares)
        axes.set_ylabel(_LOST[kind])
    axes.xaxis.set_major_formatter(shares)
    legend(figure)
    return figure


def _least(budget: Mapping[str, Any]) -> Line:
    """Return the least predicted distance at each size; a logarithm shows no zero."""
    points = zip(budget["frontier"]["cost"], budget["frontier"]["distance"], strict=True)
    least = [(cost / budget["limits"][0]["dense"], at) for cost, at in points if at > 0]
    return Line(least, "-", color(0), "least")


def _distance(measure: str) -> str:
    return "relative error" if measure == "relative" else "divergence, nats"
