"""The page of a pruning run, made of its JSON document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osscar.base.printable import counted
from osscar.report.estimate_tables import comparison_line
from osscar.report.evaluation_tables import dense_remarks, shown_numbers
from osscar.report.numbers import engineering, in_bytes, share
from osscar.report.page import Picture, render
from osscar.report.prune_plots import Bar, Frontier, frontier_figure, kept_figure, loss_figure
from osscar.shrinking.program.input_sizes import fixed_in_words
from osscar.walk.layer_step import GROWN

_KEEPS = ("heads", "neurons", "channels", "residual")
_BUDGETS: dict[str, Callable[[Any], str]] = {
    "sparsity": lambda v: f"remove {share(v)} of the parameters of heads, neurons and channels",
    "params": lambda v: f"keep {v} of the parameters",
    "size": lambda v: f"let the weights take {v} on disk",
    "flops": lambda v: f"keep {share(v)} of the floating-point operations",
    "speedup": lambda v: f"{v:g} times the speed",
}
"""What a budget asks for, in words."""

_COSTS = {
    "parameters": "parameters",
    "bytes": "bytes of weights",
    "flops": "floating-point operations",
    "time": "time of a forward pass",
}


_QUALITY = ("perplexity", "top-1")
"""Rows of an evaluation that the sentence at the top repeats."""


@dataclass(frozen=True)
class _Row:
    """A number of the dense model beside that of the pruned one, as text."""

    label: str
    dense: str
    pruned: str
    ratio: str = ""

    @classmethod
    def of(cls, label: str, dense: float, pruned: float, written: Any) -> _Row:
        ratio = f"{pruned / dense:.2f}x" if dense else ""
        return cls(label, written(dense), written(pruned), ratio)


def prune_page(document: Mapping[str, Any]) -> str:
    """Return the page of a run.

    Parameters
    ----------
    document
        An ``osscar.prune/3``, as ``docs/json.md`` describes it, such as ``osscar_report.json``.
        What it does not hold is left out.
    """
    budget = document.get("budget")
    return render(
        "prune.html.j2",
        model=document["model"],
        answer=_answer(document),
        asked_shortly=_in_words(document["settings"]),
        rows=list(_rows(document)),
        remarks=list(_remarks(document)),
        predictions=list(_predictions(document)),
        pictures=list(_pictures(document)),
        layers=document["layers"],
        left_alone=document.get("left_alone") or [],
        predicted={
            name: width["predicted"] for name, width in ((budget or {}).get("widths") or {}).items()
        },
        comparable=budget is None or budget["comparable"],
        bounded=any(layer["lower_bound"] is not None for layer in document["layers"]),
        document=document,
        asked=_asked(document),
    )


# ---- in words ----------------------------------------------------------------------------


def _answer(document: Mapping[str, Any]) -> str:
    """Say in one sentence what became of the model."""
    before, after = document["parameters_before"], document["parameters_after"]
    said = [f"{share(1 - after / before)} fewer parameters"]
    forward = document.get("forward")
    if forward is not None:
        dense, pruned = forward["dense"], forward["pruned"]
        if dense["flops"]:
            said.append(f"{share(1 - pruned['flops'] / dense['flops'])} fewer operations")
        if pruned["seconds"]:
            said.append(f"{dense['seconds'] / pruned['seconds']:.2f} times the speed")
    sentence = f"{', '.join(said[:-1])} and {said[-1]}" if said[1:] else said[0]
    for row in _rows(document):
        if row.label in _QUALITY:
            sentence += f"; {row.label} goes from {row.dense} to {row.pruned}"
    divergence = document.get("divergence")
    if divergence is not None:
        held = document.get("held_out")
        on = f"on {counted(held, 'held-out sample')}" if held else "on calibration samples"
        sentence += (
            f"; the predictions diverge from the dense model's by {_nats(divergence)} nats {on}"
        )
    return sentence + "."


def _in_words(settings: Mapping[str, Any]) -> str:
    """Say in one line what was asked."""
    said = [
        write(settings[name]) for name, write in _BUDGETS.items() if settings.get(name) is not None
    ]
    if said:
        said.append(f"shared out by {settings.get('allocation', 'curvature')}")
    if settings.get("at_least"):
        said.append(f"at least {settings['at_least']} of each group")
    said += [f"keep {settings[kind]} of the {kind}" for kind in _KEEPS if settings.get(kind)]
    if settings.get("groups"):
        said.append(counted(len(settings["groups"]), "group") + " by name")
    return f"{', '.join(said)}; backend {settings['backend']}"


def _asked(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what was asked by name, without what was not."""
    data = {f"calibration {key}": value for key, value in document["calibration"].items()}
    for kind in ("calibration images", "calibration fingerprints"):
        if kind in data:
            data[kind] = len(data[kind])
    computed = {f"computed: {key}": v for key, v in document.get("computed", {}).items()}
    asked = {"model": document["model"], **document["settings"], **data, **computed}
    return {
        key.replace("_", " "): _as_text(value)
        for key, value in asked.items()
        if value is not None and value is not False and value not in ("", [], {})
    }


