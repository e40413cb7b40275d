"""Coupling groups of further architectures, transformers and convolutional networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graph
from graph import CouplingGroup, UnitKind

from .architectures import ARCHITECTURE_CASES, ARCHITECTURES, build_architecture
from .masking import assert_sliced, assert_sound


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "implementation"), ARCHITECTURE_CASES)
def test_transformers(name: str, implementation: str) -> None:
    model, inputs = build_architecture(name, implementation)
    groups = graph.trace(model, inputs).prunable
    assert [f"{group.name}:{group.units}" for group in groups] == ARCHITECTURES[name][4]
    for group in groups:
        assert_sound(model, group, inputs)


def _convolutional(name: str, size: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Build a random network whose batch statistics fit its weights, so that signals survive."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    return model.eval(), (torch.randn(2, 3, size, size),)


def _spread(groups: tuple[CouplingGroup, ...], count: int) -> list[CouplingGroup]:
    """Pick some groups, evenly spaced, the last one included."""
    step = max(len(groups) // count, 1)
    return list(groups[::-step][:count])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_slots_are_all_there_is_to_cut(name: str) -> None:
    model, inputs = _convolutional(name, 48)
    assert_sliced(model, graph.trace(model, inputs).prunable, inputs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 12),
        ("mobilenet_v2", 25),
        ("regnet_y_400mf", 38),
        ("shufflenet_v2_x0_5", 20),
        ("squeezenet1_1", 25),
    ],
)
def test_convolutional_networks(name: str, count: int) -> None:
    model, inputs = _convolutional(name, 48)
    groups = graph.trace(model, inputs).prunable
    assert len(groups) == count
    assert {group.kind for group in groups} == {UnitKind.CHANNELS}
    for group in _spread(groups, 3):
        assert_sound(model, group, inputs)


def test_residual_channels_of_a_resnet_are_prunable() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet18()
    dependencies = graph.trace(model, (torch.zeros(1, 3, 64, 64),))
    stream = dependencies.group("conv1.channels")
    assert stream.units == 64
    assert [slot.tensor for slot in stream.producers] == [
        "conv1.weight",
        "layer1.0.conv2.weight",
        "layer1.1.conv2.weight",
    ]
    assert [slot.tensor for slot in stream.consumers] == [
        "layer1.0.conv1.weight",
        "layer1.1.conv1.weight",
        "layer2.0.conv1.weight",
        "layer2.0.downsample.0.weight",
    ]
