"""Evaluation: perplexity by its definition, timing in turns, sizes counted by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing
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
from osscar.base.errors import ModelError, NonFiniteError, OptionError, TextError
from osscar.data.prose import Part, builtin_text
from osscar.data.text import encode
from osscar.data.tokens import load_calibration
from osscar.evaluation import language as evaluation
from osscar.evaluation import speed
from osscar.evaluation.forward import measure_forward
from osscar.evaluation.language import compare, evaluate, measure_quality
from osscar.evaluation.size import count_disk_bytes, count_flops, count_parameter_bytes
from osscar.evaluation.speed import measure_speed
from osscar.models.language import DEMO_DIRECTORY, load_model
from osscar.network.modules import count_parameters
from tests.osscar.families import framing_tokenizer

TEXT = "The import statement binds names. " * 12
VOCABULARY = 2048
WIDTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_DIRECTORY)


@pytest.fixture
def model():
    return tiny_opt()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(timing_room, "WORTHWHILE_SECONDS", 0.0)


def tiny_opt(ffn: int = 64, **options):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=ffn,
        max_position_embeddings=64,
        init_std=0.2,
        **options,
    )
    return OPTForCausalLM(config).eval()


def tiny_llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def two_tokens_first():
    """A tokenizer that puts two tokens before each text."""
    tokenizer = framing_tokenizer()
    ends = [("<s>", 0), ("</s>", 2)]
    frame = TemplateProcessing(single="<s> </s> $A", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = frame
    return tokenizer


@torch.no_grad()
def direct_perplexity(model, tokens, seqlen):
    """Score token after token by the definition."""
    losses = []
    for start in range(0, len(tokens), seqlen):
        window = tokens[start : start + seqlen]
        for position in range(1, len(window)):
            logits = model(input_ids=window[None, :position]).logits[0, -1].double()
            losses.append(-logits.log_softmax(0)[window[position]].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


class TestQuality:
    @pytest.mark.parametrize("seqlen", [13, 20])
    def test_perplexity_is_what_it_says(self, model, tokenizer, seqlen):
        tokens = encode(tokenizer, TEXT)
        assert len(tokens) % seqlen > 1  # a shorter window at the end
        expected, count = direct_perplexity(model, tokens, seqlen)
        found = measure_quality(model, tokenizer, TEXT, seqlen=seqlen, batch_size=3)
        assert found.perplexity == pytest.approx(expected, rel=1e-4)
        assert found.tokens == count
        assert found.windows == math.ceil(len(tokens) / seqlen)
        assert found.seqlen == seqlen

    def test_a_single_token_at_the_end_is_not_scored(self, model, tokenizer):
        tokens = encode(tokenizer, TEXT)
        seqlen = next(n for n in range(8, 64) if len(tokens) % n == 1)
        found = measure_quality(model, tokenizer, TEXT, seqlen=seqlen)
        assert found.windows == len(tokens) // seqlen
        assert found.tokens == found.windows * (seqlen - 1)

    @torch.no_grad()
    def test_windows_begin_as_the_tokenizer_says(self, model):
        framing, losses = framing_tokenizer(), []
        for cut in encode(framing, TEXT).split(15):
            window = torch.tensor([framing.bos_token_id, *cut])
            found = model(input_ids=window[None]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(found, window[1:], reduction="none"))
        expected = torch.cat(losses)
        found = measure_quality(model, framing, TEXT, seqlen=16)
        assert found.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-4)
        assert (found.tokens, found.special_tokens) == (len(expected), 1)
        assert found.tokens == len(encode(framing, TEXT))
        with pytest.raises(OptionError, match="room for none of the text"):
            measure_quality(model, two_tokens_first(), TEXT, seqlen=2)

    def test_windows_limit_the_text(self, model, tokenizer):
        expected, count = direct_perplexity(model, encode(tokenizer, TEXT)[:32], 16)
        found = measure_quality(model, tokenizer, TEXT, seqlen=16, windows=2)
        assert found.perplexity == pytest.approx(expected, rel=1e-4)
        assert (found.windows, found.tokens) == (2, count)
        everything = measure_quality(model, tokenizer, TEXT, seqlen=16, windows=10_000)
        assert everything == measure_quality(model, tokenizer, TEXT, seqlen=16)

    def test_a_text_shorter_than_a_window(self, model, tokenizer):
        found = measure_quality(model, tokenizer, "import names", seqlen=64)
        expected, count = direct_perplexity(model, encode(tokenizer, "import names"), 64)
        assert found.perplexity == pytest.approx(expected, rel=1e-4)
        assert (found.windows, found.tokens) == (1, count)

    def test_positions_at_once_do_not_matter(self, model, tokenizer, monkeypatch):
        whole = measure_quality(model, tokenizer, TEXT, seqlen=32)
        monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 5)
        pieces = measure_quality(model, tokenizer, TEXT, seqlen=32)
        assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)

    def test_bfloat16_is_close(self, model, tokenizer):
        exact = measure_quality(model, tokenizer, TEXT).perplexity
        rounded = measure_quality(model.bfloat16(), tokenizer, TEXT).perplexity
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.05)

    def test_dropout_is_off_and_the_mode_restored(self, tokenizer):
        model = tiny_opt(dropout=0.5)
        expected = measure_quality(model, tokenizer, TEXT)
        model.train()
        assert measure_quality(model, tokenizer, TEXT) == expected
        assert model.training

    def test_default_window_fits_the_model(self, model, tokenizer):
        assert measure_quality(model, tokenizer, TEXT).seqlen == 64
        assert measure_quality(load_model("demo").model, tokenizer, words(600)).seqlen == 512

    def test_the_demo_model_knows_what_a_unigram_model_does_not(self, tokenizer):
        """Held-out perplexity, a few windows; unigram frequencies are those of training text."""
        held_out = builtin_text(Part.HELD_OUT)
        found = measure_quality(load_model("demo").model, tokenizer, held_out, windows=6)
        counts = torch.bincount(
            encode(tokenizer, builtin_text(Part.TRAINING)), minlength=VOCABULARY
        )
        frequencies = (counts + 1).double() / (counts + 1).sum()
        scored = encode(tokenizer, held_out)[: 6 * 512].view(6, 512)[:, 1:]
        unigram = math.exp(-frequencies[scored].log().mean().item())
        assert unigram > 5 * found.perplexity


class TestRefusals:
    def test_a_model_that_reads_ahead(self, tokenizer):
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64,
        )  # fmt: skip
        model = BertForMaskedLM(config).train()
        with pytest.raises(ModelError, match="BertForMaskedLM that reads in both directions"):
            measure_quality(model, tokenizer, TEXT)
        assert model.training

    @pytest.mark.parametrize("seqlen", [-1, 0, 1, 65])
    def test_window_length(self, model, tokenizer, seqlen):
        with pytest.raises(OptionError, match=f"window of {seqlen} tokens.*from 2 to 64"):
            measure_quality(model, tokenizer, TEXT, seqlen=seqlen)

    @pytest.mark.parametrize("windows", [0, -3])
    def test_windows(self, model, tokenizer, windows):
        with pytest.raises(OptionError, match=f"--windows. must be at least 1, not {windows}"):
            measure_quality(model, tokenizer, TEXT, windows=windows)

    def test_batch_size(self, model, tokenizer):
        with pytest.raises(OptionError, match=r"--batch-size. must be at least 1, not 0"):
            measure_quality(model, tokenizer, TEXT, batch_size=0)

    @pytest.mark.parametrize("text", ["", "a"])
    def test_text_too_short(self, model, tokenizer, text):
        with pytest.raises(TextError, match=f"has {len(text)} tokens?;.*at least 2"):
            measure_quality(model, tokenizer, text)

    def test_foreign_tokenizer(self, tokenizer):
        model = tiny_opt()
        model.resize_token_embeddings(100)
        with pytest.raises(ModelError, match="knows only 100"):
            measure_quality(model, tokenizer, TEXT)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_logits_name_the_window(self, model, tokenizer, value):
        """The embedding of one token is damaged, which occurs late in the text."""
        text = TEXT + "zebra crossing"
        usual, tokens = set(encode(tokenizer, TEXT).tolist()), encode(tokenizer, text).tolist()
        place = next(n for n, token in enumerate(tokens) if token not in usual)
        assert place % 16 < 15  # at the end of a window it would not be read
        weight = model.get_input_embeddings().weight.detach().clone()
        weight[tokens[place]] = value
        model.set_input_embeddings(nn.Embedding.from_pretrained(weight))  # the output stays whole
        with pytest.raises(NonFiniteError, match=f"window {place // 16},"):
            measure_quality(model, tokenizer, text, seqlen=16)

    def test_perplexity_beyond_numbers(self, model, tokenizer):
        with torch.no_grad():
            model.model.decoder.final_layer_norm.weight.mul_(1e6)
        with pytest.raises(NonFiniteError, match="overflows"):
            measure_quality(model, tokenizer, TEXT)


class TestFootprint:
    def test_tied_parameters_count_once(self, model):
        untied = tiny_opt(tie_word_embeddings=False)
        assert count_parameters(untied) - count_parameters(model) == VOCABULARY * WIDTH
        assert count_parameter_bytes(model) == 4 * count_parameters(model)
        assert count_parameter_bytes(model.bfloat16()) == 2 * count_parameters(model)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_flops_of_opt_by_hand(self, attention):
        tokens, ffn = 20, 64
        model = tiny_opt(ffn, attn_implementation=attention)
        layer = 4 * WIDTH * WIDTH + 2 * WIDTH * ffn + 2 * tokens * WIDTH
        expected = 2 * tokens * (2 * layer + WIDTH * VOCABULARY)
        assert count_flops(model, torch.zeros(1, tokens, dtype=torch.long)) == expected

    def test_flops_of_grouped_queries_by_hand(self):
        tokens = 20
        layer = 2 * WIDTH * WIDTH + 2 * WIDTH * 16 + 3 * WIDTH * 48 + 2 * tokens * WIDTH
        expected = 2 * tokens * (2 * layer + WIDTH * VOCABULARY)
        assert count_flops(tiny_llama(), torch.zeros(1, tokens, dtype=torch.long)) == expected

    def test_flops_of_conv1d_by_hand(self):
        tokens = 20
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64
        )
        layer = 12 * WIDTH * WIDTH + 2 * tokens * WIDTH
        expected = 2 * tokens * (2 * layer + WIDTH * VOCABULARY)
        model = GPT2LMHeadModel(config).eval()
        assert count_flops(model, torch.zeros(1, tokens, dtype=torch.long)) == expected

    def test_flops_follow_removed_neurons(self):
        window = torch.zeros(1, 20, dtype=torch.long)
        saved = count_flops(tiny_opt(64), window) - count_flops(tiny_opt(40), window)
        assert saved == 2 * 20 * 2 * (2 * WIDTH * 24)

    def test_disk(self, tmp_path):
        assert count_disk_bytes(None) is None
        assert count_disk_bytes(tmp_path) is None
        (tmp_path / "a.safetensors").write_bytes(b"12345")
        (tmp_path / "b.safetensors").write_bytes(b"123")
        (tmp_path / "config.json").write_bytes(b"1")
        assert count_disk_bytes(tmp_path) == count_disk_bytes(str(tmp_path)) == 8
        with pytest.raises(OptionError, match=r"the model's directory is 3 \(int\)"):
            count_disk_bytes(3)

    def test_peak_memory_sees_an_allocation(self):
        """In a process of its own, whose memory no other test has grown or given back."""
        code = (
            "import torch; from osscar.evaluation.size import read_peak_memory, reset_peak_memory;"
            "cpu = torch.device('cpu'); reset_peak_memory(cpu); before = read_peak_memory(cpu);"
            "block = torch.ones(400_000_000, dtype=torch.uint8);"
            "print(before, read_peak_memory(cpu), block.nbytes)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        before, after, size = run.stdout.split()
        if before == "None":
            pytest.skip("this system does not tell")
        assert int(after) >= int(before) + 0.3 * int(size)


class TestSpeed:
    def test_models_take_turns_in_alternating_order(self):
        calls = []

        def timing(name, seconds):
            def run():
                calls.append(name)
                return [seconds]

            return run

        found = timing_room.interleaved([timing("a", 1.0), timing("b", 2.0)], 3, "x")
        assert calls == ["a", "b", *"abbaab"]
        assert found == [[1.0] * 3, [2.0] * 3]

    def test_fast_models_are_timed_more_often(self, monkeypatch):
        monkeypatch.setattr(timing_room, "WORTHWHILE_SECONDS", 0.05)
        found = timing_room.interleaved([lambda: [0.0]], 2, "x")
        assert len(found[0]) > 10

    def test_medians_are_taken_without_the_warm_up(self, model, monkeypatch):
        seconds = {
            "time_prefill": iter([[9.0], [0.5], [2.0], [0.25]]),
            "time_decode": iter([[9.0, 9.0], [0.1, 5.0], [0.2, 0.2], [0.3, 0.1]]),
        }
        for name, values in seconds.items():
            monkeypatch.setattr(speed._Run, name, lambda _, values=values: next(values))
        (found,) = measure_speed([model], torch.arange(40), repetitions=3)
        assert found.prefill_tokens_per_second == 40 / 0.5
        assert found.decode_tokens_per_second == 1 / 0.2

    @pytest.mark.parametrize("build", [tiny_opt, tiny_llama])
    def test_what_the_model_is_asked_to_do(self, build):
        model = build()
        shapes = []

        def note(_, __, keywords, output):
            cache = next(c for c in (getattr(output, n, None) for n in speed.CACHE_NAMES) if c)
            shapes.append((keywords["input_ids"].shape[1], cache.get_seq_length()))

        model.register_forward_hook(note, with_kwargs=True)
        (found,) = measure_speed([model], torch.arange(40), new_tokens=3, repetitions=1)
        prefill, decode = [(40, 40)], [(37, 37), (1, 38), (1, 39), (1, 40)]
        assert shapes == 2 * prefill + 2 * decode  # each after a warm-up
        assert (found.prompt_tokens, found.new_tokens, found.repetitions) == (40, 3, 1)
        assert found.prefill_tokens_per_second > 0
        assert found.decode_tokens_per_second > 0

    def test_layers_with_different_heads_can_be_timed(self):
        model = without_first_group(tiny_llama())
        (found,) = measure_speed([model], torch.arange(40), new_tokens=4, repetitions=1)
        assert found.decode_tokens_per_second > 0

    def test_a_short_prompt_decodes_less(self, model):
        (found,) = measure_speed([model], torch.arange(6), new_tokens=32, repetitions=1)
        assert found.new_tokens == 3

    @pytest.mark.parametrize(("tokens", "new", "times"), [(1, 4, 1), (9, 0, 1), (9, 4, 0)])
    def test_nothing_to_time(self, model, tokens, new, times):
        with pytest.raises(OptionError, match=f"not {tokens}, {new} and {times}"):
            measure_speed([model], torch.arange(tokens), new_tokens=new, repetitions=times)

    def test_a_model_without_a_cache(self, model):
        model.register_forward_hook(lambda _, __, output: type(output)(logits=output.logits))
        with pytest.raises(ModelError, match="OPTForCausalLM has no key-value cache"):
            measure_speed([model], torch.arange(9), repetitions=1)


class TestTogether:
    def test_an_evaluation_is_json(self, tokenizer):
        loaded = load_model("demo", device="cpu")
        found = evaluate(
            loaded.model, tokenizer, words(600), windows=1, repetitions=1, path=loaded.path
        )
        plain = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
        assert plain["footprint"]["parameters"] == count_parameters(loaded.model)
        assert plain["footprint"]["disk_bytes"] == count_disk_bytes(DEMO_DIRECTORY)
        assert plain["footprint"]["peak_memory_bytes"] > plain["footprint"]["parameter_bytes"]
        assert plain["quality"]["tokens"] == 511
        assert (plain["device"], plain["dtype"]) == ("cpu", "float32")
        flops = count_flops(loaded.model, torch.zeros(1, 512, dtype=torch.long)) / 512
        assert plain["footprint"]["flops"] == flops

    def test_a_comparison_divides_by_the_dense_model(self, tokenizer, tmp_path):
        small, dense = tiny_opt(32), tiny_opt(64)
        dense.train()
        small.save_pretrained(tmp_path)
        found = compare(small, dense, tokenizer, TEXT, repetitions=1, new_tokens=2, path=tmp_path)
        quality = measure_quality(small, tokenizer, TEXT)
        assert found.model.quality == quality
        assert found.dense.quality == measure_quality(dense, tokenizer, TEXT)
        ratios, mine, other = found.ratios, found.model, found.dense
        assert ratios["perplexity"] == mine.quality.perplexity / other.quality.perplexity
        assert ratios["parameters"] == count_parameters(small) / count_parameters(dense) < 1
        assert ratios["flops"] < 1
        assert ratios["decode_tokens_per_second"] == (
            mine.speed.decode_tokens_per_second / other.speed.decode_tokens_per_second
        )
        assert ratios["disk_bytes"] is None
        assert set(ratios) < set(mine.numbers())
        assert found.model.footprint.disk_bytes == count_disk_bytes(tmp_path)
        assert dense.training
        both = compare(
            small,
            dense,
            tokenizer,
            TEXT,
            repetitions=1,
            new_tokens=2,
            path=tmp_path,
            dense_path=DEMO_DIRECTORY,
        )
        assert both.ratios["disk_bytes"] == count_disk_bytes(tmp_path) / count_disk_bytes(
            DEMO_DIRECTORY
        )

    def test_both_are_scored_on_windows_that_fit_both(self, tokenizer):
        short = tiny_opt()
        found = compare(load_model("demo").model, short, tokenizer, TEXT, repetitions=1)
        assert found.model.quality.seqlen == found.dense.quality.seqlen == 64


def test_calibration_text_is_not_scored(tokenizer):
    windows = load_calibration(None, tokenizer, samples=4, seqlen=64)
    held_out = builtin_text(Part.HELD_OUT)
    assert not any(tokenizer.decode(window[8:-8]) in held_out for window in windows.tokens)


def words(count: int) -> str:
    return " ".join(str(number) for number in range(count))


def without_first_group(model):
    """Remove a key-value group with its two query heads from the first layer of `tiny_llama`."""
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            linear = getattr(attention, name)
            linear.weight = nn.Parameter(linear.weight[rows:].clone())
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, 16:].clone())
    return model


@pytest.mark.parametrize("batch", [{}, {"xs": [torch.ones(2, 3), torch.ones(2, 3)]}])
def test_a_forward_pass_is_measured_of_any_inputs(batch):
    class Summed(torch.nn.Linear):
        def forward(self, xs=()):
            return super().forward(sum(xs, start=torch.ones(2, 3)))

    (found,) = measure_forward([Summed(3, 3)], batch)
    assert found.flops == 36