def _as_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_as_text(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _remarks(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has to be known of the numbers."""
    yield from dense_remarks(document)
    error = document["equivalence_error"]
    yield f"The smaller model's outputs equal the masked model's to {error:.1e} of the largest."
    yield from _of_refits(document)
    fixed = fixed_in_words(document.get("inputs", ()))
    if fixed:
        yield f"{fixed[0].upper()}{fixed[1:]}."
    if document["batch_norms"]:
        mode = document["settings"]["batch_norm"]
        layers = counted(document["batch_norms"], "batch-norm layer")
        yield f"The statistics of {layers} are new ({mode})."
    if document.get("forward") is not None:
        yield "Times are medians of a few turns, and as rough as that."
    if document.get("estimate") is not None:
        yield f"Up to its save, this run was {comparison_line(document['estimate'])}."
    if document.get("evaluation") is None:
        yield "Quality on data of your own is what osscar eval measures."


def _of_refits(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what held-out samples said of refits, and which weights grew beyond reason."""
    layers = document["layers"]
    dense = [label for layer in layers for label in layer.get("unrefitted", ())]
    if dense:
        yield (
            f"Dense weights did better than a refit on held-out samples, and stay but for the "
            f"units that leave: {', '.join(dense)}."
        )
    for layer in layers:
        if layer.get("growth", 0) > GROWN:
            yield (
                f"The refit made the largest weight that reads {layer['name']} "
                f"{layer['growth']:.3g} times as large as the largest dense one."
            )
    if layers and document.get("held_out") == 0:
        yield "Nothing was held out, so that no refit was compared with none on fresh samples."


# ---- in numbers --------------------------------------------------------------------------


def _nats(value: float) -> str:
    if value >= 0.001 or not value:
        return f"{value:.4f}"
    return f"{value:.6f}" if value >= 1e-5 else f"{value:.1e}"


def _rows(document: Mapping[str, Any]) -> Iterator[_Row]:
    """Yield what is known of the dense and of the pruned model."""
    evaluation, forward = document.get("evaluation"), document.get("forward")
    if evaluation is not None:
        yield from _evaluated(evaluation)
    else:
        before, after = document["parameters_before"], document["parameters_after"]
        yield _Row.of("parameters", before, after, "{:,}".format)
    if forward is not None and evaluation is None:
        yield from _passed(forward)
    if document.get("divergence") is not None:
        yield _Row("divergence from dense, nats", "0", _nats(document["divergence"]))


def _passed(forward: Mapping[str, Any]) -> Iterator[_Row]:
    """Yield the rows of a forward pass of one sample."""
    dense, pruned = forward["dense"], forward["pruned"]
    shapes = ", ".join("x".join(map(str, shape)) for shape in forward["shapes"].values())
    for name, label, written in (
        ("parameter_bytes", "weights in memory", in_bytes),
        ("flops", f"FLOPs of one sample ({shapes})", engineering),
        ("seconds", f"time of one sample ({forward['device']})", _milliseconds),
    ):
        yield _Row.of(label, dense[name], pruned[name], written)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _evaluated(evaluation: Mapping[str, Any]) -> Iterator[_Row]:
    """Yield the rows of an evaluation beside that of the dense model."""

    def shown(one: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        numbers = {**one["quality"], **one["speed"], **one["footprint"]}
        return shown_numbers(numbers, one["sample"])

    dense = {name: text for name, _, text in shown(evaluation["dense"])}
    for name, label, text in shown(evaluation["model"]):
        ratio = evaluation["ratios"].get(name)
        yield _Row(label, dense.get(name, ""), text, "" if ratio is None else f"{ratio:.2f}x")


def _predictions(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the budget came to, and what was predicted and measured."""
    budget, measured = document.get("budget"), document.get("divergence")
    if budget is None:
        return
    what = _COSTS[budget["cost"]]
    yield f"budget ({what})", f"at most {_cost(budget, 'limit')}"
    yield "reached", f"{_cost(budget, 'reached')} ({share(budget['reached'] / budget['dense'])})"
    predicted = budget["predicted"]
    if predicted is not None:
        yield "predicted divergence, nats", _nats(predicted)
    if budget["lower_bound"] is not None:
        yield "no widths within the budget have less than", _nats(max(0.0, budget["lower_bound"]))
    if measured is not None:
        yield "measured divergence, nats", _nats(measured)
    if measured is not None and predicted:
        yield "measured over predicted", f"{measured / predicted:.2f}"


def _cost(budget: Mapping[str, Any], name: str) -> str:
    """Write a cost; times are shares of the dense model's."""
    value = budget[name]
    return f"{value:.3f} of dense" if budget["cost"] == "time" else f"{value:,.0f}"


# ---- in pictures -------------------------------------------------------------------------


def _pictures(document: Mapping[str, Any]) -> Iterator[Picture]:
    layers, budget = document["layers"], document.get("budget") or {}
    bounded = any(layer["lower_bound"] is not None for layer in layers)
    bars = _bars(layers, budget.get("widths") or {})
    if bars:
        yield Picture.of(
            "kept share over depth",
            "What stays of each group of units, in the order of the model.",
            kept_figure(bars),
        )
    if layers:
        yield Picture.of(
            "loss of each layer",
            "Loss of each layer that lost units, relative to the loss of removing all of them"
            + ("; no other choice of as many units can beat the lower bound." if bounded else "."),
            loss_figure(layers),
        )
    frontier = budget.get("frontier") or {"cost": [], "nats": []}
    if len(frontier["cost"]) > 1:
        yield Picture.of(
            "divergence over the budget",
            "The least predicted divergence at every budget, and where this run lies: as "
            "predicted, and as measured.",
            frontier_figure(
                Frontier(
                    tuple(cost / budget["dense"] for cost in frontier["cost"]),
                    tuple(frontier["nats"]),
                ),
                reached=budget["reached"] / budget["dense"],
                predicted=budget["predicted"],
                measured=document.get("divergence"),
                what=_COSTS[budget["cost"]],
            ),
        )


def _bars(layers: Sequence[Mapping[str, Any]], widths: Mapping[str, Any]) -> list[Bar]:
    """Return the share kept of each group: those that share a budget, then the others."""
    sized = {**widths, **{one["name"]: one for one in layers if one["name"] not in widths}}
    return [Bar(one["kind"], one["kept"] / one["units"]) for one in sized.values()]
