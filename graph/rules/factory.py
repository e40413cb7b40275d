"""Operators that create tensors."""

from __future__ import annotations

from graph.call import Call, Value
from graph.rules.table import CONSTANT, PROGRAM, aten, rule


@rule(
    *aten(
        "empty empty_strided full new_empty new_empty_strided new_full new_ones new_zeros ones "
        "scalar_tensor zeros"
    )
)
def filled(call: Call) -> list[Value]:
    """Give new axes to a tensor whose positions are all alike, so that any may be left out."""
    return [Value(tuple(call.axes.fresh(size) for size in shape)) for shape in call.shapes]


_BY_POSITION = aten("arange eye linspace logspace")
"""Operators that make numbers which depend on nothing but their positions."""


@rule(
    *_BY_POSITION,
    *aten("new_tensor rand randint randn randperm tril_indices triu_indices"),
)
def enumerated(call: Call) -> tuple[Value, ...]:
    """Freeze a new tensor whose positions differ; what it takes its type from is left alone."""
    reason = "it meets numbers that the code makes for a fixed size"
    return call.unknowns(call.shapes, reason)


@rule(CONSTANT)
def written_down(call: Call) -> tuple[Value, ...]:
    """Freeze a tensor that is written in the code."""
    reason = "it is a dimension of a constant of the code"
    return call.unknowns(call.shapes, reason)


@PROGRAM.rule(*_BY_POSITION, CONSTANT)
def cut_out(call: Call) -> list[Value]:
    """Let positions leave together with their numbers, which a program can cut out."""
    return [Value(tuple(call.axes.fresh(size) for size in shape)) for shape in call.shapes]
