"""Tables and sentences of what models are worth; every number comes from an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from osscar.base.numbers import engineering, in_bytes
from osscar.base.printable import capitalized, pluralize
from osscar.report.tables import new_table

if TYPE_CHECKING:
    from osscar.evaluation.evaluate import Comparison, Evaluation

_ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", "{:,}".format),
    "perplexity": ("perplexity", "{:.3f}".format),
    "top1": ("top-1", "{:.2%}".format),
    "top5": ("top-5", "{:.2%}".format),
    "agreement": ("agreement with dense", "{:.2%}".format),
    "kl": ("KL from dense, nats", "{:.4f}".format),
    "prefill_tokens_per_second": ("prefill, tokens/s", "{:,.0f}".format),
    "decode_tokens_per_second": ("decode, tokens/s", "{:,.1f}".format),
    "samples_per_second": ("{sample}s/s ({batch_size} at once)", "{:,.1f}".format),
    "flops": ("FLOPs {a_sample}", engineering),
    "parameter_bytes": ("weights in memory", in_bytes),
    "disk_bytes": ("weights on disk", in_bytes),
    "peak_memory_bytes": ("peak memory", in_bytes),
}
"""What a table shows of an evaluation, in this order: by name, how it is called and written."""


def evaluation_table(evaluation: Evaluation, name: str) -> Table:
    """Return the numbers of one model."""
    rows = ((label, value) for _, label, value in _shown(dataclasses.asdict(evaluation)))
    return new_table("", "", f"{name} >", rows=rows)


def comparison_table(comparison: Comparison, name: str = "pruned") -> Table:
    """Return a model beside its dense original, with ratios."""
    rows = comparison_rows(dataclasses.asdict(comparison))
    return new_table("", "", "dense >", f"{name} >", "ratio >", rows=rows)


def comparison_rows(comparison: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield label, dense, pruned and ratio of each number of a `Comparison` as JSON."""
    dense = {name: text for name, _, text in _shown(comparison["dense"])}
    for name, label, text in _shown(comparison["model"]):
        ratio = comparison["ratios"].get(name)
        yield label, dense.get(name, ""), text, "" if ratio is None else f"{ratio:.2f}x"


def _shown(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, label and text of each number that is known of an `Evaluation` as JSON."""
    numbers = {**evaluation["quality"], **evaluation["speed"], **evaluation["footprint"]}
    sample = evaluation["sample"]
    errors = numbers.get("errors") or {}
    article = "an" if sample[:1] in tuple("aeiou") else "a"
    for name, (label, written) in _ROWS.items():
        if numbers.get(name) is not None:
            named = label.format(a_sample=f"{article} {sample}", sample=sample, **numbers)
            yield name, named, written(numbers[name])
        if name == "kl":
            for output, error in errors.items():
                said = "dense is 0" if error is None else f"{error:.2g}"
                yield f"errors.{output}", f"squared error of {output}, relative", said


def dense_sentence(score: Mapping[str, Any]) -> str:
    """Say what the dense model is worth on its calibration data, of a `DenseScore` as JSON."""
    if score["value"] is None:
        return f"dense model: not scored on the calibration {score['sample']}s: {score['reason']}"
    if score["measure"] == "top1":
        samples = pluralize(score["samples"], f"labelled calibration {score['sample']}")
        each = score.get("predictions") or score["samples"]
        of = "" if each == score["samples"] else f"{each:,} predictions in "
        last = each == score["samples"] and (score["positions"] or 1) > 1
        alone = f", at the last of {score['positions']} labels each" if last else ""
        return f"dense model: top-1 {score['value']:.1%} of {of}{samples}{alone}"
    windows = pluralize(score["samples"], "calibration window")
    return f"dense model: perplexity {score['value']:,.1f} on {windows} of {score['seqlen']} tokens"


def dense_warning(score: Mapping[str, Any]) -> str:
    """Say what to look for where the dense model is near chance; empty where it is not."""
    sample = score["sample"]
    if not score["near_chance"]:
        return ""
    if score["measure"] == "top1":
        samples = pluralize(score["samples"], f"labelled calibration {sample}")
        return (
            f"the dense model is right on {score['value']:.1%} of {samples}, where always naming "
            f"the most frequent class is right on {score['chance']:.1%}: check that its weights "
            f"are loaded, that {sample}s are preprocessed as in its training, and that its "
            "classes are in the order of the labels"
        )
    return (
        f"the dense model has a perplexity of {score['value']:,.0f} on calibration text, where "
        f"guessing among its tokens has {score['chance']:,.0f}: check that its weights are "
        "trained, and that the tokenizer is its own"
    )


def dense_remarks(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a page says of the dense model's own score, if its document has one."""
    score = document.get("dense")
    if score is not None:
        for said in (dense_sentence(score), dense_warning(score)):
            if said:
                yield f"{capitalized(said)}."
