"""Operators that act on each position alone, create tensors, or mix and reduce positions."""

from __future__ import annotations

from collections.abc import Sequence

from graph.axes import ONE, Layout
from graph.call import CONSTANT, PROGRAM, Call, Value, aten, rule
from graph.groups import Role

_UNARY = (
    "abs acos acosh asin asinh atan atanh bitwise_not ceil celu cos cosh deg2rad digamma elu "
    "erf erfc erfinv exp exp2 expm1 floor frac gelu hardsigmoid hardswish hardtanh isfinite isinf "
    "isnan leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish "
    "nan_to_num positive reciprocal relu relu6 round rrelu rsqrt selu sgn sigmoid sign signbit "
    "silu sin sinc sinh softplus softshrink hardshrink sqrt square tan tanh tanhshrink threshold "
    "trunc zeros_like ones_like full_like empty_like rand_like randn_like bernoulli cauchy "
    "exponential geometric log_normal normal_ random_ uniform "
    "fill zero angle real imag conj _conj conj_physical resolve_conj resolve_neg i0 special_erf "
    "special_erfc special_exp2 special_expit special_expm1 special_gammaln special_i0 "
    "special_log1p special_ndtr"
)

_BINARY = (
    "add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor bitwise_left_shift "
    "bitwise_right_shift clamp clamp_max clamp_min clip complex copy copysign div divide eq "
    "floor_divide fmax fmin fmod ge greater gt hypot le less lerp logaddexp logical_and "
    "logical_or logical_xor lt masked_fill maximum minimum mul multiply ne not_equal "
    "float_power heaviside ldexp logaddexp2 polar pow remainder rsub sub subtract true_divide "
    "where xlogy "
    "__and__ __or__ __xor__ __rshift__ __lshift__"
)

_COPIES = (
    "alias alpha_dropout clone contiguous detach detach_copy dropout feature_alpha_dropout "
    "feature_dropout lift lift_fresh lift_fresh_copy requires_grad to _to_copy type_as "
    "_autocast_to_full_precision _autocast_to_reduced_precision"
)

_DROPPED = "positions of it are dropped at random"

_LINEAR = frozenset(aten("neg mul multiply div divide true_divide"))

_BY_POSITION = aten("arange eye linspace logspace")
"""Operators that make numbers which depend on nothing but their positions."""


_OPERANDS = (
    "self other src end exponent real imag abs angle tensor1 tensor2 condition mask values weight "
    "min max value p x"
)

_SCALARS = (
    "alpha approximate beta decimals eps fill_value from to input_scale lambd lower upper max_val "
    "min_val mean median std sigma nan posinf neginf negative_slope rounding_mode scale threshold"
)
"""Numbers that every position meets alike."""


@rule(*aten(_UNARY), *aten(_BINARY), "aten.neg", reads=f"{_OPERANDS} {_SCALARS}")
def pointwise(call: Call) -> Value:
    """Unify what is combined; a broadcast dimension imposes nothing."""
    values = call.values()
    packet = ".".join(call.operator.split(".")[:2]).removesuffix("_")
    if len(values) == 1 and packet in _LINEAR:
        # A number times a parameter: its zeros stay zeros.
        return values[0]
    for value in values:
        call.record(value, Role.PASS_THROUGH)
    return Value(call.broadcast([value.dims for value in values], call.shapes[0]))


@rule(*aten(_COPIES), reads="self input other p train")
def copied(call: Call) -> Value:
    """Pass the first tensor on: the same numbers in another memory or precision."""
    if call.flag("train"):
        return call.opaque(_DROPPED)[0]
    return call.values()[0]


@rule("aten.prelu", reads="self weight")
def prelu(call: Call) -> Value:
    """Apply a slope for each channel (dimension 1), or a single one."""
    value, weight = call.value("self"), call.value("weight")
    dims = list(value.dims)
    if weight.dims and call.axes.size(weight.dims[0]) > 1:
        dims[1] = call.unify(dims[1], weight.dims[0])
        call.record(weight, Role.PASS_THROUGH)
    return Value(tuple(dims))


