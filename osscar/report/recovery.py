"""What a recovery came to, in words, in a table and in a picture, made of its document alone.

That is what `Recovery.document` returns: the ``recovery`` of ``osscar.recover`` and
``osscar.prune``, as ``docs/json.md`` describes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import lazy_loader
from rich.table import Table

from osscar.base.printable import capitalized, pluralize
from osscar.recovery.request import RecoveryRequest
from osscar.report.page import Part, Settings, told
from osscar.report.stages import stages_table
from osscar.report.tables import new_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from osscar.report import figures
else:  # a terminal needs no picture
    figures = lazy_loader.load("osscar.report.figures", suppress_warning=True)

_DISTANCES = {
    "nats": "divergence from the dense predictions, nats",
    "relative": "squared error of the outputs, relative to the dense ones",
    "loss": "the given loss",
}
"""What a distance on held-out samples is, by its measure."""

_UNITS = {"nats": "nats a prediction", "relative": "of the squared outputs", "loss": "of the loss"}


def recovery_lines(recovery: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a terminal is told of a recovery."""
    settings, points = recovery["settings"], recovery["points"]
    yield f"held out: {_outcome(recovery)}"
    rank = recovery["chosen"]["lora"]
    weights = f"weights (adapters, rank {rank})" if rank else "weights"
    trained = pluralize(recovery["samples"], "sample")
    bf16 = recovery["chosen"]["mixed_precision"] == "bf16"
    yield (
        f"training: {recovery['trained']:,} {weights} on {trained}, matrix products in "
        f"{'bfloat16' if bf16 else 'the format of the weights'}"
    )
    first, last = points[0]["rate"], points[-1]["rate"]
    lowered = "" if first == last else f", lowered to {last:g} as the held-out loss rose"
    yield f"learning rate: {first:g}{lowered}"
    if points[-1]["step"] < settings["steps"]:
        yield (
            f"stopped: after {points[-1]['step']} of {settings['steps']} steps, as the held-out "
            "loss rose again and again"
        )


def _outcome(recovery: Mapping[str, Any]) -> str:
    """Say what became of the distance from the dense model."""
    unit, after = _UNITS[recovery["measure"]], _number(recovery["after"])
    before = f"{_number(recovery['before'])} {unit} from the dense model"
    took = f"on {pluralize(recovery['held_out'], 'sample')}, in {recovery['seconds']:.1f} s"
    if not recovery["kept"]:
        return f"{before} was the nearest, {took}; the weights are those that it came with"
    return f"{before} became {after} by step {recovery['kept']}, {took}"


def recovery_table(recovery: Mapping[str, Any]) -> Table:
    """Return one row for each look at the held-out samples."""
    return new_table(
        _DISTANCES[recovery["measure"]],
        *("step >", "training >", "held out >", "seconds >", "kept"),
        rows=(
            (
                str(point["step"]),
                _number(point["loss"]) if index else "",
                _number(point["held_out"]),
                f"{point['seconds']:.1f}",
                "yes" if point["step"] == recovery["kept"] else "",
            )
            for index, point in enumerate(recovery["points"])
        ),
    )


def parts(recovery: Mapping[str, Any]) -> Iterator[Part]:
    """Yield what a recovery shows of itself."""
    section = recovery_section(recovery)
    yield from section["sentences"]
    yield section["table"]
    yield section["picture"]


def _number(value: float | None) -> str:
    """Return a distance with four digits, which tell looks apart that differ by little."""
    if value is None:
        return "not finite"
    if value and value < 1e-5:
        return f"{value:.3e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(value or 1.0)))}f}"


def recovery_section(recovery: Mapping[str, Any]) -> dict[str, Any]:
    """Return what pages show of a recovery."""
    caption = (
        "Distance of the smaller model from the dense one during the training, on a part of the "
        "held-out samples. The nearest step is kept if it is nearer on all of them, too."
    )
    return {
        "sentences": [f"{capitalized(line)}." for line in recovery_lines(recovery)],
        "picture": figures.picture("recovery", caption, recovery_figure(recovery)),
        "table": recovery_table(recovery),
        "stages": stages_table(recovery["stages"]),
    }


def recovery_settings(recovery: Mapping[str, Any], name: str = "") -> Settings:
    """Return what was asked of a recovery, what is as by default, and what is known of its data.

    The name tells its settings from those of something else beside them.
    """
    prefix = f"{name}: " if name else ""
    found = Settings.of(recovery["settings"], RecoveryRequest, prefix, recovery["chosen"])
    return found | Settings(known=told(recovery["data"], f"{name} data:".strip()))


def recovery_figure(recovery: Mapping[str, Any]) -> Figure:
    """Draw the distance from the dense model over the steps."""
    figure, axes = figures.small_figure()
    points = [point for point in recovery["points"] if point["held_out"] is not None]
    losses = [point for point in recovery["points"] if point["loss"] is not None]
    at, held = zip(*((point["step"], point["held_out"]) for point in points), strict=True)
    axes.plot(at, held, "o-", color=figures.COLORS[0], markersize=4, label="held out")
    if losses:
        axes.plot(
            [point["step"] for point in losses], [point["loss"] for point in losses],
            "--", color=figures.COLORS[1], linewidth=1, label="training",
        )  # fmt: skip
    kept = next(point for point in recovery["points"] if point["step"] == recovery["kept"])
    axes.plot(
        [kept["step"]], [kept["held_out"]], "o", color=figures.COLORS[2], markersize=9,
        markerfacecolor="none", markeredgewidth=1.5, label="kept",
    )  # fmt: skip
    top = max([*held, *(point["loss"] for point in losses)])
    axes.set_ylim(0, figures.ROOM_ABOVE * top if top > 0 else 1)
    axes.xaxis.set_major_locator(figures.whole_numbers())
    axes.set_xlabel("steps")
    axes.set_ylabel(_UNITS[recovery["measure"]])
    figures.legend(figure, 3)
    return figure
