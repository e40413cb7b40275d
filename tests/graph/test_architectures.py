"""Coupling groups of further architectures, transformers and convolutional networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graph
from graph import CouplingGroup, Role, UnitKind
from tests.zoo import TRACED, transformers_case

from .masking import assert_sliced, assert_sound

_WRITTEN_OUT = (
    *("llama", "llama-multi-query", "gemma2", "opt", "gpt2", "gpt-j", "falcon-multi-query"),
    *("bert", "t5", "swin"),
)
CASES = [*((name, None) for name in TRACED), *((name, "eager") for name in _WRITTEN_OUT)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_transformers(name: str, attention: str | None) -> None:
    case = transformers_case(name, attention)
    model, inputs = case.build(), case.make_inputs()[0]
    groups = graph.trace(model, inputs).prunable
    assert {group.name: group.units for group in groups} == case.groups
    for group in groups:
        assert_sound(model, group, inputs)


def _slots(group: CouplingGroup, role: Role) -> dict[str, tuple[int, int, int]]:
    return {
        s.tensor.split("self_attn.")[-1]: (s.dim, s.outer, s.inner)
        for s in group.slots
        if s.role is role
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("keys", "units", "rows"), [(4, 4, 8), (2, 2, 16), (1, 4, 8)])
def test_units_of_heads(keys: int, units: int, rows: int, implementation: str) -> None:
    # A batch of two, beside two key heads: equal sizes must not be confused.
    heads = {"num_attention_heads": 4, "num_key_value_heads": keys, "head_dim": 8}
    case = transformers_case("llama", implementation, attention_bias=True, **heads)
    found = graph.trace(case.build(), case.make_inputs()[0])
    group = found.group("model.layers.0.self_attn.heads")
    assert group.units == units
    producers = {"q_proj.weight": (0, 1, rows)}
    if keys > 1:  # a single key head is shared by all, and belongs to none
        producers |= {"k_proj.weight": (0, 1, 8), "v_proj.weight": (0, 1, 8)}
    assert _slots(group, Role.PRODUCER) == producers
    assert _slots(group, Role.CONSUMER) == {"o_proj.weight": (1, 1, rows)}
    biases = {name.replace("weight", "bias"): place for name, place in producers.items()}
    assert _slots(group, Role.PASS_THROUGH) == biases


@pytest.mark.parametrize(
    ("family", "implementation"), [("opt", "eager"), ("llama", "eager"), ("llama", "sdpa")]
)
def test_a_single_head_is_kept_whole(family: str, implementation: str) -> None:
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 48}
    model = transformers_case(family, implementation, **heads).build()
    for size in ((2, 7), (1, 7)):
        groups = graph.trace(model, {"input_ids": torch.zeros(size).long()}).groups
        prunable = [group.name for group in groups if group.prunable]
        assert len(prunable) == 2
        assert all(name.endswith("neurons") for name in prunable)
        (width,) = (
            group
            for group in groups
            if any(slot.tensor.endswith("1.self_attn.v_proj.weight") for slot in group.producers)
        )
        assert any("the width of a single head" in freeze.reason for freeze in width.frozen)


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v2"])
def test_slots_are_all_there_is_to_cut(name: str) -> None:
    model, inputs = _convolutional(name, 48)
    assert_sliced(model, graph.trace(model, inputs).prunable, inputs)


@pytest.mark.sampled(1)
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
