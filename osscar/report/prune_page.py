"""The page of a pruning run, made of its JSON document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from graph.groups import UnitKind
from osscar.base.numbers import engineering, in_bytes, share
from osscar.base.printable import are, capitalized, listed, pluralize
from osscar.preparation.consumer import MOST_ROWS
from osscar.proof.plan import Certificate
from osscar.proof.program.input_sizes import fixed_in_words
from osscar.report.evaluation_tables import comparison_rows, dense_remarks
from osscar.report.figures import picture, png_of
from osscar.report.names import common_prefix, without_prefix
from osscar.report.page import Part, Settings, loading, render, told
from osscar.report.prune_plots import depth_figure, frontier_figure
from osscar.report.recovery import recovery_section, recovery_settings
from osscar.report.run_tables import layers_table, skipped_table
from osscar.report.stages import longest_stages, stages_table
from osscar.report.summary import proofs_in_words
from osscar.report.tables import divergence_in_words, nats, new_table
from osscar.request import AUTO, BudgetKind, PruningRequest
from osscar.study.records import ProofBasis
from osscar.walk.layer_step import GROWN

_KEEPS = ("heads", "neurons", "channels", "residual", "experts")
_WORTH_TELLING = 0.01
"""Of a budget: what is left of it that a line tells of."""

_BARE = ("dead", "held out", "proofs", "size", "gradients")
"""Kinds of lines that a terminal shows without their kind in front."""

_QUALITY = ("perplexity", "top-1")
"""Rows of an evaluation that the sentence at the top repeats."""


def prune_page(document: Mapping[str, Any], directory: str = "smaller") -> str:
    """Return the page of a run.

    Parameters
    ----------
    document
        An ``osscar.prune/5``, as ``docs/json.md`` describes it, such as ``osscar_report.json``.
        What it does not hold is left out.
    directory
        The name of the directory that holds the model.
    """
    computed = {f"computed: {key}": v for key, v in document.get("computed", {}).items()}
    recovery = document.get("recovery")
    settings = Settings({"model": document["model"]})
    settings |= Settings.of(document["settings"], PruningRequest)
    settings |= recovery_settings(recovery, "recovery") if recovery else Settings()
    prefix = common_prefix([*_groups(document)])
    return render(
        "prune.html.j2",
        document=document,
        loaded=loading(document, directory, document["calibration"]),
        answer=_answer(document),
        asked_shortly=_in_words(document["settings"]),
        compared=new_table("", "", "dense >", "pruned >", "ratio >", rows=_rows(document)),
        meaning=list(_meaning(document)),
        remarks=list(_remarks(document)),
        stages=stages_table(document["stages"]),
        recovery=recovery and recovery_section(recovery),
        pictures=list(_pictures(document)),
        layers=layers_table(document["layers"], document.get("budget"), prefix=prefix),
        columns=[*_columns(document), *filter(None, [without_prefix(prefix)])],
        bounded=_bounded(document),
        skipped=skipped_table(document.get("skipped") or ()),
        settings=settings
        | Settings(known={**told(document["calibration"], "calibration"), **computed}),
    )


def kept_picture(document: Mapping[str, Any]) -> bytes | None:
    """Return a PNG file of what each group of a run keeps and lost; None where none lost units."""
    layers = document["layers"]
    return png_of(depth_figure(_groups(document), layers)) if layers else None


def parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """Yield what a run shows of itself, of as much of its document as is known without its data."""
    yield _answer(document)
    yield layers_table(document["layers"], document["budget"])
    yield from run_lines(document)
    yield from _meaning(document)
    if document["skipped"]:
        yield skipped_table(document["skipped"])
    yield from _pictures(document)
    stages = stages_table(document["stages"])
    if stages is not None:
        yield stages


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
        spans = sorted((dense["seconds_between"], pruned["seconds_between"]))
        if pruned["seconds"] and spans[0][1] < spans[1][0]:  # more than turns differ by
            said.append(f"{dense['seconds'] / pruned['seconds']:.2f} times the speed")
    sentence = f"{', '.join(said[:-1])} and {said[-1]}" if said[1:] else said[0]
    for label, before, after, _ in _rows(document):
        if label in _QUALITY:
            sentence += f"; {label} goes from {before} to {after}"
    divergence = document.get("divergence")
    if divergence is not None:
        sentence += (
            f"; the predictions diverge from the dense model's by {nats(divergence)} nats "
            f"{_on(document)}{_when(document)}"
        )
    return sentence + "."


def _on(document: Mapping[str, Any]) -> str:
    """Say on what predictions were compared."""
    held = document.get("held_out")
    return f"on {pluralize(held, 'held-out sample')}" if held else "on calibration samples"


def _what(document: Mapping[str, Any]) -> str:
    """Return what the model predicts, in a word."""
    return "token" if "seqlen" in document["calibration"] else "class"


def _several(document: Mapping[str, Any]) -> str:
    return "tokens" if _what(document) == "token" else "classes"


def _meaning(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the divergence comes to, in a sentence, if it is known."""
    divergence = document.get("divergence")
    if divergence is not None:
        yield divergence_in_words(divergence, _what(document))
    lost = verdict(document)
    if lost:
        yield f"{capitalized(lost)}."


