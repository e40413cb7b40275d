"""Coupling groups of language models, family by family."""

from __future__ import annotations

import pytest

import graph
from graph import Role, UnitKind

from .families import CASES, GQA, MHA, MQA, Attention, build, token_inputs
from .masking import assert_sound

_MODULES = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}
_ATTENTION = {"gpt2": "attn"}
_NEURONS = {"opt": "neurons"}


def _expected_names(family: str) -> list[str]:
    layers = _MODULES.get(family, "model.layers")
    parts = (f"{_ATTENTION.get(family, 'self_attn')}.heads", _NEURONS.get(family, "mlp.neurons"))
    return [f"{layers}.{layer}.{part}" for layer in range(2) for part in parts]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("family", "attention", "implementation"), CASES, ids=str)
def test_each_block_has_heads_and_neurons(
    family: str, attention: Attention, implementation: str
) -> None:
    model = build(family, attention, implementation)
    dependencies = graph.trace(model, token_inputs())
    assert [group.name for group in dependencies.prunable] == _expected_names(family)
    kinds = [group.kind for group in dependencies.prunable]
    assert kinds == [UnitKind.HEADS, UnitKind.NEURONS] * 2
    for group in dependencies.prunable:
        assert_sound(model, group, token_inputs())


def _slots(group: graph.CouplingGroup, role: Role) -> dict[str, tuple[int, int, int]]:
    return {
        s.tensor.split("self_attn.")[-1]: (s.dim, s.outer, s.inner)
        for s in group.slots
        if s.role is role
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("attention", "units", "rows"), [(MHA, 4, 8), (GQA, 2, 16), (MQA, 4, 8)])
def test_units_of_heads(attention: Attention, units: int, rows: int, implementation: str) -> None:
    model = build("llama-bias", attention, implementation)
    group = graph.trace(model, token_inputs()).group("model.layers.0.self_attn.heads")
    assert group.units == units
    producers = {"q_proj.weight": (0, 1, rows)}
    if attention is not MQA:  # a single key head is shared by all, and belongs to none
        producers |= {"k_proj.weight": (0, 1, 8), "v_proj.weight": (0, 1, 8)}
    assert _slots(group, Role.PRODUCER) == producers
    assert _slots(group, Role.CONSUMER) == {"o_proj.weight": (1, 1, rows)}
    biases = {name.replace("weight", "bias"): place for name, place in producers.items()}
    assert _slots(group, Role.PASS_THROUGH) == biases


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_single_head_is_kept_whole(family: str, implementation: str) -> None:
    model = build(family, Attention(1, 1), implementation)
    for size in ((2, 7), (1, 7)):
        groups = graph.trace(model, token_inputs(*size)).groups
        assert [group.name for group in groups if group.prunable] == [
            name for name in _expected_names(family) if name.endswith("neurons")
        ]
        (width,) = (
            group
            for group in groups
            if any(slot.tensor.endswith("1.self_attn.v_proj.weight") for slot in group.producers)
        )
        assert any("the width of a single head" in freeze.reason for freeze in width.frozen)
