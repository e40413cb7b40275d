"""The tables and figures of a pruning run, made from its JSON document alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from graph.groups import UnitKind
from osscar.base.json_files import validated
from osscar.base.printable import (
    capitalized,
    decimals,
    engineering,
    in_bytes,
    listed,
    pluralize,
    share,
)
from osscar.distance.distance import UNITS, Compared
from osscar.evaluation.evaluate import comparison_rows
from osscar.proof.plan import Certificate
from osscar.recovery import page as recoveries
from osscar.report.sections import (
    Figure,
    Section,
    Table,
    Text,
    described,
    facts,
    from_zero,
    legend,
    longest_stages,
    new_figure,
    settings,
    settings_table,
    shares,
    skipped_table,
    stages_table,
    table,
)
from osscar.report.shown import columns, notes, page
from osscar.request import AUTO, PruningRequest, TargetKind, round_width
from osscar.run.target_search import (
    counted_in_words,
    reported_in_words,
    scope_in_words,
    target_in_words,
)
from osscar.study.page import proofs_in_words
from osscar.study.records import ProofBasis
from osscar.walk.layer_report import LayerReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_QUALITY = ("perplexity", "top-1")
"""Rows of an evaluation that are in the sentence at the top."""

MUCH_NATS, MUCH_AGREEMENT = 0.2, 0.8
"""Much was lost above this divergence, or below this share of likeliest predictions that agree.

A divergence of 0.2 nats multiplies the perplexity on text of the dense model by 1.22.
"""


def prune_page(document: Mapping[str, Any], directory: str = "smaller") -> str:
    """Return the page of a run, from its ``osscar.prune/7`` and the name of its directory."""
    recovery = document.get("recovery")
    title = f"{document['model']}, pruned{' and recovered' if recovery else ''}"
    asked = settings_table(
        settings({"model": document["model"]}),
        settings(document["settings"], PruningRequest),
        recoveries.recovery_settings(recovery, "recovery: ") if recovery else (),
        described(document["calibration"], "calibration"),
        settings(document.get("computed", {}), prefix="computed: ", origin="model"),
    )
    loading = recoveries.loading_text(document, directory)
    return page(title, [*sections(document), loading, asked])


def sections(document: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the tables and figures of a run, of as much of its document as is known."""
    layers, budget = document["layers"], document.get("budget")
    yield Text((_answer(document),), look="answer")
    lost = verdict(document)
    if lost:
        yield Text((f"{capitalized(lost)}.",), look="answer")
    yield compared_table(document)
    groups = _groups(document)
    if groups:
        yield Figure(
            "kept share and loss over depth",
            "Above, the kept fraction of each group of units, from the input of the model on. "
            "Below, the relative loss of groups that lost units; with --certify also the lower "
            "bound for any choice of as many units.",
            partial(depth_figure, groups, layers),
        )
    if target := document.get("target"):
        yield attempts_table(target)
    if document.get("recovery"):
        yield from recoveries.sections(document["recovery"])
    yield layers_table(layers, budget)
    yield facts("How it went", run_facts(document))
    yield stages_table(document["stages"])
    yield skipped_table(document.get("skipped") or ())


