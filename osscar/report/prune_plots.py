"""Plots of a pruning run, small enough that a phone shows them as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from osscar.report.figures import COLORS, ROOM_ABOVE, SHARES, legend, small_figure, whole_numbers

_KINDS = ("heads", "neurons", "channels")
_LOWEST = 1e-4
"""Of the largest divergence: what is less is not drawn, unless this run is there."""


def _color(kind: str) -> str:
    """Return the colour of a kind of units, the same in every plot."""
    return COLORS[_KINDS.index(kind)] if kind in _KINDS else COLORS[len(_KINDS)]


def kept_figure(groups: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the share that each group keeps, a line a kind."""
    figure, axes = small_figure()
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    for kind in kinds:
        kept = [one["kept"] / one["units"] for one in groups if one["kind"] == kind]
        at, look = range(1, len(kept) + 1), {"color": _color(kind), "label": kind}
        axes.plot(at, kept, "o-", markersize=3.5, linewidth=1, **look)
    axes.set_ylim(0, ROOM_ABOVE)
    axes.yaxis.set_major_formatter(SHARES)
    axes.xaxis.set_major_locator(whole_numbers())
    axes.set_xlabel("depth: groups of a kind, from the input on")
    axes.set_ylabel("kept")
    legend(figure, len(kinds))
    return figure


def loss_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the relative loss of each layer, and its bound."""
    figure, axes = small_figure()
    kinds = list(dict.fromkeys(layer["kind"] for layer in layers))
    for kind in kinds:
        mine = [(i, one) for i, one in enumerate(layers, 1) if one["kind"] == kind]
        at, losses = zip(*((i, one["relative_loss"]) for i, one in mine), strict=True)
        axes.vlines(at, 0, losses, color=_color(kind), linewidth=1, alpha=0.35)
        axes.plot(at, losses, "o", color=_color(kind), markersize=3.5, label=kind)
    bounds = [
        (i, max(0.0, one["relative_bound"]))
        for i, one in enumerate(layers, 1)
        if one["relative_bound"] is not None
    ]
    if bounds:
        # Hollow and larger, so that a loss that meets its bound is still seen.
        axes.plot(
            *zip(*bounds, strict=True), "s", color="#57606a", markersize=6, markerfacecolor="none",
            markeredgewidth=0.8, label="lower bound",
        )  # fmt: skip
    highest = max(layer["relative_loss"] for layer in layers)
    axes.set_ylim(0, ROOM_ABOVE * highest if highest > 0 else 1)
    axes.xaxis.set_major_locator(whole_numbers())
    axes.set_xlabel("layer, from the input on")
    axes.set_ylabel("relative loss")
    legend(figure, len(kinds) + bool(bounds))
    return figure


def frontier_figure(budget: Mapping[str, Any], measured: float | None) -> Figure:
    """Draw the predicted divergence over the budget, and where a run lies."""
    figure, axes = small_figure()
    frontier, dense = budget["frontier"], budget["dense"]
    reached, predicted = budget["reached"] / dense, budget["predicted"]
    curve = zip(frontier["cost"], frontier["nats"], strict=True)
    points = [(cost / dense, nats) for cost, nats in curve if nats > 0]
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
    highest = max([*here, *(nats for _, nats in points)], default=1.0)
    axes.set_ylim(min([*here, _LOWEST * highest]) / 3, 3 * highest)
    axes.xaxis.set_major_formatter(SHARES)
    axes.set_xlabel(f"{budget['cost']} kept")
    axes.set_ylabel("divergence, nats")
    legend(figure, 3)
    return figure
