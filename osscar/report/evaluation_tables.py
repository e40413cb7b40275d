"""Tables of what models are worth; every number comes from an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from osscar.report.numbers import engineering, in_bytes
from osscar.report.tables import new_table

if TYPE_CHECKING:
    from osscar.evaluation.result import Comparison, Evaluation

_ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", "{:,}".format),
    "perplexity": ("perplexity", "{:.3f}".format),
    "top1": ("top-1", "{:.2%}".format),
    "top5": ("top-5", "{:.2%}".format),
    "agreement": ("agreement with dense", "{:.2%}".format),
    "kl": ("KL from dense, nats", "{:.4f}".format),
    "prefill_tokens_per_second": ("prefill, tokens/s", "{:,.0f}".format),
    "decode_tokens_per_second": ("decode, tokens/s", "{:,.1f}".format),
    "images_per_second": ("images/s ({batch_size} at once)", "{:,.1f}".format),
    "flops": ("FLOPs {a_sample}", engineering),
    "parameter_bytes": ("weights in memory", in_bytes),
    "disk_bytes": ("weights on disk", in_bytes),
    "peak_memory_bytes": ("peak memory", in_bytes),
}
"""What a table shows of an evaluation, in this order: by name, how it is called and written."""


def evaluation_table(evaluation: Evaluation[Any, Any], name: str) -> Table:
    """Return the numbers of one model."""
    table = new_table("", "", f"{name} >")
    for _, label, value in _shown(evaluation):
        table.add_row(label, value)
    return table


def comparison_table(comparison: Comparison[Any, Any], name: str = "pruned") -> Table:
    """Return a model beside its dense original, with ratios."""
    table = new_table("", "", "dense >", f"{name} >", "ratio >")
    dense = {key: value for key, _, value in _shown(comparison.dense)}
    for key, label, value in _shown(comparison.model):
        ratio = comparison.ratios.get(key)
        table.add_row(label, dense.get(key, ""), value, "" if ratio is None else f"{ratio:.2f}x")
    return table


def _shown(evaluation: Evaluation[Any, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, label and text of each number that is known."""
    return shown_numbers(evaluation.numbers(), evaluation.sample)


def shown_numbers(numbers: Mapping[str, Any], sample: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, label and text of each number that is known.

    Parameters
    ----------
    numbers
        What was measured, by the names that evaluations have for it.
    sample
        What operations are counted for.
    """
    article = "an" if sample[:1] in tuple("aeiou") else "a"
    for name, (label, written) in _ROWS.items():
        if numbers.get(name) is not None:
            named = label.format(a_sample=f"{article} {sample}", **numbers)
            yield name, named, written(numbers[name])
