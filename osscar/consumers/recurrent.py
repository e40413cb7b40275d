"""Recurrent layers as consumers: the inputs of their gates, before any state is added.

The first layer of an LSTM, a GRU or a plain RNN contracts what it reads with weights of its own,
``G = X W + b`` at every step, and adds what it makes of the states to that.  G is what a refit
reproduces; no module puts it out.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
