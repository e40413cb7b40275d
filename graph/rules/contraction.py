"""Sums of products: linear layers, matrix products, einsum, fused attention, recurrent layers.

All of them are one computation over labelled dimensions.  A label that is summed over is read by
the parameter that carries it (a consumer); a label that only a parameter carries is produced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias, cast

from graph.axes import ONE, Layout
from graph.call import Call, Value, aten, rule
from graph.groups import Role

_TWO_ACTIVATIONS = "it is summed over in a product of two activations"
_SINGLE_HEAD = "it is the width of a single head, which the code around it keeps whole"
"""Why the values of an attention with one head stay, as they do where there are several."""


Operand: TypeAlias = tuple[Value, tuple[str, ...]]
"""A tensor with one label for each dimension."""


def contract(call: Call, operands: Sequence[Operand], output: Sequence[str]) -> Value:
    """Propagate through a sum of products, the labels not in `output` summed over."""
    merged: dict[str, Layout] = {}
    carriers: dict[str, list[Operand]] = {}
    for operand in operands:
        value, labels = operand
        for label, layout in zip(labels, value.dims, strict=True):
            if call.axes.size(layout) == 1:
                merged.setdefault(label, ONE)  # broadcast: imposes nothing
                continue
            known = merged.get(label, ONE)
            merged[label] = layout if known == ONE else call.unify(known, layout)
            carriers.setdefault(label, []).append(operand)
    for label, holders in carriers.items():
        _record(call, label, holders, summed=label not in output)
    if len(operands) > 1 and not any(value.is_weight for value, _ in operands):
        # A head dimension of size one broadcasts against all heads (multi-query attention).
        shared = set.intersection(*(set(labels) for _, labels in operands))
        call.record_heads(merged[label] for label in output if label in shared)
        # What they share is batch and heads, in this order; a single one may be the batch alone.
        together = [label for label in operands[0][1] if label in shared and label in output]
        if len(together) > 1 and merged[together[-1]] == ONE:
            call.freeze((merged[label] for label in output if label not in shared), _SINGLE_HEAD)
    return Value(tuple(call.axes.resolve(merged[label]) for label in output))


def _record(call: Call, label: str, holders: Sequence[Operand], *, summed: bool) -> None:
    places = [(value, labels.index(label)) for value, labels in holders]
    weights = [(value, dim) for value, dim in places if value.is_weight]
    if summed and not weights:
        call.freeze((value.dims[dim] for value, dim in places), _TWO_ACTIVATIONS)
    role = Role.CONSUMER if summed else Role.PASS_THROUGH if len(holders) > 1 else Role.PRODUCER
    for value, dim in weights:
        call.record(value, role, dim)


def add_bias(call: Call, value: Value, bias: Value | None) -> Value:
    """Add a tensor that broadcasts to `value`."""
    if bias is None:
        return value
    shape = tuple(call.axes.size(layout) for layout in value.dims)
    call.record(bias, Role.PASS_THROUGH)
    return Value(call.broadcast((value.dims, bias.dims), shape))


def _batch(rank: int) -> tuple[str, ...]:
    """Labels of leading dimensions, numbered from the end as broadcasting aligns them."""
    return tuple(f"batch{back}" for back in range(rank, 0, -1))


@rule("aten.linear", reads="input weight bias")
def linear(call: Call) -> Value:
    """Apply ``y = x w' + b`` over the last dimension."""
    value, weight = call.value("input"), call.value("weight")
    batch = _batch(len(value.dims) - 1)
    rows = ("out",) if len(weight.dims) == 2 else ()
    operands = ((value, (*batch, "in")), (weight, (*rows, "in")))
    return add_bias(call, contract(call, operands, (*batch, *rows)), call.optional("bias"))


def _matrix_product(call: Call, left: Value, right: Value) -> Value:
    """Multiply as `torch.matmul` does: vectors, matrices, and broadcast batches of them."""
    rows = ("row",) if len(left.dims) > 1 else ()
    columns = ("column",) if len(right.dims) > 1 else ()
    left_batch, right_batch = _batch(len(left.dims) - 2), _batch(len(right.dims) - 2)
    batch = max(left_batch, right_batch, key=len)
    operands = ((left, (*left_batch, *rows, "sum")), (right, (*right_batch, "sum", *columns)))
    return contract(call, operands, (*batch, *rows, *columns))


@rule(
    "aten.matmul",
    "aten.__matmul__",
    "aten.dot",
    "aten.mm",
    "aten.bmm",
    "aten.mv",
    reads="self other mat2 tensor vec",
)
def matmul(call: Call) -> Value:
    """Multiply two tensors."""
    return _matrix_product(call, *call.values())


@rule(
    "aten.addmm",
    "aten.baddbmm",
    "aten.addmv",
    reads="self mat mat1 mat2 vec batch1 batch2 alpha beta",
)
def product_with_bias(call: Call) -> Value:
    """Multiply and add the first argument."""
    bias, left, right = call.values()
    return add_bias(call, _matrix_product(call, left, right), bias)


_BY_EXPERT = (("self", "input"), ("mat2", "weight"))
"""What torch and transformers call the rows and the weight."""


@rule(
    "aten._grouped_mm", "transformers.grouped_mm_fallback", reads="self mat2 input weight offs bias"
)
def product_by_expert(call: Call) -> Value:
    """Multiply each run of rows by the matrix of its expert: (rows, in) x (experts, in, out)."""
    rows, weight = (call.value(a if a in call.arguments else b) for a, b in _BY_EXPERT)
    others = [value for value in call.values() if value is not rows and value is not weight]
    if (len(rows.dims), len(weight.dims)) != (2, 3):
        return call.opaque("experts are multiplied in an unusual layout")[0]
    routing = (weight.dims[0], *(layout for other in others for layout in other.dims))
    call.freeze(routing, "rows are routed to its positions")
    one_expert = Value(weight.dims[1:], weight.origins[1:])
    operands = ((rows, ("row", "sum")), (one_expert, ("sum", "column")))
    return contract(call, operands, ("row", "column"))


