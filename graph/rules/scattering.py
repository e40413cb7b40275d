"""Operators that write to positions which numbers in another tensor name."""

from __future__ import annotations

from graph.call import Call, Value
from graph.groups import Role
from graph.rules.table import aten, rule

_WRITTEN = "positions along it are written to by number"


@rule(*aten("index_add index_copy index_reduce index_fill"))
def written_by_index(call: Call) -> Value:
    """Write to positions of one dimension; in the others, position i goes to position i."""
    value, source = call.value("self"), call.optional("source")
    if not value.dims:
        return call.opaque("a single number is written to")[0]
    dim = call.integer("dim") % len(value.dims)
    call.freeze((value.dims[dim], *call.value("index").dims), _WRITTEN)
    dims = list(value.dims)
    if source is not None and len(source.dims) == len(dims):
        call.record(source, Role.PASS_THROUGH)
        call.freeze((source.dims[dim],), _WRITTEN)
        for other in set(range(len(dims))) - {dim}:
            dims[other] = call.unify(dims[other], source.dims[other])
    call.record(value, Role.PASS_THROUGH)
    return Value(tuple(dims))


@rule(*aten("scatter scatter_add scatter_reduce"))
def written_each(call: Call) -> Value:
    """Write each entry to a position of one dimension that an index of its own names.

    In every other dimension position i of the source and of the index goes to position i, so that
    all are the same where they are equally long.  Shorter ones leave the last positions alone.
    """
    value = call.value("self")
    others = [other for other in call.values()[1:] if other.dims]
    if not value.dims or any(len(other.dims) != len(value.dims) for other in others):
        return call.opaque("a single number is written to")[0]
    written = call.integer("dim") % len(value.dims)
    dims = list(value.dims)
    for other in others:
        call.record(other, Role.PASS_THROUGH)
        for dim, layout in enumerate(other.dims):
            if dim == written:
                call.freeze((dims[dim], layout), _WRITTEN)
            elif call.axes.size(layout) == call.axes.size(dims[dim]):
                dims[dim] = call.unify(dims[dim], layout)
            else:
                call.freeze((dims[dim], layout), "fewer positions than it has are written to")
    call.record(value, Role.PASS_THROUGH)
    return Value(tuple(dims))
