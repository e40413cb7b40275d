"""Random networks: whatever is called prunable survives the masking proof."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graph

from .masking import assert_masked
from .topologies import randomized


class Chain(nn.Module):
    """Random steps on rows of features, ``(net, x)``, some of them with parameters."""

    def __init__(self, width):
        super().__init__()
        self.layers, self.steps, self.width = nn.ModuleList(), [], width

    def add(self, step):
        self.steps.append(step)
        self.width = step(self, torch.randn(2, self.width)).shape[1]

    def forward(self, x):
        for step in self.steps:
            x = step(self, x)
        return x


def _linear(net, width, use):
    """Return a step with a layer, which a copy of the network has for itself."""
    net.layers.append(nn.Linear(net.width, width))
    number = len(net.layers) - 1
    return lambda net, x: use(net.layers[number], x)


def _dense(draw, net):
    return _linear(net, draw(st.sampled_from([4, 6, 8, 12])), lambda f, x: f(x).tanh())


def _split(draw, net, use):
    """Return a step on features in rows."""
    width = net.width
    outer = draw(st.sampled_from([d for d in range(1, width + 1) if width % d == 0]))
    return lambda net, x: use(x.view(-1, outer, width // outer))


def _grouped_product(draw, net):
    outer = draw(st.sampled_from([d for d in range(1, net.width + 1) if net.width % d == 0]))
    net.layers.append(nn.ParameterList([torch.randn(outer, net.width // outer, 3)]))
    number = len(net.layers) - 1

    def step(net, x):
        weight = net.layers[number][0]
        return torch.einsum("ngi,gij->ngj", x.view(-1, *weight.shape[:2]), weight).flatten(1)

    return step


def _swap(draw, net):
    cut = draw(st.integers(1, max(net.width - 1, 1)))
    return lambda net, x: torch.cat((x[:, cut:], x[:, :cut]), 1)


def _gate(net, x):
    a, b = x.chunk(2, 1) if x.shape[1] % 2 == 0 else (1.0, x)
    return a * torch.sigmoid(b)


_PLAIN = (
    _gate,
    lambda net, x: x.repeat(1, 2),
    lambda net, x: x.tile(2),
    lambda net, x: x.repeat_interleave(2, 1),
    lambda net, x: nn.functional.pad(x, (1, 2)),
    lambda net, x: x[:, ::2] + 0.5,
    lambda net, x: x.flip(1),
)
_DRAWN = (
    *(_dense, _dense, _grouped_product, _swap),
    lambda draw, net: _linear(net, net.width, lambda f, x: x + f(x).tanh()),
    lambda draw, net: _linear(net, net.width, lambda f, x: torch.stack((x, f(x)), 2).flatten(1)),
    lambda draw, net: _split(draw, net, lambda x: x.transpose(1, 2).flatten(1)),
    lambda draw, net: _split(draw, net, lambda x: x.softmax(-1).flatten(1)),
    lambda draw, net: _split(draw, net, lambda x: x.mean(2) if x.shape[1] > 1 else x[:, 0]),
    *((lambda draw, net, step=step: step) for step in _PLAIN),
)


def random_network(data):
    """Draw a network that reads rows of five features."""
    torch.manual_seed(0)
    net = Chain(5)
    net.add(_dense(data.draw, net))
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(_DRAWN))
        if net.width <= 48:
            net.add(step(data.draw, net))
    net.add(_linear(net, 7, lambda f, x: f(x)))
    model = randomized(net)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(math.sqrt(max(parameter.shape[-1], 1)))
    return model


def test_whatever_is_prunable_is_sound():
    sound = []

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def masked(data):
        model = random_network(data)
        inputs = (torch.randn(16, 5),)
        for group in graph.trace(model, inputs).prunable:
            assert_masked(model, group, inputs)
            sound.append(group.name)

    masked()
    assert sound
