"""Recurrent layers as consumers: the inputs of their gates, before any state is added.

The first layer of an LSTM, a GRU or a plain RNN contracts what it reads with weights of its own,
``G = X W + b`` at every step, and adds what it makes of the states to that.  G is what a refit
reproduces; no module puts it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osscar.network.hooks import other_forwards

_RecurrentLayer: TypeAlias = nn.RNNBase | nn.RNNCellBase
RECURRENT = (nn.RNNBase, nn.RNNCellBase)

WEIGHT, BIAS = "weight_ih", "bias_ih"


def directions(module: nn.Module) -> list[str]:
    """Return how the parameters that read inputs end, for each direction; nothing for others."""
    if isinstance(module, nn.RNNBase):
        return ["_l0", "_l0_reverse"] if module.bidirectional else ["_l0"]
    return [""] if isinstance(module, nn.RNNCellBase) else []


def input_gates(module: _RecurrentLayer, x: Tensor) -> Tensor:
    """Return what the gates of all directions take from the inputs, (..., directions x gates)."""
    parts = (
        F.linear(x, getattr(module, WEIGHT + end), getattr(module, BIAS + end, None))
        for end in directions(module)
    )
    return torch.cat(list(parts), -1)


@contextmanager
def gates_shown(
    module: _RecurrentLayer, watch: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Let a layer run on the gates' inputs that `watch` returns, given its inputs and these.

    It is called with gates for inputs and identities for weights then, and computes the same.
    """
    forward = module.forward

    def shown(input: Tensor, hx: object = None) -> object:
        gates = watch(input, input_gates(module, input))
        with _taking_gates(module, gates):
            return forward(gates, hx)

    with other_forwards([(module, shown)]):
        yield


@contextmanager
def _taking_gates(module: _RecurrentLayer, gates: Tensor) -> Iterator[None]:
    """Put identities in the place of the weights that read inputs, and zeros for their biases."""
    width, ends = gates.shape[-1], directions(module)
    parts = torch.eye(width, dtype=gates.dtype, device=gates.device).chunk(len(ends))
    others = {WEIGHT + end: part for end, part in zip(ends, parts, strict=True)}
    others |= {BIAS + end: gates.new_zeros(width // len(ends)) for end in ends}
    size, parameters = module.input_size, dict(module._parameters)
    held = module._flat_weights if isinstance(module, nn.RNNBase) else []
    module.input_size = width
    if isinstance(module, nn.RNNBase):
        names = module._flat_weights_names
        module._flat_weights = [
            others.get(name, own) for name, own in zip(names, held, strict=True)
        ]
    else:
        known = {name: others[name] for name in others if parameters.get(name) is not None}
        module._parameters.update(known)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module.input_size = size
        module._parameters.update(parameters)
        if isinstance(module, nn.RNNBase):
            module._flat_weights = held
