"""Plots of a pruning run, small enough that a phone shows them as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from osscar.report.figures import (
    COLORS,
    ROOM_ABOVE,
    SHARES,
    legend,
    small_figure,
    tall_figure,
    whole_numbers,
)
from osscar.report.names import depths

_KINDS = ("heads", "neurons", "channels")
_APART = 0.24
"""Of the distance of two layers: how far two kinds of units of one layer are drawn apart."""

_LOWEST = 1e-4
"""Of the largest divergence: what is less is not drawn, unless this run is there."""


def _color(kind: str) -> str:
    """Return the colour of a kind of units, the same in every plot."""
    return COLORS[_KINDS.index(kind)] if kind in _KINDS else COLORS[len(_KINDS)]


def depth_figure(
    groups: Mapping[str, Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]
) -> Figure:
    """Draw over one axis of depth what each group keeps, and the loss of those that lost units.

    Parameters
    ----------
    groups
        By name, in the order of the model: ``kind``, ``units`` and ``kept``.
    layers
        As in ``osscar.prune/5``; all of them are among the groups.
    """
    figure, (above, below) = tall_figure()
    at, counted = depths(groups)
    kinds = list(dict.fromkeys(group["kind"] for group in groups.values()))
    for kind in kinds:
        mine = [name for name, group in groups.items() if group["kind"] == kind]
        kept = [groups[name]["kept"] / groups[name]["units"] for name in mine]
        look = {"color": _color(kind), "label": kind}
        above.plot([at[name] for name in mine], kept, "o-", markersize=3.5, linewidth=1, **look)
    above.set_ylim(0, ROOM_ABOVE)
    above.yaxis.set_major_formatter(SHARES)
    above.set_ylabel("kept")
    beside = dict(zip(kinds, _beside(len(kinds)), strict=True))  # a layer has units of two kinds
    bounded = _losses(below, [(at[one["name"]] + beside[one["kind"]], one) for one in layers])
    below.xaxis.set_major_locator(whole_numbers())
    below.set_xlabel(counted)
    below.set_ylabel("relative loss")
    legend(figure, len(kinds) + bounded)
    return figure


def _beside(kinds: int) -> list[float]:
    """Return how far kinds of units are drawn from where they lie, so that none hides another."""
    return [_APART * (index - (kinds - 1) / 2) for index in range(kinds)]


def _losses(axes: Axes, layers: Sequence[tuple[float, Mapping[str, Any]]]) -> bool:
    """Draw the relative loss of each layer, given with where it lies; tell if any has a bound."""
    for x, layer in layers:
        color, loss = _color(layer["kind"]), layer["relative_loss"]
        axes.vlines([x], 0, [loss], color=color, linewidth=1, alpha=0.35)
        axes.plot([x], [loss], "o", color=color, markersize=3.5)
    bounds = [
        (x, max(0.0, layer["relative_bound"]))
        for x, layer in layers
        if layer["relative_bound"] is not None
    ]
    if bounds:
        # Hollow and larger, so that a loss that meets its bound is still seen.
        axes.plot(
            *zip(*bounds, strict=True), "s", color="#57606a", markersize=6, markerfacecolor="none",
            markeredgewidth=0.8, label="lower bound",
        )  # fmt: skip
    highest = max((layer["relative_loss"] for _, layer in layers), default=0)
    axes.set_ylim(0, ROOM_ABOVE * highest if highest > 0 else 1)
    return bool(bounds)


def frontier_figure(budget: Mapping[str, Any], measured: float | None) -> Figure:
    """Draw the predicted divergence over the budget, and where a run lies."""
    figure, axes = small_figure()
    frontier, dense = budget["frontier"], budget["dense"]
    reached, predicted = budget["reached"] / dense, budget["predicted"]
    curve = zip(frontier["cost"], frontier["distance"], strict=True)
    points = [(cost / dense, distance) for cost, distance in curve if distance > 0]
    if points:
        axes.plot(*zip(*points, strict=True), "-", color=COLORS[0], linewidth=1.2, label="least")
    if predicted:
        axes.plot([reached], [predicted], "o", color=COLORS[0], markersize=7, label="predicted")
    if measured:
        axes.plot(
            [reached], [measured], "D", color=COLORS[1], markersize=7, markerfacecolor="none",
            markeredgewidth=1.5, label="measured",
        )  # fmt: skip
    axes.set_yscale("log")
    here = [value for value in (predicted, measured) if value]
    highest = max([*here, *(distance for _, distance in points)], default=1.0)
    axes.set_ylim(min([*here, _LOWEST * highest]) / 3, 3 * highest)
    axes.xaxis.set_major_formatter(SHARES)
    axes.set_xlabel(f"{budget['cost']} kept")
    axes.set_ylabel(
        "relative error of outputs" if budget["measure"] == "relative" else "divergence, nats"
    )
    legend(figure, 3)
    return figure
