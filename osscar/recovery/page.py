"""What a recovery shows, made of its document alone: in a page of its own, or in that of a run.

That is what `Recovery.document` returns: the ``recovery`` of ``osscar.recover`` and
``osscar.prune``, as ``docs/json.md`` describes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from osscar.base.printable import pluralize, share
from osscar.distance.distance import Compared
from osscar.recovery.request import RecoveryRequest
from osscar.report.sections import (
    Figure,
    Section,
    Table,
    Text,
    described,
    facts,
    from_zero,
    legend,
    new_figure,
    settings,
    settings_table,
    stages_table,
    table,
)
from osscar.report.shown import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_UNITS = {
    "nats": "nats a prediction",
    "relative": "of the squared dense outputs",
    "own": "by the given distance",
}
"""The unit of the distance from the dense model, by its measure."""


def recover_page(document: Mapping[str, Any], directory: str = "recovered") -> str:
    """Return the page of a recovery, an ``osscar.recover/2``, whose model a directory holds."""
    recovery = document["recovery"]
    asked = {name: document[name] for name in ("model", "dense")}
    shown = [
        *sections(recovery),
        loading_text(document, directory),
        settings_table(
            settings(asked),
            recovery_settings(recovery),
            settings({"parameters": document["parameters"]}, origin="model"),
            settings(document["computed"], prefix="computed: ", origin="model"),
        ),
    ]
    return page(f"{document['model']}, recovered", shown)


def loading_text(document: Mapping[str, Any], directory: str) -> Text:
    """Return how the model in a directory is loaded."""
    dense = ", dense=dense" if document["own_code"] else ""
    lines = (
        f'model = osscar.load("{directory}"{dense})',
        "# README.md says whether transformers reads the directory as well",
    )
    return Text(lines, "How to load it", "code")


def sections(recovery: Mapping[str, Any]) -> Iterator[Section]:
    """Yield what a recovery shows of itself."""
    yield facts("Recovery", recovery_facts(recovery))
    yield Figure(
        "recovery",
        "Distance of the smaller model from the dense one during the training, on a part of the "
        "held-out samples. The nearest step is kept if it is nearer on all of them, too.",
        partial(recovery_figure, recovery),
    )
    yield recovery_table(recovery)
    yield stages_table(recovery["stages"], "Where the time of the recovery went")


def recovery_facts(recovery: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what became of the distance from the dense model, each with a name."""
    chosen, points = recovery["chosen"], recovery["points"]
    unit, steps = _UNITS[recovery["distance"]["measure"]], recovery["settings"]["steps"]
    kept = f"step {recovery['kept']}" if recovery["kept"] else "the weights that it came with"
    yield (
        "recovered",
        f"{_number(recovery['before'])} {unit} from the dense model became "
        f"{_number(recovery['after'])} on {pluralize(recovery['held_out'], 'held-out sample')}; "
        f"kept: {kept}; {recovery['seconds']:.1f} s",
    )
    yield "distance", str(Compared(**recovery["distance"]))
    bf16, rank = chosen["mixed_precision"] == "bf16", recovery["settings"]["lora"]
    yield (
        "training",
        f"{recovery['trained']:,} weights"
        f"{f' (adapters, rank {rank})' if rank else ''} on "
        f"{pluralize(recovery['samples'], 'sample')}, matrix products in "
        f"{'bfloat16' if bf16 else 'the format of the weights'}",
    )
    first, last = points[0]["rate"], points[-1]["rate"]
    lowered = "" if first == last else f", lowered to {last:g} as the held-out loss rose"
    yield "learning rate", f"{first:g}{lowered}"
    if points[-1]["step"] < steps:
        yield (
            "stopped",
            f"after {points[-1]['step']} of {steps} steps, as the held-out loss rose again and "
            "again",
        )


def recovery_table(recovery: Mapping[str, Any]) -> Table:
    """Return one row for each check, relative to the first."""
    first = recovery["points"][0]["held_out"]

    def held_out(value: float | None) -> str:
        return "not finite" if value is None else share(value / first if first else 1.0, 4)

    return table(
        f"Distance from the dense model, {_UNITS[recovery['distance']['measure']]}",
        {
            "step >": lambda point: str(point["step"]),
            "training >": lambda point: _number(point["loss"]) if point["step"] else "",
            "held out, of the start >": lambda point: held_out(point["held_out"]),
            "seconds >": lambda point: f"{point['seconds']:.1f}",
            "kept": lambda point: "yes" if point["step"] == recovery["kept"] else "",
        },
        recovery["points"],
    )


def _number(value: float | None) -> str:
    """Return a distance with four digits, which tell checks apart that differ by little."""
    return "not finite" if value is None else f"{value:.4g}"


def recovery_settings(
    recovery: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yield what was asked of a recovery, what it chose, and what is known of its data."""
    yield from settings(recovery["settings"], RecoveryRequest, prefix, recovery["chosen"])
    yield from described(recovery["data"], f"{prefix}data:")


def recovery_figure(recovery: Mapping[str, Any]) -> Drawing:
    """Draw the distance from the dense model over the steps."""
    figure, (axes,) = new_figure()
    for index, (name, label, style) in enumerate(
        (("held_out", "held out", "o-"), ("loss", "training", "--"))
    ):
        points = [(p["step"], p[name]) for p in recovery["points"] if p[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=f"C{index}", markersize=4,
                      linewidth=1, label=label)  # fmt: skip
    kept = next(point for point in recovery["points"] if point["step"] == recovery["kept"])
    axes.plot([kept["step"]], [kept["held_out"]], "o", color="C2", markersize=9,
              markerfacecolor="none", markeredgewidth=1.5, label="kept")  # fmt: skip
    from_zero(axes)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_xlabel("steps")
    axes.set_ylabel(_UNITS[recovery["distance"]["measure"]])
    legend(figure)
    return figure