def _in_words(settings: Mapping[str, Any]) -> str:
    """Say in one line what was asked."""
    said = [f"{kind} {settings[kind]}" for kind in BudgetKind if settings.get(kind) is not None]
    if said:
        said.append(f"shared out by {settings.get('allocation', 'measured')}")
    if settings.get("at_least"):
        said.append(f"at least {settings['at_least']} of each group")
    said += [f"also by {kind}" for kind in _KEEPS if settings.get(kind) == AUTO]
    said += [
        f"keep {settings[kind]} of the {kind}"
        for kind in _KEEPS
        if settings.get(kind) not in (None, AUTO)
    ]
    if settings.get("groups"):
        said.append(pluralize(len(settings["groups"]), "group") + " by name")
    return f"{', '.join(said)}; backend {settings['backend']}"


MUCH_NATS, MUCH_AGREEMENT = 0.2, 0.8
"""A divergence above, or a share of likeliest predictions below which much was lost.

At 0.2 nats the perplexity on text of the dense model's is 1.22 times its own.
"""


def verdict(document: Mapping[str, Any]) -> str:
    """Say in one sentence that much was lost, and what to do; nothing where it was not.

    A recovery that measures divergence decides by what it has come to.
    """
    recovery = document.get("recovery") or {}
    nats_lost, same = document.get("divergence"), document.get("agreement")
    remedies = "recover (osscar recover, or --recover), calibrate on more data, or remove less"
    if recovery:
        nats_lost = recovery["after"] if recovery["measure"] == "nats" else nats_lost
        same, remedies = None, "recover on more data, or remove less"
    if nats_lost is None or (nats_lost <= MUCH_NATS and (same is None or same >= MUCH_AGREEMENT)):
        return ""
    agree = "" if same is None else f"{same:.1%} of likeliest {_several(document)} agree, "
    return f"{agree}{nats_lost:.2g} nats from the dense model: much was lost: {remedies}"


