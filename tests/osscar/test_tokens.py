"""Calibration: windows are reproducible, parts are disjoint, and bad text is refused by name."""

from __future__ import annotations

import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast

import osscar
from benchmarks.prose import shingles, split_paragraphs
from osscar.base.errors import (
    DataError,
    MissingDependency,
    OptionError,
)
from osscar.data.text import encode, load_calibration, read_text
from osscar.models.names import DEMO_DIRECTORY
from osscar.proof.lineage import note
from tests.osscar.families import CALIBRATION, HELD_OUT, framing_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_DIRECTORY)


def words(count: int) -> str:
    """Give text of which every window is unique."""
    return " ".join(str(number) for number in range(count))


def test_lines_end_alike_whoever_wrote_them(tmp_path):
    for name, end in (("unix", "\n"), ("windows", "\r\n"), ("old", "\r")):
        (tmp_path / name).write_bytes(end.join(["\ufeffone", "", "two", ""]).encode())
        assert read_text(tmp_path / name) == "one\n\ntwo\n"


def test_a_text_that_the_tokenizer_does_not_know_is_told(recwarn):
    tokenizer = BertTokenizerFast(
        vocab={name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "word"])}
    )
    encode(tokenizer, "word " * 99 + "other")
    assert not recwarn
    with pytest.warns(UserWarning, match=r"50 of the text's 100 tokens are \[UNK\]"):
        encode(tokenizer, "word other " * 50)


class TestWindows:
    def test_seed_decides_the_windows_and_no_random_state(self, tokenizer):
        text = words(3000)
        torch.manual_seed(0)
        first = load_calibration([text], tokenizer, samples=4, seqlen=32, seed=1)
        drawn = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(torch.rand(3), drawn)
        again = load_calibration([text], tokenizer, samples=4, seqlen=32, seed=1)
        other = load_calibration([text], tokenizer, samples=4, seqlen=32, seed=2)
        assert torch.equal(first.tokens, again.tokens)
        assert not torch.equal(first.tokens, other.tokens)

    def test_windows_are_cut_from_the_text_in_order_and_apart(self, tokenizer):
        text = words(400)
        tokens = encode(tokenizer, text)
        samples, windows = len(tokens) // 40, tokens.unfold(0, 40, 1)
        for seed in range(20):
            found = load_calibration([text], tokenizer, samples=samples, seqlen=40, seed=seed)
            assert (found.samples, found.seqlen) == (samples, 40)
            starts = [int((windows == w).all(1).nonzero()[0, 0]) for w in found.tokens]
            assert all(later - earlier >= 40 for earlier, later in pairwise(starts))
            assert "overlapping" not in found.source

    def test_windows_begin_and_end_as_the_tokenizer_says(self, tokenizer):
        framing = framing_tokenizer()
        bare = load_calibration([words(900)], tokenizer, samples=4, seqlen=30, seed=1)
        found = load_calibration([words(900)], framing, samples=4, seqlen=32, seed=1)
        assert found.tokens.shape == (4, 32)
        assert set(found.tokens[:, 0].tolist()) == {framing.bos_token_id}
        assert set(found.tokens[:, -1].tolist()) == {framing.eos_token_id}
        assert torch.equal(found.tokens[:, 1:-1], bare.tokens)
        assert found.describe().items() >= {"begins_with": "<s>", "ends_with": "</s>"}.items()
        assert "seed 1, each begins with <s> and ends with </s>" in found.sentence()
        assert "4 windows of 30 tokens of a list, seed 1, without special" in bare.sentence()
        with pytest.raises(DataError, match="room for none of the text"):
            load_calibration([words(900)], framing, samples=4, seqlen=2, seed=1)

    def test_a_short_text_gives_overlapping_windows_and_says_so(self, tokenizer):
        tokens = encode(tokenizer, words(60))
        found = load_calibration([words(60)], tokenizer, samples=50, seqlen=40, seed=0)
        assert found.tokens.shape == (50, 40)
        assert f"50 overlapping windows from {len(tokens)} tokens" in found.source
        # the first and the last stretch of the text are both covered
        assert len(set(found.tokens[:, 0].tolist())) > 1
        assert set(found.tokens.flatten().tolist()) <= set(tokens.tolist())

    def test_a_text_shorter_than_a_window_is_refused(self, tokenizer):
        tokens = encode(tokenizer, words(60))
        held = len(tokens)
        found = load_calibration([words(60)], tokenizer, samples=1, seqlen=held, seed=0)
        assert torch.equal(found.tokens[0], tokens)
        message = rf"{held} tokens, fewer than one window of {held + 1}.*seqlen="
        with pytest.raises(DataError, match=message):
            load_calibration([words(60)], tokenizer, samples=1, seqlen=held + 1, seed=0)
        for samples, seqlen in ((0, 8), (-1, 8), (8, 0)):
            with pytest.raises(OptionError, match="must be at least 1, not "):
                load_calibration([words(60)], tokenizer, samples=samples, seqlen=seqlen, seed=0)

    def test_long_text_is_tokenized_without_a_warning(self, tokenizer, caplog):
        import logging

        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            assert len(encode(tokenizer, words(3000))) > tokenizer.model_max_length
        finally:
            logger.removeHandler(caplog.handler)
        assert "longer than" not in caplog.text


