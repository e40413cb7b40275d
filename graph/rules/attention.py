"""Fused attention."""

from __future__ import annotations

from collections.abc import Sequence

from graph.axes import Layout
from graph.call import Call, Value
from graph.groups import Role
from graph.rules.contraction import SINGLE_HEAD
from graph.rules.table import rule


@rule("aten.scaled_dot_product_attention")
def attended(call: Call) -> Value:
    """Unify the heads of query, key and value; freeze positions and the width of a key.

    The dimensions are (batch, heads, positions, width); with `enable_gqa` consecutive query
    heads share a key head.  The width of a value stays whole beside several heads, because a group
    has one sort of unit; that of a single head stays too, so that pruning to one changes nothing.
    """
    query, key, value = (call.value(name) for name in ("query", "key", "value"))
    shape = call.shapes[0]
    call.freeze((query.dims[-1], key.dims[-1]), "queries and keys are multiplied along it")
    call.unify(query.dims[-1], key.dims[-1])
    call.freeze((key.dims[-2], value.dims[-2]), "attention is normalized over it")
    call.unify(key.dims[-2], value.dims[-2])
    if len(shape) > 3 and shape[-3] == 1:
        call.freeze((value.dims[-1],), SINGLE_HEAD)
    if call.flag("is_causal"):
        call.freeze((query.dims[-2],), "attention looks back along it")
    heads = [query.dims[:-2], _spread(call, key, shape), _spread(call, value, shape)]
    batch = call.broadcast(heads, shape[:-2])
    mask = call.optional("attn_mask")
    if mask is not None:
        scores = (*shape[:-1], call.axes.size(key.dims[-2]))
        call.record(mask, Role.PASS_THROUGH)
        call.broadcast(((*batch, query.dims[-2], key.dims[-2]), mask.dims), scores)
    call.record_heads(batch)
    return Value((*batch, query.dims[-2], value.dims[-1]))


def _spread(call: Call, shared: Value, shape: Sequence[int]) -> tuple[Layout, ...]:
    """Return the batch and head dimensions of keys or values, repeated for grouped queries."""
    dims = shared.dims[:-2]
    if not call.flag("enable_gqa") or not dims:
        return dims
    copies = shape[-3] // call.axes.size(dims[-1])
    return (*dims[:-1], call.axes.product((dims[-1], call.axes.fresh(copies))))
