"""Calibration: windows are reproducible, parts are disjoint, and bad text is refused by name."""

import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import osscar
from osscar.base.errors import DataError
from osscar.data.text import encode, load_calibration, read_text, special_tokens
from osscar.models.names import DEMO_DIRECTORY
from osscar.proof.lineage import note
from tests.osscar.families import CALIBRATION, HELD_OUT, framing_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_DIRECTORY)


def words(count):
    """Give text of which every window is unique."""
    return " ".join(str(number) for number in range(count))


# ---- windows -----------------------------------------------------------------------------


def test_windows_are_cut_from_the_text_in_order_and_apart_by_the_seed(tokenizer):
    text, asked = words(400), {"seqlen": 40}
    tokens = encode(tokenizer, text)
    asked["samples"], windows = len(tokens) // 40, tokens.unfold(0, 40, 1)
    before, seen = torch.get_rng_state(), set()
    for seed in range(20):
        found = load_calibration([text], tokenizer, seed=seed, **asked)
        assert (found.samples, found.seqlen) == (asked["samples"], 40)
        starts = [int((windows == w).all(1).nonzero()[0, 0]) for w in found.tokens]
        assert all(later - earlier >= 40 for earlier, later in pairwise(starts))
        assert "overlapping" not in found.source
        again = load_calibration([text], tokenizer, seed=seed, **asked)
        assert torch.equal(found.tokens, again.tokens)
        seen.add(tuple(starts))
    assert len(seen) > 10
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_begin_and_end_as_the_tokenizer_says(tokenizer):
    framing, asked = framing_tokenizer(), {"samples": 4, "seed": 1}
    bare = load_calibration([words(900)], tokenizer, seqlen=30, **asked)
    found = load_calibration([words(900)], framing, seqlen=32, **asked)
    assert found.tokens.shape == (4, 32)
    assert set(found.tokens[:, 0].tolist()) == {framing.bos_token_id}
    assert set(found.tokens[:, -1].tolist()) == {framing.eos_token_id}
    assert torch.equal(found.tokens[:, 1:-1], bare.tokens)
    assert found.describe().items() >= {"begins_with": "<s>", "ends_with": "</s>"}.items()
    assert "seed 1, each begins with <s> and ends with </s>" in found.sentence()
    assert "4 windows of 30 tokens of a list, seed 1, without special" in bare.sentence()
    with pytest.raises(DataError, match="2 tokens, of which the tokenizer adds 2, cannot"):
        load_calibration([words(900)], framing, seqlen=2, **asked)
    begins = TemplateProcessing("<s> $A", special_tokens=[("<s>", framing.bos_token_id)])
    framing.backend_tokenizer.post_processor = begins
    assert [one.tolist() for one in special_tokens(framing)] == [[framing.bos_token_id], []]


def test_a_short_text_gives_overlapping_windows_and_says_so(tokenizer):
    tokens = encode(tokenizer, words(60))
    found = load_calibration([words(60)], tokenizer, samples=50, seqlen=len(tokens) - 1, seed=0)
    assert f"50 overlapping windows from {len(tokens)} tokens" in found.source
    cut = tokens.unfold(0, len(tokens) - 1, 1)  # the first and the last are both among them
    assert torch.equal(found.tokens.unique(dim=0), cut.unique(dim=0))
    whole = load_calibration([words(60)], tokenizer, samples=1, seqlen=len(tokens), seed=0)
    assert torch.equal(whole.tokens[0], tokens)
    longer = len(tokens) + 1
    message = rf"a window of {longer} tokens cannot be cut from the {len(tokens)} tokens.*--seqlen"
    with pytest.raises(DataError, match=message):
        load_calibration([words(60)], tokenizer, samples=1, seqlen=longer, seed=0)


# ---- sources -----------------------------------------------------------------------------


def test_only_the_demo_has_texts_of_its_own():
    loaded = osscar.load_model("demo", device="cpu")
    windows, text = loaded.calibration(samples=2, seqlen=64), loaded.held_out()
    assert windows.source == "the demo's calibration text"
    assert (text.source, text.text) == ("the demo's held-out text", read_text(HELD_OUT))
    part = CALIBRATION.read_text()
    assert all(loaded.tokenizer.decode(w).strip("\ufffd") in part for w in windows.tokens)
    note(loaded.model, source="directory another")
    for draw in (loaded.calibration, loaded.held_out):
        with pytest.raises(DataError, match=r"a text like what .* such as text\.txt"):
            draw()


def test_files_and_texts_at_hand_are_read_alike(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, end in (("unix", "\n"), ("windows", "\r\n"), ("old", "\r")):
        Path(name).write_bytes(end.join(["\ufeffone", "", "two", ""]).encode())
        assert read_text(name) == "one\n\ntwo\n"
    texts, asked = [words(200), words(300)], {"samples": 3, "seqlen": 32}
    Path("corpus").write_text("\n\n".join(texts))  # which has no suffix, and is there
    found = load_calibration("corpus", tokenizer, **asked)
    assert found.source == "corpus"
    assert torch.equal(load_calibration(texts, tokenizer, **asked).tokens, found.tokens)
    assert osscar.load_text(texts, tokenizer).text == "\n\n".join(texts)


# ---- data sets of the hub ----------------------------------------------------------------


def test_rows_of_the_hub_are_streamed_until_there_are_enough(tokenizer, monkeypatch):
    seen, module = [], types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)

    def load_dataset(name, config, *, split, streaming):
        assert (split, streaming) == ("train", True)
        for row in range(100_000):
            seen.append((name, config))
            yield {"text": f"row {row} " + words(50)}

    module.load_dataset = load_dataset
    for name, asked in (
        ("org/name:20231101.en", ("org/name", "20231101.en")),
        ("org/name-v1.1", ("org/name-v1.1", None)),  # with dots, and no file
        ("c4", ("c4", None)),
    ):
        found = load_calibration(name, tokenizer, samples=4, seqlen=32)
        assert (found.source, seen[-1]) == (f"dataset {name}", asked)
    assert len(seen) < 300
