"""Which of a model's outputs is its prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ALONE = "output"
"""How an output is called that has no name, since there is no other."""

LOGITS = "logits"
"""How the output is called that is the prediction, whatever else there is."""


def named_logits(result: Any) -> Tensor | None:
    """Return the output that is called `logits`, an attribute or an entry; None without one."""
    entry = result.get(LOGITS) if isinstance(result, Mapping) else None
    found = getattr(result, LOGITS, entry)
    return found if isinstance(found, Tensor) else None


def known_output(result: Any) -> tuple[str, Tensor | None]:
    """Return the logits, or the only output with fractions, with its name; else "" and None."""
    outputs = outputs_by_name(result)
    return next(iter(outputs.items())) if len(outputs) == 1 else ("", None)


def outputs_by_name(result: Any) -> dict[str, Tensor]:
    """Return the real numbers that a model returns; where one is called `logits`, that alone.

    A single number counts only if nothing else does.
    """
    named = named_logits(result)
    if named is not None:
        return {LOGITS: named}
    found = {name: one for name, one in named_outputs(result) if one.is_floating_point()}
    return {name: one for name, one in found.items() if one.ndim} or found


def reads_sequences(inputs: Iterable[Tensor]) -> bool:
    """Tell whether sequences of whole numbers, such as tokens, are among a model's inputs."""
    whole = (torch.int32, torch.int64)
    return any(one.ndim == 2 and one.dtype in whole for one in inputs)


def place_of_classes(
    shape: Sequence[int], labels: Sequence[int], *, sequences: bool = False
) -> int | None:
    """Return which dimension of an output holds scores of classes: the one that its labels lack.

    It is the second, as torch has it, or else the last; of a model that reads sequences first the
    last, and where that returns one position alone, its label is the last of each sequence.  None
    where neither fits.  `shape` and `labels` are the sizes of the output, and of its labels.
    """
    fits = {tuple(labels), (labels[0], 1)} if sequences and len(labels) == 2 else {tuple(labels)}
    last = len(shape) - 1
    for place in (last, 1) if sequences else (1, last):
        if 0 < place <= last and shape[place] > 1 and (*shape[:place], *shape[place + 1 :]) in fits:
            return place
    return None


def named_outputs(result: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in what a model returned, with where they are."""
    if isinstance(result, Tensor):
        yield place or ALONE, result
    elif isinstance(result, Mapping | list | tuple):
        names = getattr(result, "_fields", range(len(result)))
        members = result.items() if isinstance(result, Mapping) else zip(names, result, strict=True)
        for name, member in members:
            yield from named_outputs(member, f"{place}.{name}" if place else str(name))


def as_logits(table: Tensor, probabilities: bool | None = None) -> Tensor:
    """Return the logits of a table, (..., classes): its logarithms if it holds probabilities."""
    chances = holds_probabilities(table) if probabilities is None else probabilities
    return table.clamp(min=1e-30).log() if chances else table


def holds_probabilities(table: Tensor) -> bool:
    """Tell whether a table holds probabilities, whose sums are 1."""
    rows = table.detach().flatten(0, -2)
    # Of nearly all models the first row tells that it holds none.
    return all(
        bool((some >= 0).all()) and bool(((some.float().sum(-1) - 1).abs() < 1e-3).all())
        for some in (rows[:1], rows)
    )
