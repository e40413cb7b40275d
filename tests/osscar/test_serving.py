"""A budget of memory: weights, and the keys and values that transformers really keeps."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import osscar
from osscar.allocation.allocate import allocate
from osscar.base.errors import RequestError
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest as Asked
from tests.osscar.families import VOCABULARY, gated, tiny, tokens
from tests.osscar.networks import images, small_net

PROMPT, NEW, BATCH = 20, 5, 3
CONTEXT = PROMPT + NEW - 1
"""Positions that are kept once the last token is made, which itself is not read."""


def windowed(family="mistral"):
    """A model of which all layers keep eight positions less one, or every second one does."""
    torch.manual_seed(0)
    if family == "mistral":
        model = tiny("mistral")
        model.config.sliding_window = 8
        return AutoModelForCausalLM.from_config(model.config).eval()
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, sliding_window=8,
        max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    **{name: lambda name=name: tiny(name) for name in ("opt", "gpt2", "llama-mha", "llama-gqa")},
    "llama-mqa": lambda: tiny("llama-mqa"),
    "mistral, windows": windowed,
    "gemma2, windows in one layer": lambda: windowed("gemma2"),
    "deepseek, keys wider than values": lambda: AutoModelForCausalLM.from_config(gated()).eval(),
}


STAY = ("llama-mqa", "deepseek, keys wider than values")
"""Of whose heads none can leave, or none does."""


def kept_bytes(model):
    """Return the bytes of the cache once a model has generated, as transformers holds it."""
    cache = DynamicCache(config=model.config)
    model.generate(
        tokens(BATCH, PROMPT), past_key_values=cache, min_new_tokens=NEW, max_new_tokens=NEW,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))


def weight_bytes(model):
    """Return the bytes of what is saved of a model, each tensor once."""
    return sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())


@pytest.mark.parametrize("name", MODELS)
def test_what_serving_takes_is_what_transformers_holds(name):
    model = MODELS[name]()
    asked = {"context": CONTEXT, "batch": BATCH, "allocation": "uniform", "backend": "magnitude"}
    result = osscar.prune(model, tokens(8, 24), memory=0.8, **asked)
    (limit,) = result.budget.limits
    assert limit.dense == kept_bytes(model) + weight_bytes(model)
    assert limit.reached == kept_bytes(result.model) + weight_bytes(result.model)
    assert 0.6 * limit.dense < limit.reached <= limit.limit == pytest.approx(0.8 * limit.dense)
    assert (kept_bytes(result.model) < kept_bytes(model)) == (name not in STAY)
    assert "float32" in limit.assumed
    assert ("of 2 layers 7" in limit.assumed) == ("windows" in name)


def test_keys_and_values_are_counted_in_the_format_that_is_served():
    asked = Asked(memory=0.8, context=CONTEXT, batch=BATCH, allocation="uniform")
    with prepare(tiny("llama-gqa").bfloat16(), tokens(8, 24)) as prepared:
        limit = allocate(prepared, asked).budget.tightest
    assert limit.dense == (kept_bytes(tiny("llama-gqa")) + weight_bytes(tiny("llama-gqa"))) / 2
    assert "bfloat16" in limit.assumed


def test_memory_takes_heads_where_sequences_are_long_and_goes_with_other_budgets():
    def kept(**asked):
        with prepare(tiny("llama-mha"), tokens(8, 24)) as prepared:
            budget = allocate(prepared, Asked(**asked)).budget
        for one in budget.limits:
            assert one.reached <= one.limit
        return {
            kind: sum(w.kept for w in budget.widths.values() if w.kind == kind)
            for kind in ("heads", "neurons")
        }

    short, long = (kept(memory=0.8, context=64, batch=batch) for batch in (1, 500))
    assert long["heads"] < short["heads"]
    assert long["neurons"] > short["neurons"]
    both = kept(memory=0.8, context=64, batch=500, params=0.8)
    assert both["heads"] <= long["heads"]
    assert both["neurons"] < long["neurons"]


def refused_models():
    """What keeps no keys and values, or something else besides."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 32, "d_kv": 4, "num_heads": 4}
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    encoders = T5ForConditionalGeneration(T5Config(**sizes, num_layers=1)).eval()
    return [
        (small_net(), images(8), "keeps none; give size="),
        (encoders, {"input_ids": tokens(), "decoder_input_ids": tokens()}, "keeps none; give size"),
        (MambaForCausalLM(mamba).eval(), tokens(), "give size"),
    ]


@pytest.mark.parametrize("case", range(3))
def test_a_model_that_keeps_no_keys_and_values_is_told_to_ask_for_a_size(case):
    model, data, message = refused_models()[case]
    with pytest.raises(RequestError, match=message):
        osscar.prune(model, data, memory=0.8, context=16, allocation="uniform")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"memory": "1GB"}, "memory is 1GB, .* context= does not say of how many"),
        ({"memory": "1GB", "context": 0}, "context is 0; "),
        ({"memory": "1GB", "context": 8, "batch": 0}, "batch is 0; "),
        ({"memory": "nothing", "context": 8}, "memory is 'nothing'; give a fraction"),
        ({"params": 0.8, "context": 8}, "say what memory= counts, which is not given"),
        ({"params": 0.8, "batch": 8}, "say what memory= counts, which is not given"),
        ({"memory": 0.8, "context": 8, "form": "exported"}, "'exported' cannot; give size"),
        ({"memory": 0.8, "context": 65}, "context= is 65, and the model reads 64 positions at"),
        ({"memory": 0.01, "context": 64}, "memory=0.01 cannot be met: .* serving bytes"),
        ({"memory": "1GB", "context": 64}, "memory=1GB asks for no less than there is"),
    ],
)
def test_memory_that_makes_no_sense_is_refused(asked, message):
    with pytest.raises(osscar.OsscarError, match=message):
        osscar.prune(tiny("llama-gqa"), tokens(8, 24), allocation="uniform", **asked)
