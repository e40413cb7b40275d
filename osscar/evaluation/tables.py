"""Tables of what models are worth; every number comes from an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from osscar.base.printable import engineering, in_bytes
from osscar.report.sections import Table

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
    "flops": ("FLOPs per {sample}", engineering),
    "parameter_bytes": ("weights in memory", in_bytes),
    "disk_bytes": ("weights on disk", in_bytes),
    "peak_memory_bytes": ("peak memory", in_bytes),
}
"""What a table shows of an evaluation, in this order: by name, how it is called and written."""


def evaluation_table(evaluation: Mapping[str, Any], name: str = "model") -> Table:
    """Return the numbers of one model, an `Evaluation` as JSON."""
    rows = _shown(evaluation)
    return Table("", ("", f"{name} >"), tuple((label, value) for _, label, value in rows))


def comparison_table(comparison: Mapping[str, Any], name: str = "pruned") -> Table:
    """Return a model beside its dense original, with ratios: a `Comparison` as JSON."""
    rows = comparison_rows(comparison)
    return Table("", ("", "dense >", f"{name} >", "ratio >"), tuple(rows))


def comparison_rows(comparison: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield label, dense, pruned and ratio of each number of a `Comparison` as JSON."""
    dense = {name: text for name, _, text in _shown(comparison["dense"])}
    for name, label, text in _shown(comparison["model"]):
        ratio = comparison["ratios"].get(name)
        yield label, dense.get(name, ""), text, "" if ratio is None else f"{ratio:.2f}x"


def _shown(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, label and text of each number that is known of an `Evaluation` as JSON."""
    numbers = {**evaluation["quality"], **evaluation["speed"], **evaluation["footprint"]}
    for name, (label, written) in _ROWS.items():
        if numbers.get(name) is not None:
            yield name, label.format(sample=evaluation["sample"], **numbers), written(numbers[name])
    for output, error in (numbers.get("errors") or {}).items():
        said = "dense is 0" if error is None else f"{error:.2g}"
        yield f"errors.{output}", f"squared error of {output}, relative", said