def _groups(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the groups by name; those that share no budget come last."""
    groups = {**(document.get("budget") or {}).get("widths", {})}
    for layer in document["layers"]:
        groups.setdefault(layer["name"], layer)
    return groups


# ---- in words and numbers ----------------------------------------------------------------


def _answer(document: Mapping[str, Any]) -> str:
    """Say in one sentence what became of the model."""
    kept = document["parameters_after"] / document["parameters_before"]
    said = [f"{share(1 - kept)} fewer parameters"]
    if forward := document.get("forward"):
        dense, pruned = forward["dense"], forward["pruned"]
        if dense["flops"]:
            said.append(f"{share(1 - pruned['flops'] / dense['flops'])} fewer operations")
        spans = sorted((dense["seconds_between"], pruned["seconds_between"]))
        if pruned["seconds"] and spans[0][1] < spans[1][0]:  # the quartiles do not overlap
            said.append(
                f"{dense['seconds'] / pruned['seconds']:.2f} times the speed of a forward pass"
            )
    sentence = f"{', '.join(said[:-1])} and {said[-1]}" if said[1:] else said[0]
    for label, before, after, _ in _rows(document):
        if label in _QUALITY:
            sentence += f"; {label} goes from {before} to {after}"
    if document.get("target"):
        return f"{sentence}; {reported_in_words(document['target'])}."
    far = "" if document.get("divergence") is None else f"; {_measured(document)}"
    return f"{sentence}{far}."


def _measured(document: Mapping[str, Any]) -> str:
    """Say how far outputs are from the dense ones, by whatever measure; nothing if unknown."""
    value, measure = (document["distance"][name] for name in ("value", "measure"))
    if value is None:
        return ""
    held, when = document["held_out"], ", before the recovery" if document.get("recovery") else ""
    data = pluralize(held, "held-out sample") if held else "the last calibration samples"
    nats = f"{_nats(value)} nats from the dense predictions"
    return f"{nats if measure == 'nats' else f'{value:.4g} {UNITS[measure]}'} on {data}{when}"


def _nats(value: float) -> str:
    return decimals(value, 4 if value >= 0.001 or not value else 6)


def _predicts(document: Mapping[str, Any]) -> str:
    return "token" if "seqlen" in document["calibration"] else "class"


def verdict(document: Mapping[str, Any]) -> str:
    """Say that much was lost, after a recovery if there was one, and what to do; else nothing."""
    recovery = document.get("recovery") or {}
    if document.get("target"):  # whose test has passed
        return ""
    nats_lost, same = document.get("divergence"), document.get("agreement")
    remedies = "recover (osscar recover, or --recover), calibrate on more data, or remove less"
    if recovery:
        nats_lost = recovery["after"] if recovery["distance"]["measure"] == "nats" else nats_lost
        same, remedies = None, "recover on more data, or remove less"
    if nats_lost is None or (nats_lost <= MUCH_NATS and (same is None or same >= MUCH_AGREEMENT)):
        return ""
    several = {"token": "tokens", "class": "classes"}[_predicts(document)]
    agree = "" if same is None else f"{same:.1%} of most likely {several} agree, "
    return f"much was lost: {agree}{nats_lost:.2g} nats from the dense model; {remedies}"


def run_facts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield facts of a run with their names, for terminals and pages."""
    layers, what = document["layers"], _predicts(document)
    before, after = document["parameters_before"], document["parameters_after"]
    yield "size", f"{before:,} parameters became {after:,} ({1 - after / before:.1%} fewer)"
    if (sparsity := document["settings"]["sparsity"]) is not None:
        removes = f"removes {share(sparsity)} of the parameters of heads, neurons and channels"
        yield "sparsity", removes
    yield "time", f"{document['seconds']:.1f} s{longest_stages(document['stages'])}"
    budget = document.get("budget")
    if target := document.get("target"):
        yield "quality target", target_in_words(target)
        yield "test", reported_in_words(target)
        yield "holds", scope_in_words(target)
    elif budget is not None:
        yield from budget_facts(budget["limits"])
    if budget is not None and budget["predicted"] is not None:
        unit = UNITS[document["distance"]["measure"]]
        gap = budget.get("gap")
        within = "" if gap is None else f" (optimality gap {100 * gap:.2g}%)"
        each = "the sum over groups, each measured alone"
        yield "predicted distance", f"{budget['predicted']:.4f} {unit}, {each}{within}"
    units = [one["units"] for one in layers if one["kind"] in ("neurons", "channels")]
    if document["settings"]["round_to"] == AUTO and round_width(max(units, default=1)) > 1:
        how = "rounded to multiples of 16, narrow ones of 8"
        yield "widths", f"{how}; `osscar prune --set round_to=1` allows any"
    same = document.get("agreement")
    agree = "" if same is None else f", with the same most likely {what} in {same:.1%}"
    yield "distance", str(Compared(**document["distance"]))
    far = _measured(document)
    yield "measured distance", f"{far}{agree}{', of the whole model after all refits' * bool(far)}"
    dead = sum(layer["dead"] for layer in layers if not UnitKind(layer["kind"]).routed)
    yield "dead units", f"{dead} (zero on all calibration data)" if dead else ""
    if any(layer["lower_bound"] is not None for layer in layers):
        proofs = [
            ProofBasis.WORD if layer["recomputed_bound"] is None else ProofBasis.RECOMPUTED
            for layer in layers
            if layer["proved_optimal"]
        ]
        rests = f"; {proofs_in_words(proofs)}" if proofs else ""
        yield "proved optimal", f"{len(proofs)} of {pluralize(len(layers), 'choice')}{rests}"
    yield from validated(document["certificate"], Certificate, "the certificate").rows()
    if document.get("form") == "exported":
        chosen = document["settings"]["form"] == "auto"
        why = ", in which more groups can be pruned than in the modules" if chosen else ""
        yield "form", f"the exported program{why}"
    if norms := document["batch_norms"]:
        yield "batch norm", f"new running statistics of {pluralize(norms, 'layer')}"
    folded = document["folded"]
    computed = f"{pluralize(len(folded), 'weight')} that the dense model computes at every call"
    yield "folded", f"{computed}: {listed(folded)}" * bool(folded)
    yield "in bfloat16", ", ".join(document["bfloat16"])
    yield "not measured", document.get("unmeasured", "")


def budget_facts(limits: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield what each budget allows, and what was reached."""
    for one in limits:
        limit, reached, dense = (one[name] for name in ("limit", "reached", "dense"))
        if one["cost"] == "time":
            yield (
                "timed",
                f"{1 / reached:.2f} times as fast as the dense model, {1 / limit:g} was asked for: "
                f"{one['assumed']}",
            )
            continue
        assumed = f" ({one['assumed']})" if one["assumed"] else ""
        yield (
            "budget",
            f"{reached:,.0f} of {dense:,.0f} {one['cost']} ({reached / dense:.1%}), at most "
            f"{limit:,.0f} allowed{assumed}",
        )


def layers_table(
    layers: Sequence[Mapping[str, Any]], budget: Mapping[str, Any] | None = None
) -> Table:
    """Return a row of `LayerReport` for each group, with what the budget predicted and measured."""
    widths = (budget or {}).get("widths") or {}
    unit = (budget or {}).get("measure", "nats")
    found = table(
        "Loss by layer",
        {
            **columns(LayerReport),
            f"predicted, {unit} >": lambda one: decimals(
                widths.get(one["name"], {}).get("predicted"), 5
            ),
        },
        layers,
    )
    told = [
        f"{title.removesuffix(' >').capitalize()}: {note}."
        for title, note in notes(LayerReport).items()
        if title in found.columns
    ]
    return Table(found.title, found.columns, found.rows, " ".join(told))


def attempts_table(target: Mapping[str, Any]) -> Table:
    """Return a row for each size that was tried for a quality target."""
    chosen = target["attempts"][target["chosen"]]
    divergence = target["quality"] == TargetKind.DIVERGENCE
    written = (
        "{value:.3g}, at most {bound:.3g}" if divergence else "{value:.2%}, at most {bound:.2%}"
    )

    def lost(one: Mapping[str, Any], name: str) -> str:
        return "" if one[name] is None else written.format(**one[name])

    return table(
        "Sizes that were tried",
        {
            f"{counted_in_words(target['cost'])} kept >": lambda one: share(
                one["reached"] / target["dense"]
            ),
            "on the samples of the search": lambda one: lost(one, "measured"),
            "on samples that chose nothing": lambda one: lost(one, "tested"),
            "result": lambda one: "chosen" if one is chosen else "",
        },
        target["attempts"],
        note="What is lost, with the end of its one-sided 95 % interval; at most "
        f"{target['most']:g} was asked for.",
    )


# ---- against the dense model -------------------------------------------------------------


def compared_table(document: Mapping[str, Any]) -> Table:
    """Return the measures of the dense and of the pruned model, with their ratio."""
    forward, note = document.get("forward"), ""
    if forward is not None and document.get("evaluation") is None:
        low, high = map(_milliseconds, forward["pruned"]["seconds_between"])
        shapes = ", ".join("x".join(map(str, shape)) for shape in forward["shapes"].values())
        note = (
            f"Of one sample ({shapes}) on {forward['device']}. Times are medians of a few turns; "
            f"half of those of the pruned model lie between {low} and {high}."
        )
    columns = ("", "dense >", "pruned >", "ratio >")
    return Table("Dense against pruned", columns, tuple(_rows(document)), note)


def _rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    if (evaluation := document.get("evaluation")) is not None:
        yield from comparison_rows(evaluation)
        return
    before, after = document["parameters_before"], document["parameters_after"]
    measured: list[tuple[str, Any, Any, Any]] = [("parameters", before, after, "{:,}".format)]
    if (forward := document.get("forward")) is not None:
        measured += [
            (label, forward["dense"][name], forward["pruned"][name], written)
            for name, label, written in (
                ("parameter_bytes", "weights in memory", in_bytes),
                ("flops", "FLOPs", engineering),
                ("seconds", "time", _milliseconds),
            )
        ]
    for label, dense, pruned, written in measured:
        yield label, written(dense), written(pruned), f"{pruned / dense:.2f}x" if dense else ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


# ---- in pictures -------------------------------------------------------------------------


def depth_figure(
    groups: Mapping[str, Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]
) -> Drawing:
    """Draw the kept share of each group, in the order of the model, and the loss of layers."""
    figure, (above, below) = new_figure(2, height=4.4, sharex=True)
    kinds = list(dict.fromkeys(group["kind"] for group in groups.values()))
    for index, kind in enumerate(kinds):
        mine = {name: group for name, group in groups.items() if group["kind"] == kind}
        at = {name: place for place, name in enumerate(mine, 1)}
        look: Any = {"color": f"C{index}", "markersize": 3.5, "linewidth": 1}
        kept = [group["kept"] / group["units"] for group in mine.values()]
        above.plot([*at.values()], kept, "o-", label=kind, **look)
        pruned = [(at[one["name"]], one) for one in layers if one["kind"] == kind]
        below.plot(
            [x for x, _ in pruned], [one["relative_loss"] for _, one in pruned], "o-", **look
        )
        bounds = [(x, one["relative_bound"]) for x, one in pruned]
        bounds = [(x, max(0.0, bound)) for x, bound in bounds if bound is not None]
        if bounds:  # hollow and larger, so that a loss that meets its bound is still seen
            ring: Any = {"color": "gray", "markersize": 6, "markerfacecolor": "none"}
            below.plot(*zip(*bounds, strict=True), "s", label="lower bound", **ring)
    for axes in (above, below):
        from_zero(axes)
    above.yaxis.set_major_formatter(shares)
    above.set_ylabel("kept")
    below.set_ylabel("relative loss")
    below.set_xlabel("group of its kind, from the input on")
    below.locator_params(axis="x", integer=True, min_n_ticks=1)
    legend(figure)
    return figure
