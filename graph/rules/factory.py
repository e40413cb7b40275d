"""Operators that create tensors."""

from __future__ import annotations

from graph.call import Call, Value
from graph.rules.table import aten, rule


@rule(
    *aten(
        "empty empty_strided full new_empty new_empty_strided new_full new_ones new_zeros ones "
        "scalar_tensor zeros"
    )
)
def filled(call: Call) -> list[Value]:
    """Give new axes to a tensor whose positions are all alike, so that any may be left out."""
    return [Value(tuple(call.axes.fresh(size) for size in shape)) for shape in call.shapes]


@rule(
    *aten(
        "arange eye linspace logspace new_tensor rand randint randn randperm tril_indices "
        "triu_indices"
    )
)
def enumerated(call: Call) -> list[Value]:
    """Freeze a new tensor whose positions differ; what it takes its type from is left alone."""
    reason = "it meets numbers that the code makes for a fixed size"
    return [Value(tuple(call.unknown(size, reason) for size in shape)) for shape in call.shapes]
