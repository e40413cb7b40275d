"""The Python that README and the site show runs, page by page, on small data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graph
import osscar
import osscar.shrinking.slice
from tests.docs.pages import PAGES, blocks
from tests.osscar.families import CALIBRATION

SMALL = {
    '"smollm2-135m"': '"demo"',
    "samples=32, seqlen=512": "samples=4, seqlen=64",
    "samples=264, seqlen=512": "samples=12, seqlen=32",
    "samples=64, seqlen=64": "samples=32, seqlen=32",
    "steps=64": "steps=4",
    "SIDE = 640": "SIDE = 64",
    "steps=256": "steps=2",
    '"epochs": 100': '"epochs": 1, "batch": 4, "workers": 0, "device": "cpu"',
}
YOLO = "docs/howto/yolo.md"
ENCODER = "docs/tutorials/sentence-encoder.md"
LONG = (
    "README.md",
    "docs/after.md",
    "docs/experts.md",
    "docs/from-model-to-file.ipynb",
    YOLO,
    ENCODER,
)

PAGES_WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def run(page):
    """Run all blocks of a page in order, in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        for word, small in SMALL.items():
            block = block.replace(word, small)
        exec(compile(block, page, "exec"), namespace)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A directory with the files that pages name, and tables that are put back afterwards."""
    (tmp_path / "calibration.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "training.txt").write_text(CALIBRATION.read_text())
    monkeypatch.chdir(tmp_path)
    rules, adapters = graph.DEFAULT_RULES, osscar.shrinking.slice
    monkeypatch.setattr(rules, "maps", [dict(one) for one in rules.maps])
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:.*rank-deficient")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in LONG else page
        for page in PAGES_WITH_PYTHON
    ],
)
def test_the_python_of_a_page_runs(page, monkeypatch):
    # before ultralytics is imported, which would look for the network and the home directory
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(Path.cwd()))
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    if page == YOLO:
        write_boxes()
    if page == ENCODER:
        write_encoder()
    run(page)


def write_boxes():
    """Write images with boxes, as ultralytics reads them."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for directory in ("images", "labels"):
        Path(directory).mkdir()
    for number in range(8):
        pixels = generator.integers(0, 256, (50 + number, 80, 3), dtype=np.uint8)
        image.fromarray(pixels).save(f"images/{number}.png")
        Path(f"labels/{number}.txt").write_text("0 0.5 0.5 0.4 0.3\n1 0.3 0.3 0.2 0.2\n")
    names = ", ".join(f"{number}: {chr(97 + number % 26)}{number}" for number in range(80))
    Path("data.yaml").write_text(
        f"path: {Path.cwd()}\ntrain: images\nval: images\nnames: {{{names}}}\n"
    )
    Path("yolo.py").write_text(blocks(YOLO, "python")[0].replace("SIDE = 640", "SIDE = 64"))


def write_encoder():
    """Write a small sentence encoder, and sentences."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from tokenizers import BertWordPieceTokenizer

    lines = [line.strip() for line in CALIBRATION.read_text().splitlines()]
    sentences = [line for line in lines if 20 < len(line) < 80][:96]
    Path("sentences.txt").write_text("\n".join(sentences))
    words = BertWordPieceTokenizer()
    words.train_from_iterator(sentences, vocab_size=300, show_progress=False)
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=words._tokenizer)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained("bert")
    tokenizer.save_pretrained("bert")
    SentenceTransformer("bert", device="cpu").save_pretrained("all-MiniLM-L6-v2")


ONNX = ("onnx", "onnxscript", "onnxruntime")
NEEDS = {
    "docs/tutorials/image-classifier.md": ONNX,
    "docs/howto/onnx.md": ONNX,
    "docs/after.md": (*ONNX, "accelerate", "datasets", "peft"),
    "docs/from-model-to-file.ipynb": ONNX,
    YOLO: ("ultralytics", *ONNX),
    ENCODER: ("sentence_transformers", *ONNX),
}
"""Packages that a page is about: of an extra, but for ultralytics."""
