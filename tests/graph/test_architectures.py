"""Coupling groups of further architectures, transformers and convolutional networks."""

from __future__ import annotations

import pytest
import torch

import graph
from graph import Role
from tests.zoo import TRACED, transformers_case

from .masking import assert_sound

_WRITTEN_OUT = (
    *("llama", "llama-multi-query", "gemma2", "opt", "gpt2", "gptj", "falcon"),
    *("bert", "t5", "swin"),
)
CASES = [*((name, None) for name in TRACED), *((name, "eager") for name in _WRITTEN_OUT)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_transformers(name, attention):
    case = transformers_case(name, attention)
    model, inputs = case.build(), case.make_inputs()[0]
    groups = graph.trace(model, inputs).prunable
    assert {group.name: group.units for group in groups} == case.groups
    for group in groups:
        assert_sound(model, group, inputs)


def _slots(group, role):
    return {
        s.tensor.split("self_attn.")[-1]: (s.dim, s.outer, s.inner)
        for s in group.slots
        if s.role is role
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("keys", "units", "rows"), [(4, 4, 8), (2, 2, 16), (1, 4, 8)])
def test_units_of_heads(keys, units, rows, implementation):
    # A batch of two, beside two key heads: equal sizes must not be confused.
    heads = {"num_attention_heads": 4, "num_key_value_heads": keys, "head_dim": 8}
    sizes = {"num_hidden_layers": 1, "attention_bias": True}
    case = transformers_case("llama", implementation, **sizes, **heads)
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
def test_a_single_head_is_kept_whole(family, implementation):
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    model = transformers_case(family, implementation, num_hidden_layers=1, **heads).build()
    for size in ((2, 7), (1, 7)):
        groups = graph.trace(model, {"input_ids": torch.zeros(size).long()}).groups
        (neurons,) = (group.name for group in groups if group.prunable)
        assert neurons.endswith("neurons")
        (width,) = (
            group
            for group in groups
            if any(slot.tensor.endswith("0.self_attn.v_proj.weight") for slot in group.producers)
        )
        assert any("the width of a single head" in freeze.reason for freeze in width.frozen)
