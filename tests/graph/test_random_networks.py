"""Random networks: whatever is called prunable survives the masking proof."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graph

from .masking import assert_masked
from .topologies import randomized


class Chain(nn.Module):
    """Random steps on rows of features, some of them with parameters, then a linear readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.width = width

    def linear(self, width: int) -> int:
        """Make a layer and return its number; a copy of the network has a layer of its own."""
        self.layers.append(nn.Linear(self.width, width))
        return len(self.layers) - 1

    def add(self, step: Step) -> None:
        self.steps.append(step)
        self.width = step(self, torch.randn(2, self.width)).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self, x)
        return x


Step = Callable[[Chain, Tensor], Tensor]


def _split(data: st.DataObject, width: int) -> tuple[int, int]:
    outer = data.draw(st.sampled_from([d for d in range(1, width + 1) if width % d == 0]))
    return outer, width // outer


def _dense(data: st.DataObject, net: Chain) -> Step:
    layer = net.linear(data.draw(st.sampled_from([4, 6, 8, 12])))
    return lambda net, x: torch.tanh(net.layers[layer](x))


def _residual(data: st.DataObject, net: Chain) -> Step:
    layer = net.linear(net.width)
    return lambda net, x: x + torch.tanh(net.layers[layer](x))


def _shuffle(data: st.DataObject, net: Chain) -> Step:
    outer, inner = _split(data, net.width)
    return lambda net, x: x.view(-1, outer, inner).transpose(1, 2).reshape(-1, outer * inner)


def _grouped_softmax(data: st.DataObject, net: Chain) -> Step:
    outer, inner = _split(data, net.width)
    return lambda net, x: x.view(-1, outer, inner).softmax(-1).flatten(1)


def _grouped_mean(data: st.DataObject, net: Chain) -> Step:
    outer, inner = _split(data, net.width)
    if outer == 1:
        return lambda net, x: torch.tanh(x)
    return lambda net, x: x.view(-1, outer, inner).mean(2)


def _grouped_product(data: st.DataObject, net: Chain) -> Step:
    outer, inner = _split(data, net.width)
    net.layers.append(nn.ParameterList([torch.randn(outer, inner, 3)]))
    layer = len(net.layers) - 1

    def step(net: Chain, x: Tensor) -> Tensor:
        groups = x.view(-1, outer, inner)
        return torch.einsum("ngi,gij->ngj", groups, net.layers[layer][0]).flatten(1)

    return step


def _swap(data: st.DataObject, net: Chain) -> Step:
    cut = data.draw(st.integers(1, max(net.width - 1, 1)))
    return lambda net, x: torch.cat((x[:, cut:], x[:, :cut]), 1)


def _gate(data: st.DataObject, net: Chain) -> Step:
    if net.width % 2:
        return lambda net, x: torch.sigmoid(x)

    def step(net: Chain, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)

    return step


def _copies(data: st.DataObject, net: Chain) -> Step:
    return data.draw(
        st.sampled_from([lambda net, x: x.repeat(1, 2), lambda net, x: x.repeat_interleave(2, 1)])
    )


def _pad(data: st.DataObject, net: Chain) -> Step:
    return lambda net, x: nn.functional.pad(x, (1, 2))


def _strided(data: st.DataObject, net: Chain) -> Step:
    return lambda net, x: x[:, ::2] + 0.5


def _flip(data: st.DataObject, net: Chain) -> Step:
    return lambda net, x: x.flip(1)


def _stacked(data: st.DataObject, net: Chain) -> Step:
    layer = net.linear(net.width)
    return lambda net, x: torch.stack((x, net.layers[layer](x)), 2).flatten(1)


_STEPS = (
    _dense,
    _dense,
    _residual,
    _shuffle,
    _grouped_softmax,
    _grouped_mean,
    _grouped_product,
    _swap,
    _gate,
    _copies,
    _pad,
    _strided,
    _flip,
    _stacked,
)


def random_network(data: st.DataObject) -> nn.Module:
    """Draw a network that reads rows of five features."""
    torch.manual_seed(0)
    net = Chain(5)
    net.add(_dense(data, net))
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(_STEPS))
        if net.width <= 48:
            net.add(step(data, net))
    readout = net.linear(7)
    net.add(lambda net, x: net.layers[readout](x))
    model = randomized(net)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(math.sqrt(max(parameter.shape[-1], 1)))
    return model


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_is_prunable_is_sound(data: st.DataObject) -> None:
    model = random_network(data)
    inputs = (torch.randn(16, 5),)
    for group in graph.trace(model, inputs).prunable:
        assert_masked(model, group, inputs)
