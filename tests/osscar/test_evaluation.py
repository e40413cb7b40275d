"""Evaluation: perplexity by its definition, timing in turns, sizes counted by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from osscar.base import timing as timing_room
from osscar.base.errors import DataError, ModelError, NonFiniteError, OptionError
from osscar.data.text import encode, load_calibration, load_text
from osscar.evaluation import quality as evaluation
from osscar.evaluation import speed
from osscar.evaluation.evaluate import compare
from osscar.evaluation.quality import score
from osscar.evaluation.speed import measure_speed
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.modules import count_parameters
from osscar.network.operations import count_flops
from osscar.proof.equivalence import cache_name
from tests.osscar.families import framing_tokenizer

TEXT = "The import statement binds names. " * 12
VOCABULARY = 2048
WIDTH = 32
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_DIRECTORY)


@pytest.fixture
def model():
    return tiny_opt()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(timing_room, "WORTHWHILE_SECONDS", 0.0)


def measure_quality(model, tokenizer, text, batch_size=4, **options):
    return score([model], load_text([text], tokenizer, **options), batch_size=batch_size)[0]


def tiny_opt(ffn=64, **options):
    torch.manual_seed(0)
    own = {"word_embed_proj_dim": WIDTH, "ffn_dim": ffn, "init_std": 0.2}
    own |= {"max_position_embeddings": 64, **options}
    return OPTForCausalLM(OPTConfig(**SIZES, **own)).eval()


def tiny_llama():
    torch.manual_seed(0)
    own = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    own["max_position_embeddings"] = 64
    return LlamaForCausalLM(LlamaConfig(**SIZES, **own)).eval()


@torch.no_grad()
def direct_perplexity(model, tokens, seqlen):
    """Score token after token by the definition."""
    losses = []
    for start in range(0, len(tokens), seqlen):
        window = tokens[start : start + seqlen]
        for position in range(1, len(window)):
            logits = model(input_ids=window[None, :position]).logits[0, -1].double()
            losses.append(-logits.log_softmax(0)[window[position]].item())
    return pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4), len(losses)


# ---- perplexity --------------------------------------------------------------------------


def test_perplexity_is_what_it_says(model, tokenizer, monkeypatch):
    tokens = encode(tokenizer, TEXT)
    assert len(tokens) % 13 > 1  # a shorter window at the end
    found = measure_quality(model, tokenizer, TEXT, seqlen=13, batch_size=3)
    assert (found.perplexity, found.tokens) == direct_perplexity(model, tokens, 13)
    assert found.windows == math.ceil(len(tokens) / 13)
    assert (found.seqlen, found.special_tokens) == (13, 0)
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 5)
    pieces = measure_quality(model, tokenizer, TEXT, seqlen=13)
    assert pieces.perplexity == pytest.approx(found.perplexity, rel=1e-6)

    # Windows of calibration data are scored as they are.
    windows = load_calibration([TEXT], tokenizer, samples=3, seqlen=20, seed=0)
    (found,) = score([model], windows)
    expected = direct_perplexity(model, windows.tokens.flatten(), 20)
    assert (found.perplexity, found.tokens) == expected
    assert found.windows == 3


def test_how_a_text_is_cut(model, tokenizer):
    tokens = encode(tokenizer, TEXT)
    seqlen = next(n for n in range(8, 64) if len(tokens) % n == 1)
    found = measure_quality(model, tokenizer, TEXT, seqlen=seqlen)  # one token is left over
    assert (found.windows, found.tokens) == (len(tokens) // seqlen, found.windows * (seqlen - 1))
    limited = measure_quality(model, tokenizer, TEXT, seqlen=16, windows=2)
    assert (limited.perplexity, limited.tokens) == direct_perplexity(model, tokens[:32], 16)
    short = measure_quality(model, tokenizer, "import names")
    expected = direct_perplexity(model, encode(tokenizer, "import names"), 64)
    assert (short.perplexity, short.tokens) == expected
    assert measure_quality(model, tokenizer, TEXT).seqlen == 64


@torch.no_grad()
def test_windows_begin_as_the_tokenizer_says(model):
    framing, losses = framing_tokenizer(), []
    for cut in encode(framing, TEXT).split(15):
        window = torch.tensor([framing.bos_token_id, *cut])
        found = model(input_ids=window[None]).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(found, window[1:], reduction="none"))
    expected = torch.cat(losses)
    found = measure_quality(model, framing, TEXT, seqlen=16)
    assert found.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    assert (found.tokens, found.special_tokens) == (len(encode(framing, TEXT)), 1)


def test_what_cannot_be_scored_is_refused(model, tokenizer):
    for options, message in (
        ({"seqlen": 65}, "window of 65 tokens.*from 2, .* to 64"),
        ({"batch_size": 0}, "batch_size, `--batch-size`. is 0"),
    ):
        with pytest.raises(OptionError, match=message):
            measure_quality(model, tokenizer, TEXT, **options)
    with pytest.raises(DataError, match="has 1 token; scoring needs at least 2"):
        load_text(["a"], tokenizer)
    both_ways = BertForMaskedLM(BertConfig(**SIZES, intermediate_size=16)).train()
    for wrong, message in (
        (both_ways, "bidirectional BertForMaskedLM"),
        (nn.Linear(2, 2), "Linear is no language model of transformers"),
    ):
        with pytest.raises(ModelError, match=message):
            measure_quality(wrong, tokenizer, TEXT)
    assert both_ways.training


def test_non_finite_logits_name_the_window(model, tokenizer):
    """The embedding of one token is damaged, which occurs late in the text."""
    text = TEXT + "zebra crossing"
    usual, tokens = set(encode(tokenizer, TEXT).tolist()), encode(tokenizer, text).tolist()
    place = next(n for n, token in enumerate(tokens) if token not in usual)
    assert place % 16 < 15  # at the end of a window it would not be read
    weight = model.get_input_embeddings().weight.detach().clone()
    weight[tokens[place]] = torch.nan
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight))  # the output stays whole
    with pytest.raises(NonFiniteError, match=f"window {place // 16};"):
        measure_quality(model, tokenizer, text, seqlen=16)


# ---- size --------------------------------------------------------------------------------


def test_flops_by_hand():
    tokens, ffn = 20, 64
    window = {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
    pairs = 2 * tokens * WIDTH  # each query with each key, and each weight with each value
    of_opt = 4 * WIDTH * WIDTH + 2 * WIDTH * ffn
    for model, layer in (
        (tiny_opt(ffn), of_opt),
        (tiny_opt(ffn, attn_implementation="eager"), of_opt),
        (tiny_llama(), 2 * WIDTH * WIDTH + 2 * WIDTH * 16 + 3 * WIDTH * 48),  # grouped queries
        (GPT2LMHeadModel(config).eval(), 12 * WIDTH * WIDTH),  # Conv1D
    ):
        expected = 2 * tokens * (2 * (layer + pairs) + WIDTH * VOCABULARY)
        assert count_flops(model, window) == expected


# ---- speed -------------------------------------------------------------------------------


def test_medians_are_taken_without_the_warm_up(model, monkeypatch):
    now = [0.0]
    seconds = {
        40: iter([9.0, 0.5, 2.0, 0.25]),
        38: iter([7.0] * 4),
        1: iter([9.0, 9, 1, 5, 2, 2, 3, 8]),
    }

    def forward(input_ids, **_):
        now[0] += next(seconds[input_ids.shape[1]])
        return SimpleNamespace(logits=torch.zeros(1, 1, 3), past_key_values=())

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(speed, "clock", lambda: now[0])
    (found,) = measure_speed([model], torch.arange(40), new_tokens=2, repetitions=3)
    assert found.prefill_tokens_per_second == 40 / 0.5
    assert found.decode_tokens_per_second == 2 / 6.0


@pytest.mark.parametrize("build", [tiny_opt, tiny_llama])
def test_what_the_model_is_asked_to_do(build):
    model = build()
    shapes = []

    def note(_, __, keywords, output):
        cache = getattr(output, cache_name(model))
        shapes.append((keywords["input_ids"].shape[1], cache.get_seq_length()))

    model.register_forward_hook(note, with_kwargs=True)
    (found,) = measure_speed([model], torch.arange(40), new_tokens=3, repetitions=1)
    prefill, decode = [(40, 40)], [(37, 37), (1, 38), (1, 39), (1, 40)]
    assert shapes == 2 * prefill + 2 * decode  # each after a warm-up
    assert (found.prompt_tokens, found.new_tokens, found.repetitions) == (40, 3, 1)
    (found,) = measure_speed([model], torch.arange(6), new_tokens=32, repetitions=1)
    assert found.new_tokens == 3  # half of a short prompt


# ---- together ----------------------------------------------------------------------------


def test_a_comparison_divides_by_the_dense_model(tokenizer, tmp_path):
    small, dense, text = tiny_opt(32), tiny_opt(64), load_text([TEXT], tokenizer)
    dense.train()
    small.save_pretrained(tmp_path)
    options = {"repetitions": 1, "new_tokens": 2}
    found = compare(small, dense, text, path=tmp_path, **options)
    assert found.model.quality == measure_quality(small, tokenizer, TEXT)
    assert found.dense.quality == measure_quality(dense, tokenizer, TEXT)
    ratios, mine, other = found.ratios, found.model, found.dense
    assert ratios["perplexity"] == mine.quality.perplexity / other.quality.perplexity
    assert ratios["parameters"] == count_parameters(small) / count_parameters(dense) < 1
    window = {"input_ids": torch.zeros(1, 64, dtype=torch.long)}
    assert mine.footprint.flops == count_flops(small, window) / 64 < other.footprint.flops
    assert json.loads(json.dumps(dataclasses.asdict(mine), allow_nan=False))["dtype"] == "float32"
    assert ratios["decode_tokens_per_second"] == (
        mine.speed.decode_tokens_per_second / other.speed.decode_tokens_per_second
    )
    assert ratios["disk_bytes"] is None
    assert set(ratios) < set(mine.numbers())
    assert dense.training


def test_dropout_is_off_the_mode_restored_and_bfloat16_close(tokenizer):
    model = tiny_opt(dropout=0.5)
    expected = measure_quality(model, tokenizer, TEXT)
    model.train()
    assert measure_quality(model, tokenizer, TEXT) == expected
    assert model.training
    rounded = measure_quality(model.bfloat16(), tokenizer, TEXT).perplexity
    assert rounded != expected.perplexity
    assert rounded == pytest.approx(expected.perplexity, rel=0.05)
