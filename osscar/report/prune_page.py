"""The page of a pruning run, made of its JSON document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from osscar.allocation.measured import FEWEST
from osscar.base.printable import are, capitalized, pluralize
from osscar.preparation.consumer import MOST_ROWS
from osscar.report.evaluation_tables import comparison_rows, dense_remarks
from osscar.report.figures import picture
from osscar.report.page import asked_table, render
from osscar.report.prune_plots import frontier_figure, kept_figure, loss_figure
from osscar.report.recovery import recovery_asked, recovery_section
from osscar.report.run_tables import layers_table, skipped_table
from osscar.report.summary import proofs_in_words
from osscar.report.tables import engineering, in_bytes, new_table, share
from osscar.request import BudgetKind
from osscar.shrinking.program.input_sizes import fixed_in_words
from osscar.study.records import ProofBasis
from osscar.walk.layer_step import GROWN

_KEEPS = ("heads", "neurons", "channels", "residual")
_WORTH_TELLING = 0.01
"""Of a budget: what is left of it that a line tells of."""

_BARE = ("dead", "held out", "proofs", "size", "gradients")
"""Kinds of lines that a terminal shows without their kind in front."""

_QUALITY = ("perplexity", "top-1")
"""Rows of an evaluation that the sentence at the top repeats."""


def prune_page(document: Mapping[str, Any]) -> str:
    """Return the page of a run.

    Parameters
    ----------
    document
        An ``osscar.prune/5``, as ``docs/json.md`` describes it, such as ``osscar_report.json``.
        What it does not hold is left out.
    """
    computed = {f"computed: {key}": v for key, v in document.get("computed", {}).items()}
    recovery = document.get("recovery")
    asked = {"model": document["model"], **document["settings"], **computed}
    asked |= recovery_asked(recovery) if recovery else {}
    return render(
        "prune.html.j2",
        document=document,
        answer=_answer(document),
        asked_shortly=_in_words(document["settings"]),
        compared=new_table("", "", "dense >", "pruned >", "ratio >", rows=_rows(document)),
        remarks=list(_remarks(document)),
        recovery=recovery and recovery_section(recovery),
        pictures=list(_pictures(document)),
        layers=layers_table(document["layers"], document.get("budget")),
        columns=list(_columns(document)),
        bounded=_bounded(document),
        skipped=skipped_table(document.get("skipped") or ()),
        asked=asked_table(asked, document["calibration"]),
    )


def _bounded(document: Mapping[str, Any]) -> bool:
    return any(layer["lower_bound"] is not None for layer in document["layers"])


# ---- in words ----------------------------------------------------------------------------


def _answer(document: Mapping[str, Any]) -> str:
    """Say in one sentence what became of the model."""
    kept = document["parameters_after"] / document["parameters_before"]
    said = [f"{share(1 - kept)} fewer parameters"]
    forward = document.get("forward")
    if forward is not None:
        dense, pruned = forward["dense"], forward["pruned"]
        if dense["flops"]:
            said.append(f"{share(1 - pruned['flops'] / dense['flops'])} fewer operations")
        if pruned["seconds"]:
            said.append(f"{dense['seconds'] / pruned['seconds']:.2f} times the speed")
    sentence = f"{', '.join(said[:-1])} and {said[-1]}" if said[1:] else said[0]
    for label, before, after, _ in _rows(document):
        if label in _QUALITY:
            sentence += f"; {label} goes from {before} to {after}"
    divergence = document.get("divergence")
    if divergence is not None:
        held = document.get("held_out")
        on = f"on {pluralize(held, 'held-out sample')}" if held else "on calibration samples"
        sentence += (
            f"; the predictions diverge from the dense model's by {_nats(divergence)} nats {on}"
            f"{_when(document)}"
        )
    return sentence + "."


def _in_words(settings: Mapping[str, Any]) -> str:
    """Say in one line what was asked."""
    said = [f"{kind} {settings[kind]}" for kind in BudgetKind if settings.get(kind) is not None]
    if said:
        said.append(f"shared out by {settings.get('allocation', 'curvature')}")
    if settings.get("at_least"):
        said.append(f"at least {settings['at_least']} of each group")
    said += [f"keep {settings[kind]} of the {kind}" for kind in _KEEPS if settings.get(kind)]
    if settings.get("groups"):
        said.append(pluralize(len(settings["groups"]), "group") + " by name")
    return f"{', '.join(said)}; backend {settings['backend']}"


def run_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a terminal is told of a run, below the table of its layers."""
    for kind, line in _lines(document):
        yield line if kind in _BARE else f"{kind}: {line}"


