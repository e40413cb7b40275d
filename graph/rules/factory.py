"""Operators that create tensors: their sizes are constants of the traced code."""

from __future__ import annotations

from graph.call import Call, Value
from graph.rules.table import aten, rule


@rule(
    *aten(
        "arange empty empty_strided eye full linspace logspace new_empty "
        "new_empty_strided new_full new_ones new_tensor new_zeros ones rand randint "
        "randn randperm scalar_tensor tril_indices triu_indices zeros"
    )
)
def created(call: Call) -> list[Value]:
    """Freeze the new tensor; what it takes its type from is left alone."""
    reason = "it meets a tensor that the code creates with a fixed size"
    return [Value(tuple(call.unknown(size, reason) for size in shape)) for shape in call.shapes]
