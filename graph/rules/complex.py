"""Complex numbers: two real numbers in one position."""

from __future__ import annotations

from graph.call import Call, Value
from graph.groups import Role
from graph.rules.table import rule

_PARTS = "its two positions are the parts of one complex number"


@rule("aten.view_as_complex")
def joined(call: Call) -> Value:
    """Drop the last dimension, which holds the real and the imaginary part."""
    value = call.value("self")
    call.freeze(value.dims[-1:], _PARTS)
    # A position where both parts are zero is zero.
    return Value(value.dims[:-1], value.origins[:-1])


@rule("aten.view_as_real")
def parted(call: Call) -> Value:
    """Add a last dimension for the real and the imaginary part."""
    value = call.value("self")
    call.record(value, Role.PASS_THROUGH)
    return Value((*value.dims, call.unknown(2, _PARTS)))