def _lines(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what became of the model, each line with its kind."""
    layers, settings = document["layers"], document["settings"]
    dead = sum(layer["dead"] for layer in layers)
    if dead:
        were = "was" if dead == 1 else "were"
        units = f"{pluralize(dead, 'unit')} {were} dead"
        yield "dead", f"{units} (zero on all calibration data) and went first"
    if layers and not document["held_out"]:
        yield (
            "held out",
            "nothing was held out, so that no refit was compared with none on fresh samples",
        )
    if _bounded(document):
        proofs = [
            ProofBasis.WORD if layer["recomputed_bound"] is None else ProofBasis.RECOMPUTED
            for layer in layers
            if layer["proved_optimal"]
        ]
        rests = f"; {proofs_in_words(proofs)}" if proofs else ""
        choices = pluralize(len(layers), "choice")
        yield "proofs", f"{len(proofs)} of {choices} {are(len(proofs))} proved optimal{rests}"
    before, after = document["parameters_before"], document["parameters_after"]
    yield (
        "size",
        f"{before:,} parameters became {after:,} ({1 - after / before:.1%} fewer) in "
        f"{document['seconds']:.1f} s, {document['solve_seconds']:.1f} s of them in the solver; "
        f"summed relative loss {document['summed_relative_loss']:.4f}",
    )
    budget = document.get("budget")
    if budget is not None:
        yield budget_line(budget)
        if not budget["comparable"]:
            yield (
                "gradients",
                "no gradient reaches some groups, whose widths were chosen by their own relative "
                "loss",
            )
        if budget.get("curves") and budget.get("measured") == {}:
            yield (
                "curves",
                f"as predicted, as nothing was measured; that takes {FEWEST} samples and an output "
                "that is known to be scores of classes",
            )
    yield "divergence from the dense predictions", _divergence(document)
    error = document["equivalence_error"]
    yield (
        "proof",
        f"the smaller model's outputs equal the masked model's to {error:.1e} of the largest",
    )
    if document.get("form") == "exported":
        chosen = settings["form"] == "auto"
        why = ", since more of it could follow than of the modules" if chosen else ""
        yield "form", f"the exported program{why}"
    fixed = fixed_in_words(document.get("inputs", ()))
    if fixed:
        yield "inputs", fixed
    if document["batch_norms"]:
        norms = pluralize(document["batch_norms"], "layer")
        yield "batch norm", f"the statistics of {norms} are new ({settings['batch_norm']})"


def budget_line(budget: Mapping[str, Any]) -> tuple[str, str]:
    """Say what was asked for, and what it came to, with a label."""
    limit, reached, dense = budget["limit"], budget["reached"], budget["dense"]
    if budget["cost"] == "time":
        return "timed", (
            f"{1 / reached:.2f} times as fast as the dense model on a calibration batch; "
            f"{1 / limit:g} was asked for"
        )
    short = 1 - reached / limit
    below = f"; it is {short:.1%} below, as widths move in steps" if short > _WORTH_TELLING else ""
    return "budget", (
        f"{reached:,.0f} of {dense:,.0f} {budget['cost']} ({reached / dense:.1%}), at most "
        f"{limit:,.0f} were asked for{below}"
    )


def _divergence(document: Mapping[str, Any]) -> str:
    """Say what was predicted and measured of the outputs."""
    measured, budget = document.get("divergence"), document.get("budget") or {}
    if measured is None:
        return (
            "not measured, as no output is known to be scores of classes (the name `logits` says "
            "so, or labels, where it is the only output)"
        )
    predicted, gap = budget.get("predicted"), budget.get("gap")
    within = "" if gap is None else f" (within {gap:.1e} of the least)"
    said = "" if predicted is None else f"predicted {predicted:.4f} nats{within}, "
    data = "held-out" if document["held_out"] else "the last"
    on = f"on {data} calibration samples{_when(document)}"
    return f"{said}measured {measured:.4f} nats {on}"


def _when(document: Mapping[str, Any]) -> str:
    """Say of which model a divergence is, where there are two."""
    return " before the recovery" if document.get("recovery") else ""


def _columns(document: Mapping[str, Any]) -> Iterator[str]:
    """Say what some columns of the table of layers are."""
    if (document.get("budget") or {}).get("measured"):
        yield (
            "Measured alone is by how much the predictions diverge with this group alone pruned "
            "to so many units, and how many times what was predicted that is."
        )
    if any(layer.get("fixed") for layer in document["layers"]):
        yield (
            "Fixed are the inputs that layers read beside the units of a group, and that were "
            "refitted with them."
        )


def _remarks(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has to be known of the numbers, in sentences."""
    yield from dense_remarks(document)
    for line in run_lines(document):
        yield f"{capitalized(line)}."
    layers = document["layers"]
    dense = [label for layer in layers for label in layer.get("unrefitted", ())]
    if dense:
        yield (
            "Dense weights did better than a refit on held-out samples, and stay but for the "
            f"units that leave: {', '.join(dense)}."
        )
    beside = sum(layer.get("fixed_dense", 0) for layer in layers)
    if beside:
        yield (
            f"{pluralize(beside, 'input')} that layers read beside the units of a group keep dense "
            f"weights, since these layers have more than {MOST_ROWS:,} rows."
        )
    for layer in layers:
        if layer.get("growth", 0) > GROWN:
            yield (
                f"The refit made the largest weight that reads {layer['name']} "
                f"{layer['growth']:.3g} times as large as the largest dense one."
            )
    if document.get("forward") is not None:
        yield "Times are medians of a few turns, and as rough as that."
    if document.get("evaluation") is None:
        yield "Quality on data of your own is what osscar eval measures."


# ---- in numbers --------------------------------------------------------------------------


def _nats(value: float) -> str:
    if value >= 0.001 or not value:
        return f"{value:.4f}"
    return f"{value:.6f}" if value >= 1e-5 else f"{value:.1e}"


def _rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield what is known of the dense and of the pruned model, with their ratio."""
    evaluation, forward = document.get("evaluation"), document.get("forward")
    if evaluation is not None:
        yield from comparison_rows(evaluation)
    else:
        before, after = document["parameters_before"], document["parameters_after"]
        yield _ratio_row("parameters", before, after, "{:,}".format)
    if forward is not None and evaluation is None:
        shapes = ", ".join("x".join(map(str, shape)) for shape in forward["shapes"].values())
        for name, label, written in (
            ("parameter_bytes", "weights in memory", in_bytes),
            ("flops", f"FLOPs of one sample ({shapes})", engineering),
            ("seconds", f"time of one sample ({forward['device']})", _milliseconds),
        ):
            yield _ratio_row(label, forward["dense"][name], forward["pruned"][name], written)
    if document.get("divergence") is not None:
        label = f"divergence from dense{_when(document)}, nats"
        yield label, "0", _nats(document["divergence"]), ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _ratio_row(
    label: str, dense: float, pruned: float, written: Callable[[Any], str]
) -> tuple[str, str, str, str]:
    return label, written(dense), written(pruned), f"{pruned / dense:.2f}x" if dense else ""


# ---- in pictures -------------------------------------------------------------------------


def _pictures(document: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    layers, budget = document["layers"], document.get("budget") or {}
    groups = {**budget.get("widths", {})}
    for layer in layers:
        groups.setdefault(layer["name"], layer)  # what shares no budget comes last
    if groups:
        yield picture(
            "kept share over depth",
            "What stays of each group of units, in the order of the model.",
            kept_figure([*groups.values()]),
        )
    if layers:
        beat = "; no other choice of as many units can beat the lower bound"
        yield picture(
            "loss of each layer",
            "Loss of each layer that lost units, relative to the loss of removing all of "
            f"them{beat if _bounded(document) else ''}.",
            loss_figure(layers),
        )
    if len((budget.get("frontier") or {"cost": []})["cost"]) > 1:
        yield picture(
            "divergence over the budget",
            "The least predicted divergence at every budget, and where this run lies: as "
            "predicted, and as measured.",
            frontier_figure(budget, document.get("divergence")),
        )
