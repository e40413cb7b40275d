"""A budget of memory: weights, and the keys and values that transformers really keeps."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
)

from osscar.allocation.allocate import allocate
from osscar.allocation.task import PruningTask
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest as Asked
from osscar.run.prune import prune_as_asked
from tests.osscar.families import gated, tiny, tokens
from tests.zoo import transformers_case

PROMPT, NEW, BATCH = 20, 5, 3
CONTEXT = PROMPT + NEW - 1
"""Positions that are kept once the last token is made, which itself is not read."""

MODELS = {
    "llama-gqa": lambda: tiny("llama-gqa"),
    "llama-mqa": lambda: tiny("llama-mqa"),
    "gemma2, windows": lambda: transformers_case("gemma2", sliding_window=8).build(),
    "deepseek": lambda: AutoModelForCausalLM.from_config(gated()).eval(),
}
"""Groups of heads; one head for all; windows in one of two layers; keys wider than values."""


def kept_bytes(model):
    """Return the bytes of the cache once a model has generated, as transformers holds it."""
    cache = DynamicCache(config=model.config)
    model.generate(
        tokens(BATCH, PROMPT) % model.config.vocab_size, past_key_values=cache,
        min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))


def weight_bytes(model):
    """Return the bytes of what is saved of a model, each tensor once."""
    return sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", MODELS)
def test_what_serving_takes_is_what_transformers_holds(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    data = tokens(8, 24) % model.config.vocab_size
    asked = Asked(memory=0.8, context=CONTEXT, batch=BATCH, allocation="uniform", backend="wanda")
    with prepare(model, data) as prepared:
        limit = allocate(PruningTask(prepared, asked)).budget.limits[0]
    assert limit.dense == kept_bytes(model) + weight_bytes(model)
    assert limit.limit == pytest.approx(0.8 * limit.dense)
    assert "float32" in limit.assumed
    assert ("of 2 layers 7" in limit.assumed) == ("windows" in name)
    if name in ("llama-gqa", "gemma2, windows"):  # as others have it when they have lost units
        smaller = prune_as_asked(model, data, asked).model
        assert limit.reached == kept_bytes(smaller) + weight_bytes(smaller)
        assert 0.6 * limit.dense < limit.reached <= limit.limit
        assert (kept_bytes(smaller) < kept_bytes(model)) == (name == "llama-gqa")


def test_keys_and_values_are_counted_in_the_format_that_is_served():
    asked = Asked(memory=0.8, context=CONTEXT, batch=BATCH, allocation="uniform")
    with prepare(tiny("llama-gqa").bfloat16(), tokens(8, 24)) as prepared:
        limit = allocate(PruningTask(prepared, asked)).budget.limits[0]
    assert limit.dense == (kept_bytes(tiny("llama-gqa")) + weight_bytes(tiny("llama-gqa"))) / 2
    assert "bfloat16" in limit.assumed


def test_memory_takes_heads_where_sequences_are_long_and_goes_with_other_budgets():
    def kept(**asked):
        with prepare(tiny("llama-mha"), tokens(8, 24)) as prepared:
            budget = allocate(PruningTask(prepared, Asked(**asked, round_to=1))).budget
        for one in budget.limits:
            assert one.reached <= one.limit
        widths = budget.widths.values()
        return {
            kind: sum(width.kept for width in widths if width.kind == kind)
            for kind in ("heads", "neurons")
        }

    short, long = (kept(memory=0.8, context=64, batch=batch) for batch in (1, 500))
    assert long["heads"] < short["heads"]
    assert long["neurons"] > short["neurons"]
    both = kept(memory=0.8, context=64, batch=500, params=0.8)
    assert both["heads"] <= long["heads"]
    assert both["neurons"] < long["neurons"]