def run_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a terminal is told of a run, below the table of its layers."""
    for kind, line in _lines(document):
        yield line if kind in _BARE else f"{kind}: {line}"


def _lines(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what became of the model, each line with its kind."""
    layers, settings = document["layers"], document["settings"]
    dead = sum(layer["dead"] for layer in layers if not UnitKind(layer["kind"]).routed)
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
        f"{before:,} parameters became {after:,} ({1 - after / before:.1%} fewer), pruned in "
        f"{document['seconds']:.1f} s{longest_stages(document['stages'])}; "
        f"summed relative loss {document['summed_relative_loss']:.4f}",
    )
    budget = document.get("budget")
    if budget is not None:
        yield budget_line(budget)
    yield "divergence from the dense predictions", _divergence(document)
    yield from Certificate.from_json(document["certificate"]).rows()
    if document.get("form") == "exported":
        chosen = settings["form"] == "auto"
        why = ", since more of it could follow than of the modules" if chosen else ""
        yield "form", f"the exported program{why}"
    fixed = fixed_in_words(document.get("inputs", ()))
    if fixed:
        yield "inputs", fixed
    if document["batch_norms"]:
        norms = pluralize(document["batch_norms"], "layer")
        yield "batch norm", f"running statistics of {norms} were corrected"
    folded = document.get("folded")
    if folded:
        yield (
            "folded",
            f"{pluralize(len(folded), 'weight')} that the dense model computes at every call, such "
            f"as by weight normalization, {are(len(folded))} plain now: {listed(folded, 4)}",
        )

    if document.get("unmeasured"):
        yield "not measured", document["unmeasured"]


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
    predicted, gap = budget.get("predicted"), budget.get("gap")
    within = "" if gap is None else f" (within {gap:.1e} of the least)" if gap else " (the least)"
    if measured is None:
        said = (
            ""
            if predicted is None
            else f"; a relative error of the outputs of {predicted:.4f} is predicted{within}"
        )
        return (
            "not measured, as no output is known to be scores of classes (the name `logits` says "
            f"so, or labels that fit the only output beside a loss){said}"
        )
    said = "" if predicted is None else f"predicted {predicted:.4f} nats{within}, "
    data = "held-out" if document["held_out"] else "the last"
    on = f"on {data} calibration samples{_when(document)}"
    agreement = document.get("agreement")
    same = (
        ""
        if agreement is None
        else f", with the same likeliest {_what(document)} in {agreement:.1%}"
    )
    return f"{said}measured {measured:.4f} nats {on}{same}"


def _when(document: Mapping[str, Any]) -> str:
    """Say of which model a divergence is, where there are two."""
    return " before the recovery" if document.get("recovery") else ""


def _columns(document: Mapping[str, Any]) -> Iterator[str]:
    """Say what some columns of the table of layers are."""
    if (document.get("budget") or {}).get("measured"):
        yield (
            "Measured alone is how far the model is from the dense one with this group alone "
            "pruned to so many units."
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
    tied = [label for layer in layers for label in layer.get("tied", ())]
    if tied:
        yield (
            "Not refitted, since the same weight is read in another way, too, are "
            f"{', '.join(tied)}: all of it stays but for the units that leave."
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
    forward = document.get("forward")
    if forward is not None:
        low, high = map(_milliseconds, forward["pruned"]["seconds_between"])
        yield (
            "Times are medians of a few turns, and as rough as that: half of those of the pruned "
            f"model lie between {low} and {high}."
        )
    if document.get("evaluation") is None:
        yield "Quality on data of your own is what osscar eval measures."


# ---- in numbers --------------------------------------------------------------------------


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
        yield label, "0", nats(document["divergence"]), ""
    if document.get("agreement") is not None:
        label = f"likeliest {_what(document)} as in the dense model{_when(document)}"
        yield label, "", f"{document['agreement']:.1%}", ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _ratio_row(
    label: str, dense: float, pruned: float, written: Callable[[Any], str]
) -> tuple[str, str, str, str]:
    return label, written(dense), written(pruned), f"{pruned / dense:.2f}x" if dense else ""


# ---- in pictures -------------------------------------------------------------------------


def _groups(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return kind, units and kept units of each group that could lose some, by name."""
    groups = {**(document.get("budget") or {}).get("widths", {})}
    for layer in document["layers"]:
        groups.setdefault(layer["name"], layer)  # what shares no budget comes last
    return groups


def _whole(document: Mapping[str, Any]) -> str:
    """Say what losses are relative to."""
    own = {UnitKind(layer["kind"]).routed for layer in document["layers"]}
    if own == {True}:
        return "what the mixture puts out"
    also = ", and that of experts relative to what the mixture puts out" if True in own else ""
    return f"the loss of removing all of them{also}"


def _pictures(document: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    budget, groups = document.get("budget") or {}, _groups(document)
    if groups:
        beat = "; no other choice of as many units can beat the lower bound"
        yield picture(
            "kept share and loss over depth",
            "Above, what stays of each group of units. Below, the loss of those that lost units, "
            f"relative to {_whole(document)}{beat if _bounded(document) else ''}.",
            depth_figure(groups, document["layers"]),
        )
    if len((budget.get("frontier") or {"cost": []})["cost"]) > 1:
        yield picture(
            "divergence over the budget",
            "The least predicted divergence at every budget, and where this run lies: as "
            "predicted, and as measured.",
            frontier_figure(budget, document.get("divergence")),
        )
