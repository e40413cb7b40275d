"""Operators that act on each position alone, with broadcasting, or create tensors."""

from __future__ import annotations

from graph.call import Call, Value
from graph.groups import Role
from graph.rules.table import CONSTANT, PROGRAM, aten, rule

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

_LINEAR = frozenset(aten("neg mul multiply div divide true_divide"))

_BY_POSITION = aten("arange eye linspace logspace")
"""Operators that make numbers which depend on nothing but their positions."""


@rule(*aten(_UNARY), *aten(_BINARY), "aten.neg")
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


@rule(*aten(_COPIES))
def copied(call: Call) -> Value:
    """Pass the first tensor on: the same numbers in another memory or precision."""
    return call.values()[0]


@rule("aten.prelu")
def prelu(call: Call) -> Value:
    """Apply a slope for each channel (dimension 1), or a single one."""
    value, weight = call.value("self"), call.value("weight")
    dims = list(value.dims)
    if weight.dims and call.axes.size(weight.dims[0]) > 1:
        dims[1] = call.unify(dims[1], weight.dims[0])
        call.record(weight, Role.PASS_THROUGH)
    return Value(tuple(dims))


@rule("aten.native_dropout")
def native_dropout(call: Call) -> list[Value]:
    """Return the tensor and its mask."""
    value = call.value("input")
    return [value, Value(value.dims)]


# ---- new tensors ---------------------------------------------------------------------------------


@PROGRAM.rule(*_BY_POSITION, CONSTANT)
@rule(
    *aten(
        "empty empty_strided full new_empty new_empty_strided new_full new_ones new_zeros ones "
        "scalar_tensor zeros"
    )
)
def filled(call: Call) -> list[Value]:
    """Give new axes to a tensor whose positions are all alike, so that any may be left out.

    In a program positions may leave together with their numbers, which it can cut out.
    """
    return [Value(tuple(call.axes.fresh(size) for size in shape)) for shape in call.shapes]


@rule(*_BY_POSITION, *aten("new_tensor rand randint randn randperm tril_indices triu_indices"))
def enumerated(call: Call) -> tuple[Value, ...]:
    """Freeze a new tensor whose positions differ; what it takes its type from is left alone."""
    return call.unknowns(call.shapes, "it meets numbers that the code makes for a fixed size")


@rule(CONSTANT)
def written_down(call: Call) -> tuple[Value, ...]:
    """Freeze a tensor that is written in the code."""
    return call.unknowns(call.shapes, "it is a dimension of a constant of the code")
