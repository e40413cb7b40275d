"""Normalizations: over positions (frozen), and with statistics of each channel (passed on)."""

from __future__ import annotations

from graph.axes import Layout
from graph.call import Call, Value
from graph.groups import Role
from graph.rules.table import aten, rule

_STATISTICS = "statistics are taken over it"


def _affine(call: Call, layout: Layout, *names: str) -> Layout:
    """Apply per-position parameters to a dimension."""
    for name in names:
        parameter = call.optional(name)
        if parameter is not None:
            layout = call.unify(layout, parameter.dims[0])
            call.record(parameter, Role.PASS_THROUGH)
    return layout


def _with_statistics(call: Call, output: Value) -> list[Value]:
    """Return the output, then the frozen statistics that native variants also return."""
    return [output, *call.unknowns(call.shapes[1:], _STATISTICS)]


@rule(*aten("layer_norm native_layer_norm rms_norm _fused_rms_norm"))
def normalized_over_last(call: Call) -> list[Value]:
    """Freeze the trailing dimensions, whose positions share their statistics."""
    value = call.value("input")
    count = len(call.integers("normalized_shape"))
    dims = value.dims[-count:]
    call.freeze(dims, _STATISTICS)
    for name in ("weight", "bias"):
        parameter = call.optional(name)
        if parameter is not None:
            call.record(parameter, Role.PASS_THROUGH)
            pairs = zip(dims, parameter.dims, strict=True)
            dims = tuple(call.unify(layout, other) for layout, other in pairs)
    return _with_statistics(call, Value((*value.dims[:-count], *dims)))


@rule(
    *aten(
        "batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm "
        "_native_batch_norm_legit_no_training _batch_norm_no_update"
    )
)
def normalized_by_channel(call: Call) -> list[Value]:
    """Pass every dimension on; channels carry their own statistics and scale."""
    value = call.value("input")
    names = ("weight", "bias", "running_mean", "running_var")
    channels = _affine(call, value.dims[1], *names)
    return _with_statistics(call, Value((value.dims[0], channels, *value.dims[2:])))


@rule("aten.instance_norm")
def normalized_by_instance(call: Call) -> Value:
    """Pass channels on, freeze the space over which their statistics are taken."""
    value = call.value("input")
    call.freeze(value.dims[2:], _STATISTICS)
    names = ("weight", "bias", "running_mean", "running_var")
    return Value((value.dims[0], _affine(call, value.dims[1], *names), *value.dims[2:]))


@rule("aten.group_norm", "aten.native_group_norm")
def normalized_by_group(call: Call) -> list[Value]:
    """Factor channels into groups, which are independent, and members, which are frozen."""
    value = call.value("input")
    groups = call.integers("num_groups", "group")[0]
    size = call.axes.size(value.dims[1])
    factors = call.axes.regroup((value.dims[1],), (groups, size // groups))
    if factors is None:
        return list(call.opaque("groups of channels are normalized across its boundaries"))
    call.freeze((factors[1], *value.dims[2:]), _STATISTICS)
    channels = _affine(call, call.axes.product(factors), "weight", "bias")
    return _with_statistics(call, Value((value.dims[0], channels, *value.dims[2:])))


@rule("aten._weight_norm")
def weight_normalized(call: Call) -> Value:
    """Give each row of a weight a length of its own; what the length is taken over is frozen."""
    direction, length = call.value("v"), call.value("g")
    dim = call.integer("dim") % len(direction.dims)
    others = [layout for index, layout in enumerate(direction.dims) if index != dim]
    call.freeze(others, "its weights are normalized together")
    dims, origins = list(direction.dims), list(direction.origins)
    dims[dim] = call.unify(direction.dims[dim], length.dims[dim])
    if direction.is_weight and length.is_weight:
        origins[dim] += length.origins[dim]
    return Value(tuple(dims), tuple(origins))
