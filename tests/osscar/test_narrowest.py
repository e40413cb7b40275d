"""Budgets so small that a search wants one unit of attention, from start to a checkpoint."""

import pytest
import torch

import graph
import osscar
from graph import UnitKind
from tests.zoo import transformers_case

_LIKE_LLAMA = (
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi3"),
    *("cohere", "cohere2", "glm", "glm4", "granite", "helium", "nemotron", "smollm3"),
    *("stablelm", "starcoder2", "exaone4", "seed_oss", "nanochat", "gpt_oss"),
    *("mixtral", "qwen3_moe"),
)
GROUPED = {
    **{family: {"num_key_value_heads": 2} for family in _LIKE_LLAMA},
    # Mixtral divides weights of its routing in place, so that no view there counts as the identity.
    **{
        f"{family} of one": {"num_key_value_heads": 1}
        for family in _LIKE_LLAMA
        if family != "mixtral"
    },
    **{"falcon": {}, "falcon-grouped": {}, "gpt_bigcode": {}},
}
"""Attention of which several query heads share keys and values, two pairs of them, or all one."""


_EAGER_ALONE = ("gemma2", "gpt_oss")
CASES = [
    (name, attention)
    for name in GROUPED
    for attention in ("sdpa", "eager")
    if attention == "eager" or name.partition(" ")[0] not in _EAGER_ALONE
]


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_budget_brings_attention_down_to_one_unit(name, attention, tmp_path):
    model = transformers_case(name.partition(" ")[0], attention, **GROUPED[name]).build()
    ids = torch.randint(3, 90, (16, 8), generator=torch.Generator().manual_seed(0))
    groups = [g for g in graph.trace(model, {"input_ids": ids[:2]}).groups if g.prunable]
    heads = {g.name: g.units for g in groups if g.kind is UnitKind.HEADS and g.units > 1}
    assert heads
    others = [g.name for g in groups if g.name not in heads]
    share = 1 - 1 / min(heads.values()) - 0.01
    result = osscar.prune(model, ids, sparsity=share, skip=others, device="cpu")
    assert not {group.name for group in result.skipped} & heads.keys()
    assert {layer.kept for layer in result.layers} == {1}
    assert result.certificate.structure is not None
    result.save(tmp_path / "small")
    with torch.no_grad():
        due, found = (
            one(ids[:2]).logits for one in (result.model, osscar.load(tmp_path / "small"))
        )
    torch.testing.assert_close(found, due)
