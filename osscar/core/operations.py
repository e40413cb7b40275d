"""The floating-point operations of a forward pass, counted by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graph.preserve import without_cache
from osscar.core.modules import fresh

Note: TypeAlias = Callable[[int, Sequence[Any], frozenset[str]], None]
"""Is told of each product: its operations, the operator's arguments, and the running modules."""


def operations(
    model: nn.Module, inputs: Mapping[str, Tensor], note: Note | None = None
) -> FlopCounterMode:
    """Return the counter that has seen a model run.

    Counted are the matrix products and convolutions with the shapes that they really have: linear
    layers, experts for the rows that are sent to them, and attention (scores and weighted sums, as
    full squares: a causal mask is not discounted).  A multiplication with its addition counts as
    two.

    Parameters
    ----------
    model
        The model.
    inputs
        Keyword arguments of its forward pass, on its device.
    note
        Is told of each product, with modules by the names that the counter has for them.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_by_expert())
    if note is not None:
        formulas = counter.flop_registry.items()
        counter.flop_registry = {op: _noting(formula, counter, note) for op, formula in formulas}
    # Fused attention kernels hide their products from the counter; the plain one does not.
    with torch.no_grad(), without_cache(model), sdpa_kernel(SDPBackend.MATH), counter:
        model(**fresh(inputs))
    return counter


def _noting(
    formula: Callable[..., int], counter: FlopCounterMode, note: Note
) -> Callable[..., int]:
    """Return how to count an operator, and to tell of it."""

    def noted(*args: Any, **kwargs: Any) -> int:
        found = formula(*args, **kwargs)
        note(found, args, frozenset(counter.mod_tracker.parents))
        return found

    return noted


def _by_expert() -> dict[Any, Callable[..., int]]:
    """Return how to count the products of all experts at once, which torch's counter passes over.

    The second operator is that of transformers where torch's own does not take a number format; it
    exists once a model with experts is loaded.
    """
    operators = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
    packets = (getattr(getattr(torch.ops, space), name, None) for space, name in operators)
    return {packet: _grouped for packet in packets if packet is not None}


def _grouped(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """Count products of rows with the matrix of their group: (rows, in) by (groups, in, out).

    With both in three dimensions, groups are multiplied one by one; with the second in two, its
    columns are what is divided among groups, and with both in two, what is summed over.
    """
    rows = first[0] * first[1] if len(first) == len(second) == 3 else first[-2]
    return 2 * rows * first[-1] * second[-1]
