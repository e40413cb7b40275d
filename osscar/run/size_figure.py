"""Quality over size: one panel, which the pages of runs and of sweeps draw alike."""

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
    """Points of one sort: sizes, and the quality at each."""

    points: Sequence[tuple[float, float]]
    style: str
    """Marker and line, as matplotlib has them."""
    color: str
    label: str | None = None
    bounds: Sequence[float] = ()
    """What the quality of each is at most, if that is known."""
    alpha: float = 1.0


def draw_over_size(
    axes: Axes,
    lines: Sequence[Line],
    size: str,
    target: float | None = None,
    chosen: tuple[float, float] | None = None,
) -> None:
    """Draw lines, with the target and the point that was chosen, where there are any."""
    for line in lines:
        if not line.points:
            continue
        x, y = zip(*line.points, strict=True)
        look: Any = {"color": line.color, "alpha": line.alpha, "linewidth": 1.2, "markersize": 5}
        axes.plot(x, y, line.style, label=line.label, **look)
        if line.bounds:
            axes.vlines(x, y, line.bounds, color=line.color, linewidth=1.2)
            axes.plot(x, line.bounds, "_", color=line.color, markersize=8)
    if target is not None:
        axes.axhline(target, color="k", linestyle="--", linewidth=0.9, label="target")
    if chosen is not None:
        axes.plot(*chosen, "o", color="k", markersize=11, markerfacecolor="none", label="chosen")
    axes.set_xlabel(size)


def frontier_figure(budget: Mapping[str, Any], measured: float | None) -> Drawing:
    """Draw the predicted distance over the budget, and where a run lies."""
    limit, highest = budget["limits"][0], max(budget["frontier"]["distance"])
    at = limit["reached"] / limit["dense"]
    here = {"predicted": budget["predicted"], "measured": measured}
    own = [
        Line([(at, value)], "oD"[index], color(index + 1), label)
        for index, (label, value) in enumerate(here.items())
        if value
    ]
    figure, (axes,) = new_figure()
    draw_over_size(axes, [_least(budget), *own], f"{limit['cost']} kept")
    axes.set_yscale("log")
    # What is far below both ends of the curve and this run is not drawn.
    shown = [value for value in here.values() if value]
    axes.set_ylim(min([*shown, 1e-4 * highest]) / 3, 3 * max([*shown, highest]))
    axes.xaxis.set_major_formatter(shares)
    axes.set_ylabel(_distance(budget["measure"]))
    legend(figure)
    return figure


def target_figure(target: Mapping[str, Any], budget: Mapping[str, Any]) -> Drawing:
    """Draw what was measured at each size that was tried, with its bound, and what was chosen.

    Parameters
    ----------
    target, budget
        As in ``osscar.prune/5``; a prediction is drawn where it is in what the target is in.
    """
    kind, dense, most = TargetKind(target["quality"]), target["dense"], target["most"]
    walks = [(walk["reached"] / dense, walk["measured"]) for walk in target["walks"]]
    at, last = walks[target["chosen"]][0], target["reported"]
    tried = [(size, lost["value"]) for size, lost in walks]
    lines = [
        Line(tried, "o", color(1), "walks", [lost["bound"] for _, lost in walks]),
        Line([(at, last["value"])], "D", color(2), "reported", [last["bound"]]),
    ]
    sizes = [size for size, _ in tried]
    wide = max(0.05, max(sizes) - min(sizes))
    figure, (axes,) = new_figure()
    if kind is TargetKind.DIVERGENCE and budget["limits"][0]["cost"] == target["cost"]:
        least, ends = _least(budget), (min(sizes) - wide, max(sizes) + wide)
        near = [point for point in least.points if ends[0] <= point[0] <= ends[1]]
        lines.insert(0, least._replace(points=near))
    draw_over_size(axes, lines, f"{target['cost']} kept", most, tried[target["chosen"]])
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
    """Return the least predicted distance at each size, but for those without any."""
    points = zip(budget["frontier"]["cost"], budget["frontier"]["distance"], strict=True)
    least = [(cost / budget["limits"][0]["dense"], at) for cost, at in points if at > 0]
    return Line(least, "-", color(0), "least")


def _distance(measure: str) -> str:
    return "relative error" if measure == "relative" else "divergence, nats"