class TestSources:
    def test_only_the_demo_has_texts_of_its_own(self):
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

    def test_texts_at_hand_are_read_as_files_are(self, tokenizer, tmp_path):
        texts = [words(200), words(300)]
        (tmp_path / "both.txt").write_text("\n\n".join(texts))
        asked = {"samples": 3, "seqlen": 32}
        expected = load_calibration(tmp_path / "both.txt", tokenizer, **asked)
        assert torch.equal(load_calibration(texts, tokenizer, **asked).tokens, expected.tokens)
        assert osscar.load_text(texts, tokenizer).text == "\n\n".join(texts)

    def test_text_file(self, tokenizer, tmp_path):
        file = tmp_path / "own.txt"
        file.write_text(words(900), encoding="utf-8-sig")
        found = load_calibration(file, tokenizer, samples=3, seqlen=16, seed=5)
        direct = load_calibration([words(900)], tokenizer, samples=3, seqlen=16, seed=5)
        assert torch.equal(found.tokens, direct.tokens)
        assert found.source == str(file)

    def test_bad_files_are_refused(self, tokenizer, tmp_path):
        file = tmp_path / "bad.txt"
        for content, complaint in (
            (b"", "is empty"),
            (b" \n\t\n", "is empty"),
            (b"PK\x03\x04\x00\x00", "is binary"),
            ("na\xefve".encode("latin-1"), "not UTF-8 .byte 2: 0xef"),
        ):
            file.write_bytes(content)
            with pytest.raises(DataError, match=rf"bad\.txt.*{complaint}"):
                load_calibration(str(file), tokenizer)
        for spec in ("missing.txt", "/nowhere/text", "./text"):
            with pytest.raises(DataError, match=rf"no text file at .*{Path(spec).name}"):
                load_calibration(spec, tokenizer)
        with pytest.raises(DataError, match="cannot read"):
            load_calibration(tmp_path, tokenizer)
        for read in (read_text, lambda path: osscar.load_text(path, tokenizer)):
            with pytest.raises(DataError, match=r"^no text file at"):
                read(tmp_path / "missing.txt")

    def test_paths_and_names_are_told_apart(self, tokenizer, tmp_path, monkeypatch):
        """A file without a suffix is still a file when it exists."""
        monkeypatch.chdir(tmp_path)
        Path("corpus").write_text(words(300), encoding="utf-8")
        assert load_calibration("corpus", tokenizer, samples=1, seqlen=16).source == "corpus"


class TestDatasets:
    @staticmethod
    def install(monkeypatch, load_dataset):
        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)

    def test_names_with_dots_are_not_taken_for_files(self, tokenizer, monkeypatch):
        self.install(monkeypatch, lambda *_, **__: [{"text": words(300)}])
        for name in ("org/name-v1.1", "org/name:20231101.en", "c4"):
            found = load_calibration(name, tokenizer, samples=1, seqlen=16)
            assert found.source == f"dataset {name}"

    def test_rows_are_streamed_until_there_are_enough(self, tokenizer, monkeypatch):
        seen = []

        def load_dataset(name, config, *, split, streaming):
            assert (name, config, split, streaming) == ("org/name", "en", "train", True)
            for row in range(100_000):
                seen.append(row)
                yield {"text": f"row {row} " + words(50)}

        self.install(monkeypatch, load_dataset)
        found = load_calibration("org/name:en", tokenizer, samples=4, seqlen=32)
        assert found.tokens.shape == (4, 32)
        assert len(seen) < 100
        assert "org/name:en" in found.source

    def test_without_the_package(self, tokenizer, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingDependency, match=r"'org/name'.*osscar\[data\]"):
            load_calibration("org/name", tokenizer)

    def test_unreachable_hub(self, tokenizer, monkeypatch):
        def load_dataset(*_, **__):
            raise ConnectionError("Couldn't reach 'org/name' on the Hub\nmore")

        self.install(monkeypatch, load_dataset)
        with pytest.raises(DataError, match=r"'org/name'.*Couldn't reach.*text file") as caught:
            load_calibration("org/name", tokenizer)
        assert "more" not in str(caught.value)

    def test_rows_without_text_are_refused(self, tokenizer, monkeypatch):
        for rows, message in (
            ([{"label": 1, "image": 2}], "no column 'text' of strings, only image, label"),
            ([{"text": 3}], "no column 'text' of strings, only text"),
            ([], "has no text"),
        ):
            self.install(monkeypatch, lambda *_, rows=rows, **__: rows)
            with pytest.raises(DataError, match=message):
                load_calibration("org/name", tokenizer)


def test_the_texts_of_the_demo_share_no_prose():
    calibration, held_out = (
        {run for paragraph in split_paragraphs(path.read_text()) for run in shingles(paragraph)}
        for path in (CALIBRATION, HELD_OUT)
    )
    assert min(len(calibration), len(held_out)) > 4000
    assert not calibration & held_out
