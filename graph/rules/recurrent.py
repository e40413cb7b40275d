"""Recurrent layers: what they read is contracted at every step, what they carry along is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from graph.axes import Layout
from graph.call import Call, Value
from graph.groups import Role
from graph.rules.table import aten, rule

_STATES = "it is a part of states and gates, which every step reads again"
_STEPS = "states are carried along it"


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(call: Call) -> list[Value]:
    """Let the weights of the first layer read the last dimension; freeze steps and states.

    The input is (batch, steps, features) or (steps, batch, features), states are (layers, batch,
    features).  The parameters of the first layer come first, those of each direction together:
    weights of inputs and of states, and their biases.
    """
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


@rule(*aten("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"))
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
