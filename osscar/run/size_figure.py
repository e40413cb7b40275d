"""Quality over size, as the pages of runs and of sweeps draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from osscar.report.figures import color, legend, new_figure, shares
from osscar.request import TargetKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_LOST = {TargetKind.PERPLEXITY: "rise of perplexity", TargetKind.TOP1: "drop of top-1"}


def plot(axes: Axes, points: Sequence[tuple[float, float]], style: str, **look: Any) -> None:
    """Plot points, if there are any, in the line width and marker size of all these figures."""
    if points:
        axes.plot(*zip(*points, strict=True), style, linewidth=1.2, markersize=5, **look)


def frontier_figure(budget: Mapping[str, Any], measured: float | None) -> Drawing:
    """Draw the predicted distance over the budget, and where a run lies."""
    limit, highest = budget["limits"][0], max(budget["frontier"]["distance"])
    at = limit["reached"] / limit["dense"]
    figure, (axes,) = new_figure()
    plot(axes, _least(budget), "-", color=color(0), label="least")
    shown = [highest]
    for index, (label, value) in enumerate(
        (("predicted", budget["predicted"]), ("measured", measured))
    ):
        if value:
            plot(axes, [(at, value)], "oD"[index], color=color(index + 1), label=label)
            shown.append(value)
    axes.set_yscale("log")
    # What is far below both ends of the curve and this run is not drawn.
    axes.set_ylim(min([*shown, 1e-4 * highest]) / 3, 3 * max(shown))
    axes.xaxis.set_major_formatter(shares)
    axes.set_xlabel(f"{limit['cost']} kept")
    axes.set_ylabel(_distance(budget["measure"]))
    legend(figure)
    return figure


def target_figure(target: Mapping[str, Any], budget: Mapping[str, Any]) -> Drawing:
    """Draw what was measured at each size that was tried, with its bound, and what was chosen.

    The prediction is drawn where it is in the unit of the target.
    """
    kind, chosen = TargetKind(target["quality"]), target["chosen"]
    sizes = [walk["reached"] / target["dense"] for walk in target["walks"]]
    figure, (axes,) = new_figure()
    if kind is TargetKind.DIVERGENCE and budget["limits"][0]["cost"] == target["cost"]:
        wide = max(0.05, max(sizes) - min(sizes))
        low, high = min(sizes) - wide, max(sizes) + wide
        near = [point for point in _least(budget) if low <= point[0] <= high]
        plot(axes, near, "-", color=color(0), label="least")
    walks = [walk["measured"] for walk in target["walks"]]
    for label, style, index, at, lost in (
        ("walks", "o", 1, sizes, walks),
        ("reported", "D", 2, [sizes[chosen]], [target["reported"]]),
    ):
        values, bounds = [one["value"] for one in lost], [one["bound"] for one in lost]
        plot(axes, [*zip(at, values, strict=True)], style, color=color(index), label=label)
        axes.vlines(at, values, bounds, color=color(index), linewidth=1.2)
        axes.plot(at, bounds, "_", color=color(index), markersize=8)
    axes.axhline(target["most"], color="k", linestyle="--", linewidth=0.9, label="target")
    ring: Any = {"color": "k", "markersize": 11, "markerfacecolor": "none", "label": "chosen"}
    axes.plot(sizes[chosen], walks[chosen]["value"], "o", **ring)
    if kind is TargetKind.DIVERGENCE:
        axes.set_yscale("log")
        axes.set_ylabel(_distance(target["measure"]))
    else:
        axes.yaxis.set_major_formatter(shares)
        axes.set_ylabel(_LOST[kind])
    axes.xaxis.set_major_formatter(shares)
    axes.set_xlabel(f"{target['cost']} kept")
    legend(figure)
    return figure


def _least(budget: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the least predicted distance at each size; a logarithm shows no zero."""
    points = zip(budget["frontier"]["cost"], budget["frontier"]["distance"], strict=True)
    return [(cost / budget["limits"][0]["dense"], at) for cost, at in points if at > 0]


def _distance(measure: str) -> str:
    return "relative error" if measure == "relative" else "divergence, nats"
