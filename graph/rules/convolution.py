"""Convolutions and what acts on the space around them."""

from __future__ import annotations

import re

from graph.axes import Layout
from graph.call import Call, Value, aten, rule
from graph.groups import Role
from graph.rules.contraction import add_bias

_WINDOW = "windows slide over it"
_PLACES = "it is read at places in space"


@rule(
    *aten("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"),
    reads="input weight bias stride padding dilation groups transposed output_padding",
)
def convolved(call: Call) -> Value:
    """Contract channels within each group; a depthwise filter is passed through."""
    value, weight = call.value("input"), call.value("weight")
    space = len(weight.dims) - 2
    transposed = "transpose" in call.operator or call.flag("transposed")
    lead, channels = value.dims[: -space - 1], value.dims[-space - 1]
    groups = call.integer("groups")
    read, rows = (_grouped(call, one, groups) for one in (channels, weight.dims[0]))
    if read is None or rows is None:
        return call.opaque("groups of channels cross its boundaries")[0]
    group = call.unify(read[0], rows[0])
    taken, made = (rows[1], weight.dims[1]) if transposed else (weight.dims[1], rows[1])
    call.unify(read[1], taken)
    if not weight.is_weight:
        call.freeze((taken,), "it is summed over in a product of two activations")
    call.record(weight, Role.PASS_THROUGH, 0, group)
    call.record(weight, Role.CONSUMER, 0 if transposed else 1, taken)
    call.record(weight, Role.PRODUCER, 1 if transposed else 0, made)
    around = _around(call, value.dims[-space:], weight.dims[2:], transposed)
    # A bias is added along the last dimension.
    sums = Value((*lead, *around, call.axes.product((group, made))))
    produced = add_bias(call, sums, call.optional("bias")).dims[-1]
    return Value((*lead, produced, *around))


def _around(
    call: Call, space: tuple[Layout, ...], taps: tuple[Layout, ...], transposed: bool
) -> tuple[Layout, ...]:
    """Freeze space and taps, and return the space that is made; a single tap mixes no positions."""
    single = all(call.axes.size(tap) == 1 for tap in taps)
    padding = call.arguments["padding"]
    pads = not isinstance(padding, str) and any(call.integers("padding"))
    if single and not (transposed or pads) and set(call.integers("stride")) == {1}:
        return space
    call.freeze((*space, *taps), _WINDOW)
    return tuple(call.unknown(size, _WINDOW) for size in call.shapes[0][-len(space) :])


def _grouped(call: Call, layout: Layout, groups: int) -> list[Layout] | None:
    """Factor channels into (groups, channels in a group)."""
    return call.axes.regroup((layout,), (groups, call.axes.size(layout) // groups))


_KINDS = "avg_pool max_pool adaptive_avg_pool adaptive_max_pool _adaptive_avg_pool"
_POOLS = " ".join(f"{kind}{d}d" for d in (1, 2, 3) for kind in _KINDS.split())
_WITH_INDICES = "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"
_RESAMPLERS = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa"
)
_SPACE = {
    f"aten.{name}": int(re.findall(r"([123])d", name)[0])
    for name in f"{_POOLS} {_WITH_INDICES} {_RESAMPLERS}".split()
}
"""How many trailing dimensions of each operator are space."""


@rule(
    *_SPACE,
    reads="self input kernel_size stride padding dilation ceil_mode count_include_pad "
    "divisor_override output_size align_corners scales scales_d scales_h scales_w scale_factors",
)
def resampled(call: Call) -> list[Value]:
    """Pass batch and channels on; positions in space are combined."""
    value = call.values()[0]
    space = _SPACE[".".join(call.operator.split(".")[:2])]
    call.freeze(value.dims[-space:], _WINDOW)
    return [
        Value((*value.dims[:-space], *(call.unknown(size, _WINDOW) for size in shape[-space:])))
        for shape in call.shapes
    ]


@rule("aten.pixel_shuffle", reads="self upscale_factor")
def pixels_from_channels(call: Call) -> Value:
    """Turn channels ``c x r x r`` into space; the factor stays whole."""
    value, factor = call.value("self"), call.integer("upscale_factor")
    size = call.axes.size(value.dims[-3])
    parts = call.axes.regroup((value.dims[-3],), (size // factor**2, factor, factor))
    if parts is None:
        return call.opaque("blocks of channels become space across its boundaries")[0]
    call.freeze((*parts[1:], *value.dims[-2:]), _WINDOW)
    around = (call.unknown(size, _WINDOW) for size in call.shapes[0][-2:])
    return Value((*value.dims[:-3], parts[0], *around))


@rule("aten.pixel_unshuffle", reads="self downscale_factor")
def channels_from_pixels(call: Call) -> Value:
    """Turn space into channels ``c x r x r``; the factor stays whole."""
    value, factor = call.value("self"), call.integer("downscale_factor")
    call.freeze(value.dims[-2:], _WINDOW)
    blocks = [call.unknown(factor, _WINDOW) for _ in range(2)]
    around = (call.unknown(size, _WINDOW) for size in call.shapes[0][-2:])
    return Value((*value.dims[:-3], call.axes.product((value.dims[-3], *blocks)), *around))


@rule("aten.im2col", reads="self kernel_size dilation padding stride")
def unfolded(call: Call) -> Value:
    """Turn windows into channels ``c x taps`` at each position; the taps stay whole."""
    value = call.value("self")
    call.freeze(value.dims[-2:], _WINDOW)
    columns, positions = call.shapes[0][-2:]
    taps = call.unknown(columns // call.axes.size(value.dims[-3]), _WINDOW)
    channels = call.axes.product((value.dims[-3], taps))
    return Value((*value.dims[:-3], channels, call.unknown(positions, _WINDOW)))


@rule("aten.col2im", reads="self output_size kernel_size dilation padding stride")
def folded(call: Call) -> Value:
    """Add windows of channels ``c x taps`` up to an image; the taps stay whole."""
    value, (channels, *space) = call.value("self"), call.shapes[0][-3:]
    size = call.axes.size(value.dims[-2])
    parts = call.axes.regroup((value.dims[-2],), (channels, size // channels))
    if parts is None:
        return call.opaque("windows of channels become an image across its boundaries")[0]
    call.freeze((parts[1], value.dims[-1]), _WINDOW)
    return Value((*value.dims[:-2], parts[0], *(call.unknown(n, _WINDOW) for n in space)))


@rule(
    "aten.grid_sampler",
    "aten.grid_sampler_2d",
    "aten.grid_sampler_3d",
    reads="input grid interpolation_mode padding_mode align_corners",
)
def sampled(call: Call) -> Value:
    """Read an image at places in space that a grid names, in all channels the same ones."""
    value, grid = call.value("input"), call.value("grid")
    call.freeze((*value.dims[2:], *grid.dims[1:]), _PLACES)
    batch = call.unify(value.dims[0], grid.dims[0])
    around = (call.unknown(size, _WINDOW) for size in call.shapes[0][2:])
    return Value((batch, value.dims[1], *around))