@rule("aten.native_dropout", reads="input p train")
def native_dropout(call: Call) -> Sequence[Value]:
    """Return the tensor and its mask."""
    if call.flag("train"):
        return call.opaque(_DROPPED)
    value = call.value("input")
    return [value, Value(value.dims)]


# ---- new tensors ---------------------------------------------------------------------------------


_NUMBERS = "size stride start end step steps base low high row col offset n m"


@PROGRAM.rule(*_BY_POSITION, CONSTANT, reads=_NUMBERS)
@rule(
    *aten(
        "empty empty_strided full new_empty new_empty_strided new_full new_ones new_zeros ones "
        "scalar_tensor zeros"
    ),
    reads="self size stride fill_value s",
)
def filled(call: Call) -> list[Value]:
    """Give new axes to a tensor whose positions are all alike, so that any may be left out.

    In a program positions may leave together with their numbers, which it can cut out.
    """
    return [Value(tuple(call.axes.fresh(size) for size in shape)) for shape in call.shapes]


@rule(
    *_BY_POSITION,
    *aten("new_tensor rand randint randn randperm tril_indices triu_indices"),
    reads=f"self data {_NUMBERS}",
)
def enumerated(call: Call) -> tuple[Value, ...]:
    """Freeze a new tensor whose positions differ; what it takes its type from is left alone."""
    return call.unknowns(call.shapes, "it meets numbers that the code makes for a fixed size")


@rule(CONSTANT, reads="")
def written_down(call: Call) -> tuple[Value, ...]:
    """Freeze a tensor that is written in the code."""
    return call.unknowns(call.shapes, "it is a dimension of a constant of the code")


# ---- positions that are mixed or reduced --------------------------------------------------


_REDUCTIONS = (
    "all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean "
    "median min mode nanmean nansum norm prod std std_mean sum var var_mean"
)

_ALONG = (
    "argsort cummax cummin cumprod cumsum log_softmax logcumsumexp softmax _log_softmax "
    "_safe_softmax _softmax softmin sort"
)


@rule(*aten(_REDUCTIONS), reads="self other dim keepdim correction unbiased ord p")
def reduced(call: Call) -> Value | list[Value]:
    """Freeze the dimensions that are reduced, pass the others on."""
    values = call.values()
    if call.optional("other") is not None:  # the element-wise overload, as in `max(a, b)`
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


@rule(*aten(_ALONG), reads="self dim descending stable half_to_float")
def mixed_along(call: Call) -> list[Value]:
    """Freeze the dimension along which positions influence one another."""
    value = call.value("self")
    if value.dims:
        dim = call.integer("dim") % len(value.dims)
        call.freeze((value.dims[dim],), "its positions influence one another")
    return [Value(value.dims) for _ in call.shapes]


@rule("aten.topk", "aten.kthvalue", reads="self k dim keepdim largest sorted")
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


@rule("aten.tril", "aten.triu", reads="self diagonal")
def triangular(call: Call) -> Value:
    """Freeze the two dimensions of the triangle."""
    value = call.value("self")
    call.freeze(value.dims[-2:], "a triangle of it is cut out")
    return Value(value.dims)


@rule("aten.glu", reads="self dim")
def gated(call: Call) -> Value:
    """Multiply the first half of a dimension by a gate of the second half."""
    value, dim = call.along()
    halves = call.axes.cut(value.dims[dim], call.shapes[0][dim])
    dims = list(value.dims)
    if halves is None:
        return call.opaque("it is cut in half where it cannot be separated")[0]
    dims[dim] = call.unify(*halves)
    return Value(tuple(dims))


# ---- normalizations ------------------------------------------------------------------------------

_STATISTICS = "statistics are taken over it"


def _affine(call: Call, dims: tuple[Layout, ...], *names: str) -> tuple[Layout, ...]:
    """Unify dimensions with those of the named parameters, which pass units through."""
    for name in names:
        parameter = call.optional(name)
        if parameter is not None:
            pairs = zip(dims, parameter.dims, strict=True)
            dims = tuple(call.unify(layout, other) for layout, other in pairs)
            call.record(parameter, Role.PASS_THROUGH)
    return dims


