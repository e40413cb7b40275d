"""The Python that README and the site show runs, page by page, on small data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graph
import osscar
import osscar.shrinking.follow
from osscar.cli.commands import app
from osscar.study.library import library
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
    """Run all blocks of a page in order, in one namespace, and return it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        for word, small in SMALL.items():
            block = block.replace(word, small)
        exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A directory with the files that pages name, and tables that are put back afterwards."""
    (tmp_path / "calibration.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "training.txt").write_text(CALIBRATION.read_text())
    monkeypatch.chdir(tmp_path)
    rules, adapters = graph.DEFAULT_RULES, osscar.shrinking.follow
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
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
    found = HELPERS | run(page)
    with torch.no_grad():
        for line in CHECKS.get(page, ()):
            name, _, value = line.partition(" = ")
            if value:
                found[name] = eval(value, found)
            else:
                assert eval(line, found), line


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


def shapes(model):
    return {name: one.shape for name, one in model.named_parameters()}


def close(found, expected, atol=1e-4):
    mine, theirs = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return torch.allclose(mine, theirs, rtol=1e-3, atol=atol)


def run_onnx(file, **inputs):
    """Export the model of the page about ultralytics, and let ONNX Runtime run it."""
    app(["export", "tuned", "--format", "onnx", "--dense", "yolo.py:build", "--out", file])
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    found: list[Any] = session.run(None, {name: one.numpy() for name, one in inputs.items()})
    return found


HELPERS = {
    **{"osscar": osscar, "graph": graph, "library": library, "torch": torch, "Path": Path},
    **{one.__name__: one for one in (shapes, close, run_onnx)},
}

ONNX = ("onnx", "onnxscript", "onnxruntime")
NEEDS = {
    "docs/tutorials/image-classifier.md": ONNX,
    "docs/howto/nanogpt.md": ONNX,
    "docs/howto/onnx.md": ONNX,
    "docs/after.md": (*ONNX, "accelerate", "datasets", "peft"),
    "docs/from-model-to-file.ipynb": ONNX,
    YOLO: ("ultralytics", *ONNX),
    ENCODER: ("sentence_transformers", *ONNX),
}
"""Packages that a page is about: of an extra, but for ultralytics."""

CHECKS: dict[str, tuple[str, ...]] = {
    ENCODER: (
        "type(smaller[0].auto_model).__module__.endswith('modeling_pruned')",
        "sum(p.numel() for p in smaller.parameters()) == result.parameters_after",
        "mine = (hidden * mask).sum(1) / mask.sum(1)",
        "close(mine, smaller.encode(texts, convert_to_numpy=True))",
    ),
    "docs/howto/quality.md": (
        "found.attempts[found.chosen].tested.bound <= found.most == 0.1",
        "found.reported.samples >= 31",
    ),
    "docs/vision.md": (
        "stating()[0](stating()[1]).shape == (2, 10)",
        "stating()[2] == osscar.Preprocessing(mean=(0.49, 0.48, 0.45), std=0.25)",
    ),
    "docs/walk.md": (
        "(prepared.model.model.decoder.layers[0].fc2.weight == 0).all(0).sum() == 320",
        "way.passes == 1",
    ),
    "docs/experts.md": (
        "[(one.kind, one.kept) for one in smaller.layers] == [('experts', 3)] * 2",
    ),
    "docs/instances.md": (
        "best = library().instances['resnet20-c16-k8'].best",
        "close(loss('instance.safetensors', list(best.support)), best.loss, 1e-6)",
    ),
    "docs/after.md": (
        "Path('tuned/osscar.json').is_file()",
        "read = [osscar.load(name) for name in ('smaller', 'tuned', 'merged')]",
        "shapes(read[0]) == shapes(read[1]) == shapes(read[2])",
        "not all(map(torch.equal, read[0].parameters(), read[1].parameters()))",
        "close(compiled, exact)",
        "0 < (torch.from_numpy(rounded) - exact).norm() / exact.norm() < 0.2",
    ),
    "docs/tutorials/image-classifier.md": (
        "result.parameters_after < 0.7 * result.parameters_before",
        "min(compared.dense.quality.top1, compared.model.quality.top1) > 0.9",
        "recovery.after < recovery.before",
        "close(scores, recovery.model(draw(3, 2000)[0]))",
    ),
    "docs/tutorials/solver.md": (
        "min(map(min, excess.values())) > -0.011",  # percent, up to the tolerance
        "max(excess['local_search']) < 0.011",
        "max(excess['restarts']) < max(excess['magnitude'])",
        "Path('excess.svg').is_file()",
    ),
    "docs/howto/architecture.md": (
        "group.prunable and traced.group('neurons').units == 40",
        "model.up.out_features == model.down.in_features == 20",
    ),
    "docs/howto/module.md": (
        "'Attention' in str(told) and model.layout == [3, 8]",
        "proof.certificate.error < 1e-5",
    ),
    "docs/howto/own-model.md": (
        "compared.model.quality.top1 > 0.8",
        "0 < compared.model.quality.errors['output'] < 0.1",
        "again.head.in_features < model.head.in_features",
        "chosen.source.startswith('a DataLoader, its first 128 samples')",
        "result.calibration['samples'] == 128",
    ),
    "docs/howto/nanogpt.md": (
        "0 < result.divergence < 0.5",
        "own = result.model(test.tensors['idx'][:5])",
        "own[0].shape == (5, 1, 16) and own[1] is None",
        "close(logits, own[0])",
    ),
    "docs/howto/forms.md": (
        "result.form == 'exported' and not result.skipped",
        "archive.inputs == {'input': 'float32 (batch, input_1, 8)'}",
    ),
    "docs/howto/frozen.md": (
        "wide = [one for one in graph.trace(model, (x,)).groups if one.units > 8]",
        "{one.units: one.prunable for one in wide} == {16: False, 32: True}",
        "not torch.allclose(before, masked)",
    ),
    "docs/howto/formats.md": (
        "saved.with_code and type(model).__module__.endswith('.modeling_pruned')",
        "ids = torch.arange(12)[None]",
        "close(model.float().eval()(ids).logits, result.model(ids).logits, 0.05)",
        "close(again(ids).logits, trained.eval()(ids).logits)",
        "not close(again(ids).logits, osscar.load('smaller', dtype=torch.float32)(ids).logits, 0)",
    ),
    "docs/howto/onnx.md": (
        "logits.shape == (3, 20, result.model.config.vocab_size)",
        "close(logits, osscar.load('smaller').float()(torch.ones(3, 20).long()).logits)",
    ),
    YOLO: (
        "result.parameters_after < 0.7 * result.parameters_before",
        "{one.name for one in result.skipped} == {'model.10.cv1.conv.channels', "
        "'model.10.m.0.attn.heads'}",
        "shapes(tuned) == shapes(result.model)",
        "x = next(images.batches(3))",
        "expected = tuned(x)",
        "raw = run_onnx('tuned.onnx', x=x)",
        "close(boxes, expected, 1e-3)",
        "close(osscar.load('tuned', dense=build()[0])(x)[0], expected)",
        "len(raw) == 6 and close(raw[0], expected, 1e-3)",
    ),
}
"""What is true of the names that the Python of a page leaves, with some more names for it."""
