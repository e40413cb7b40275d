"""Operators that mix or reduce the positions of a dimension."""

from __future__ import annotations

from graph.axes import ONE
from graph.call import Call, Value
from graph.rules.table import aten, rule

_REDUCTIONS = (
    "all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean "
    "median min mode nanmean nansum norm prod std std_mean sum var var_mean"
)

_ALONG = (
    "argsort cummax cummin cumprod cumsum log_softmax logcumsumexp softmax _log_softmax "
    "_safe_softmax _softmax softmin sort"
)


@rule(*aten(_REDUCTIONS))
def reduced(call: Call) -> Value | list[Value]:
    """Freeze the dimensions that are reduced, pass the others on."""
    values = call.values()
    if len(values) > 1:  # the element-wise overload, as in `max(a, b)`
        return Value(call.broadcast([value.dims for value in values], call.shapes[0]))
    value = values[0]
    rank = len(value.dims)
    dims = {dim % rank for dim in call.integers("dim")} if rank else set()
    dims = dims or set(range(rank))
    if call.used:  # what no output depends on may be reduced over fewer units
        call.freeze((value.dims[dim] for dim in dims), "it is reduced to a single number")
    if call.shapes and len(call.shapes[0]) == rank:
        kept = tuple(ONE if d in dims else value.dims[d] for d in range(rank))
    else:
        kept = tuple(value.dims[d] for d in range(rank) if d not in dims)
    return [Value(kept) for _ in call.shapes]


@rule(*aten(_ALONG))
def mixed_along(call: Call) -> list[Value]:
    """Freeze the dimension along which positions influence one another."""
    value = call.value("self")
    if value.dims:
        dim = call.integer("dim") % len(value.dims)
        call.freeze((value.dims[dim],), "its positions influence one another")
    return [Value(value.dims) for _ in call.shapes]


@rule("aten.topk", "aten.kthvalue")
def picked_by_size(call: Call) -> list[Value]:
    """Freeze the dimension along which the largest entries are picked."""
    value = call.value("self")
    reason = "its largest entries are picked"
    dims = list(value.dims)
    if dims:
        dim = call.integer("dim") % len(dims)
        call.freeze((dims[dim],), reason)
        if len(call.shapes[0]) == len(dims):
            dims[dim] = call.unknown(call.shapes[0][dim], reason)
        else:
            del dims[dim]
    return [Value(tuple(dims)) for _ in call.shapes]


@rule("aten.tril", "aten.triu")
def triangular(call: Call) -> Value:
    """Freeze the two dimensions of the triangle."""
    value = call.value("self")
    call.freeze(value.dims[-2:], "a triangle of it is cut out")
    return Value(value.dims)


@rule("aten.glu")
def gated(call: Call) -> Value:
    """Multiply the first half of a dimension by a gate of the second half."""
    value, dim = call.along()
    halves = call.axes.cut(value.dims[dim], call.shapes[0][dim])
    dims = list(value.dims)
    if halves is None:
        return call.opaque("it is cut in half where it cannot be separated")[0]
    dims[dim] = call.unify(*halves)
    return Value(tuple(dims))