def _with_statistics(call: Call, output: Value) -> list[Value]:
    """Return the output, then the frozen statistics that native variants also return."""
    return [output, *call.unknowns(call.shapes[1:], _STATISTICS)]


@rule(
    *aten("layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    reads="input normalized_shape weight bias eps cudnn_enable",
)
def normalized_over_last(call: Call) -> list[Value]:
    """Freeze the trailing dimensions, whose positions share their statistics."""
    value = call.value("input")
    count = len(call.integers("normalized_shape"))
    call.freeze(value.dims[-count:], _STATISTICS)
    dims = _affine(call, value.dims[-count:], "weight", "bias")
    return _with_statistics(call, Value((*value.dims[:-count], *dims)))


@rule(
    *aten(
        "batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm "
        "_native_batch_norm_legit_no_training _batch_norm_no_update instance_norm"
    ),
    reads="input weight bias running_mean running_var training use_input_stats momentum eps "
    "epsilon exponential_average_factor cudnn_enabled",
)
def normalized_by_channel(call: Call) -> Sequence[Value]:
    """Pass channels on, each normalized by itself; instance norm also freezes the space."""
    if call.flag("training"):
        return call.opaque("it is normalized by the statistics of each batch")
    value = call.value("input")
    if "instance" in call.operator:
        call.freeze(value.dims[2:], _STATISTICS)
    names = ("weight", "bias", "running_mean", "running_var")
    channels = _affine(call, value.dims[1:2], *names)
    return _with_statistics(call, Value((value.dims[0], *channels, *value.dims[2:])))


@rule(
    "aten.group_norm",
    "aten.native_group_norm",
    reads="input weight bias num_groups group N C HxW eps cudnn_enabled",
)
def normalized_by_group(call: Call) -> list[Value]:
    """Factor channels into groups, which are independent, and members, which are frozen."""
    value = call.value("input")
    groups = call.integers("num_groups", "group")[0]
    size = call.axes.size(value.dims[1])
    factors = call.axes.regroup((value.dims[1],), (groups, size // groups))
    if factors is None:
        return list(call.opaque("groups of channels are normalized across its boundaries"))
    call.freeze((factors[1], *value.dims[2:]), _STATISTICS)
    channels = _affine(call, (call.axes.product(factors),), "weight", "bias")
    return _with_statistics(call, Value((value.dims[0], *channels, *value.dims[2:])))


@rule("aten._weight_norm", reads="v g dim")
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


# ---- complex numbers, two real ones in one position, and Fourier transforms ----------------------

_PARTS = "its two positions are the parts of one complex number"


@rule("aten.view_as_complex", reads="self")
def joined(call: Call) -> Value:
    """Drop the last dimension, which holds the real and the imaginary part."""
    value = call.value("self")
    call.freeze(value.dims[-1:], _PARTS)
    # A position where both parts are zero is zero.
    return Value(value.dims[:-1], value.origins[:-1])


@rule("aten.view_as_real", reads="self")
def parted(call: Call) -> Value:
    """Add a last dimension for the real and the imaginary part."""
    value = call.value("self")
    call.record(value, Role.PASS_THROUGH)
    return Value((*value.dims, call.unknown(2, _PARTS)))


_MIXED = "a Fourier transform is taken along it"

_ONE = "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"
_TWO = "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2"
_MORE = "fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn fft_fftshift fft_ifftshift"


@rule(*aten(f"{_ONE} {_TWO} {_MORE}"), reads="self n s dim norm")
def transformed(call: Call) -> Value:
    """Freeze the dimensions along which positions are mixed, whose number may change."""
    value = call.value("self")
    rank = len(value.dims)
    sizes = call.integers("s")
    named = call.integers("dim") or (range(rank - len(sizes), rank) if sizes else range(rank))
    along = {dim % rank for dim in named}
    call.freeze((value.dims[dim] for dim in along), _MIXED)
    call.record(value, Role.PASS_THROUGH)
    pairs = enumerate(zip(value.dims, call.shapes[0], strict=True))
    return Value(
        tuple(
            call.unknown(size, _MIXED) if dim in along else layout for dim, (layout, size) in pairs
        )
    )