@rule("aten.einsum", reads="equation tensors path")
def einsum(call: Call) -> Value:
    """Propagate through an equation such as ``b i k, b j k -> b i j``."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    values = call.values()
    left, arrow, right = equation.partition("->")
    terms = [
        _labels(term, len(value.dims)) for term, value in zip(left.split(","), values, strict=True)
    ]
    counts = Counter(label for term in terms for label in term)
    if any(len(set(term)) < len(term) for term in terms):
        return call.opaque("a diagonal of it is taken")[0]
    batch = max((tuple(x for x in term if x.startswith("batch")) for term in terms), key=len)
    if arrow:
        output = tuple(
            label
            for part in right.partition("...")
            for label in (batch if part == "..." else tuple(part))
        )
    else:
        singles = sorted(label for label, n in counts.items() if n == 1 and len(label) == 1)
        output = (*batch, *singles)
    return contract(call, list(zip(values, terms, strict=True)), output)


def _labels(term: str, rank: int) -> tuple[str, ...]:
    """Return the labels of one operand of an einsum equation, its ellipsis written out."""
    before, dots, after = term.partition("...")
    middle = _batch(rank - len(before) - len(after)) if dots else ()
    return (*before, *middle, *after)


@rule(
    "aten.scaled_dot_product_attention",
    reads="query key value attn_mask is_causal scale enable_gqa",
)
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
        call.freeze((value.dims[-1],), _SINGLE_HEAD)
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


# ---- recurrent layers ---------------------------------------------------------------------


_STATES = "it is a part of states and gates, which every step reads again"
_STEPS = "states are carried along it"


@rule(
    "aten.lstm.input",
    "aten.gru.input",
    "aten.rnn_tanh.input",
    "aten.rnn_relu.input",
    reads="input hx params has_biases num_layers dropout train bidirectional batch_first",
)
def recurrent(call: Call) -> Sequence[Value]:
    """Let the weights of the first layer read the last dimension; freeze steps and states.

    The input is (batch, steps, features) or (steps, batch, features), states are (layers, batch,
    features).  The parameters of the first layer come first, those of each direction together:
    weights of inputs and of states, and their biases.
    """
    if call.flag("train") and call.arguments["dropout"]:
        return call.opaque("positions of it are dropped at random between layers")
    value = call.value("input")
    parameters = cast(Sequence[Value], call.arguments["params"])
    directions = 1 + call.flag("bidirectional")
    each = len(parameters) // (call.integer("num_layers") * directions)
    starts = range(0, len(parameters), each)
    for start in starts:
        _freeze_states(call, parameters[start : start + each], reads=start >= directions * each)
    _read(call, value, [parameters[start] for start in starts[:directions]])
    one, other, _ = value.dims
    batch, steps = (one, other) if call.flag("batch_first") else (other, one)
    call.freeze((steps,), _STEPS)
    for states in _states(call):
        call.freeze((states.dims[0], states.dims[2]), _STATES)
        call.unify(batch, states.dims[1])
    output, *final = call.shapes
    return [
        Value((one, other, call.unknown(output[2], _STATES))),
        *(
            Value((call.unknown(shape[0], _STATES), batch, call.unknown(shape[2], _STATES)))
            for shape in final
        ),
    ]


@rule(*aten("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"), reads="input hx w_ih w_hh b_ih b_hh")
def recurrent_step(call: Call) -> list[Value]:
    """Do one step: (batch, features) or (features)."""
    value, weight = call.value("input"), call.value("w_ih")
    others = [call.optional(name) for name in ("w_hh", "b_ih", "b_hh")]
    _freeze_states(call, [weight, *(other for other in others if other is not None)])
    _read(call, value, [weight])
    batch = value.dims[:-1]
    for states in _states(call):
        call.freeze(states.dims[-1:], _STATES)
        for one, other in zip(batch, states.dims[:-1], strict=True):
            call.unify(one, other)
    return [Value((*batch, call.unknown(shape[-1], _STATES))) for shape in call.shapes]


def _read(call: Call, value: Value, weights: Sequence[Value]) -> None:
    """Contract the features with the weights of inputs, (gates, features), of each direction."""
    features: Layout = value.dims[-1]
    for weight in weights:
        features = call.unify(features, weight.dims[1])
        call.record(weight, Role.CONSUMER, 1)
        if not weight.is_weight:
            call.freeze((features,), "it is summed over in a product of two activations")


def _freeze_states(call: Call, parameters: Sequence[Value], *, reads: bool = False) -> None:
    """Freeze gates and states; with `reads`, also what the first layer's weights read."""
    first, *others = parameters
    call.record(first, Role.PRODUCER, 0)
    call.freeze(first.dims if reads else first.dims[:1], _STATES)
    for other in others:
        call.record(other, Role.PASS_THROUGH)
        call.freeze(other.dims, _STATES)
        if call.axes.size(other.dims[0]) == call.axes.size(first.dims[0]):
            call.unify(first.dims[0], other.dims[0])


def _states(call: Call) -> list[Value]:
    """Return the states before the first step."""
    given = call.arguments["hx"]
    return [given] if isinstance(given, Value) else list(cast(Sequence[Value], given))
