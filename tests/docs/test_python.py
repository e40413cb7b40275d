"""The Python that README and the site show runs, page by page, on small data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

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
    '"epochs": 100': '"epochs": 1, "batch": 4, "workers": 0, "device": "cpu"',
}
YOLO = "docs/howto/yolo.md"
LONG = ("README.md", "docs/after.md", YOLO)

PAGES_WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def run(page: str) -> dict[str, Any]:
    """Run all blocks of a page in order, in one namespace, and return it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        for word, small in SMALL.items():
            block = block.replace(word, small)
        exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with the files that pages name, and tables that are put back afterwards."""
    (tmp_path / "calibration.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "training.txt").write_text(CALIBRATION.read_text())
    monkeypatch.chdir(tmp_path)
    rules, adapters = graph.DEFAULT_RULES, osscar.shrinking.follow
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))


def test_every_page_with_python_is_run() -> None:
    assert set(PAGES_WITH_PYTHON) == set(CHECKS)


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:.*rank-deficient")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in LONG else page
        for page in PAGES_WITH_PYTHON
    ],
)
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # before ultralytics is imported, which would look for the network and the home directory
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(Path.cwd()))
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    if page in FILES:
        FILES[page]()
    CHECKS[page](run(page))


def write_boxes() -> None:
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


FILES: dict[str, Callable[[], None]] = {YOLO: write_boxes}
"""What writes the files that a page names, beside those that all find."""


def check_experts(names: dict[str, Any]) -> None:
    assert [(layer.kind, layer.kept) for layer in names["smaller"].layers] == [("experts", 3)] * 2


def check_instances(names: dict[str, Any]) -> None:
    best = library().instances["resnet20-c16-k8"].best
    assert names["loss"]("instance.safetensors", list(best.support)) == pytest.approx(best.loss)


def check_readme(names: dict[str, Any]) -> None:
    assert names["result"].parameters_after < names["result"].parameters_before
    assert Path("smaller").is_dir()
    assert names["recovery"].after <= names["recovery"].before
    assert Path("recovered").is_dir()


def check_start(names: dict[str, Any]) -> None:
    counts = [
        sum(p.numel() for p in m.parameters()) for m in (names["smaller"], names["loaded"].model)
    ]
    assert counts[0] < counts[1]


def check_estimate(names: dict[str, Any]) -> None:
    told = names["estimate"]
    assert told.seconds > 0
    assert told.peak_bytes > 0


def check_walk(names: dict[str, Any]) -> None:
    weights = names["prepared"].model.get_submodule("model.decoder.layers.0.fc2").weight
    assert int((weights == 0).all(0).sum()) == 320
    assert names["way"].passes == 1


def check_vision(names: dict[str, Any]) -> None:
    model, example, stated = names["stating"]()
    assert model(example).shape == (2, 10)
    assert stated == osscar.Preprocessing(mean=(0.49, 0.48, 0.45), std=(0.25,), channels=3)


def check_quality(names: dict[str, Any]) -> None:
    found = names["found"]
    assert found.walks[found.chosen].measured.bound <= found.most == 0.1
    assert found.reported.samples == 8


def check_recover(names: dict[str, Any]) -> None:
    first, again = names["recovery"], names["again"]
    assert first.after <= first.before
    assert (first.measure, again.measure) == ("nats", "loss")
    assert Path("recovered").is_dir()


def check_after(names: dict[str, Any]) -> None:
    assert Path("tuned/osscar.json").is_file()
    names_of = ("smaller", "tuned", "merged")
    weights = [dict(osscar.load(name).named_parameters()) for name in names_of]
    shapes = [{name: one.shape for name, one in each.items()} for each in weights]
    assert shapes[0] == shapes[1] == shapes[2]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    torch.testing.assert_close(names["compiled"], names["exact"], rtol=1e-4, atol=1e-4)
    error = (torch.from_numpy(names["rounded"]) - names["exact"]).norm() / names["exact"].norm()
    assert 0 < error < 0.2


def check_notebook(names: dict[str, Any]) -> None:
    assert names["recovery"].after < names["recovery"].before
    assert names["ids"].shape[1] > 8


def check_yolo(names: dict[str, Any]) -> None:
    result, tuned = names["result"], names["tuned"]
    assert result.parameters_after < 0.7 * result.parameters_before
    skipped = {group.name for group in result.skipped}
    assert skipped == {"model.10.cv1.conv.channels", "model.10.m.0.attn.heads"}
    pruned = {name: one.shape for name, one in result.model.named_parameters()}
    assert {name: one.shape for name, one in tuned.named_parameters()} == pruned
    x = next(names["images"].batches(3))
    with torch.no_grad():
        expected = tuned(x)
        torch.testing.assert_close(torch.from_numpy(names["boxes"]), expected, rtol=1e-3, atol=1e-3)
        again = osscar.load("tuned", dense=names["build"]()[0])
        assert_close(again(x)[0], expected)
    app(["export", "tuned", "--format", "onnx", "--dense", "yolo.py:build"])
    session = names["onnxruntime"].InferenceSession("tuned.onnx")
    raw = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(raw[0]), expected, rtol=1e-3, atol=1e-3)
    assert len(raw) == 6


def check_mathematics(names: dict[str, Any]) -> None:
    assert names["solution"].backend == "branch_and_bound"


def check_backend(names: dict[str, Any]) -> None:
    assert 0 < names["solution"].gap < 1


def check_architecture(names: dict[str, Any]) -> None:
    assert names["group"].prunable
    assert names["model"].up.out_features == names["model"].down.in_features == 20
    assert names["traced"].group("neurons").units == 40


def check_module(names: dict[str, Any]) -> None:
    assert "Attention" in str(names["told"])
    assert names["model"].layout == [3, 8]
    assert names["proof"].certificate.error < 1e-5


def check_forms(names: dict[str, Any]) -> None:
    assert names["result"].form == "exported"
    assert not names["result"].skipped
    assert names["archive"].inputs == {"input": "float32 (batch, input_1, 8)"}


def check_frozen(names: dict[str, Any]) -> None:
    groups = graph.trace(names["model"], (names["x"],)).groups
    assert {group.units: group.prunable for group in groups if group.units > 8} == {
        16: False,
        32: True,
    }
    assert not torch.allclose(names["before"], names["masked"])


def check_formats(names: dict[str, Any]) -> None:
    assert names["saved"].with_code
    ids = torch.arange(12)[None]
    own, read = names["result"].model, names["model"].float().eval()
    assert type(read).__module__.endswith(".modeling_pruned")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, own(ids).logits, rtol=0.05, atol=0.05)
        trained, again = names["trained"].eval(), names["again"]
        torch.testing.assert_close(again(ids).logits, trained(ids).logits)
        assert not torch.equal(
            again(ids).logits, osscar.load("smaller", dtype=torch.float32)(ids).logits
        )


def check_onnx(names: dict[str, Any]) -> None:
    assert names["logits"].shape == (3, 20, names["result"].model.config.vocab_size)
    ids = torch.ones((3, 20), dtype=torch.int64)
    with torch.no_grad():
        expected = osscar.load("smaller").float()(ids).logits
    assert_close(torch.from_numpy(names["logits"]), expected, rtol=1e-4, atol=1e-4)


def check_graphs(names: dict[str, Any]) -> None:
    assert names["result"].parameters_after < names["result"].parameters_before


def check_own_model(names: dict[str, Any]) -> None:
    quality = names["compared"].model.quality
    assert quality.top1 > 0.8
    assert 0 < quality.errors["output"] < 0.1
    assert names["again"].head.in_features < names["model"].head.in_features
    assert names["chosen"].source.startswith("a DataLoader, its first 128 samples")
    assert names["result"].calibration["samples"] == 128


def check_image_classifier(names: dict[str, Any]) -> None:
    result, compared = names["result"], names["compared"]
    assert result.parameters_after < 0.7 * result.parameters_before
    assert compared.dense.quality.top1 > 0.9
    assert compared.model.quality.top1 > 0.9
    assert names["recovery"].after < names["recovery"].before
    with torch.no_grad():
        expected = names["recovery"].model(names["draw"](3, 2000)[0])
    assert_close(torch.from_numpy(names["scores"]), expected, rtol=1e-4, atol=1e-4)


def check_solver(names: dict[str, Any]) -> None:
    excess = names["excess"]
    assert min(min(row) for row in excess.values()) > -0.011  # percent, up to the tolerance
    assert max(excess["local_search"]) < 0.011
    assert max(excess["restarts"]) < max(excess["magnitude"])
    assert Path("excess.svg").is_file()


def check_nanogpt(names: dict[str, Any]) -> None:
    result, idx = names["result"], names["test"].tensors["idx"][:5]
    assert 0 < result.divergence < 0.5
    with torch.no_grad():
        expected, loss = result.model(idx)
    assert (expected.shape, loss) == ((5, 1, 16), None)
    assert_close(torch.from_numpy(names["logits"]), expected, rtol=1e-4, atol=1e-5)


ONNX = ("onnx", "onnxscript", "onnxruntime")
NEEDS = {
    "docs/tutorials/image-classifier.md": ONNX,
    "docs/howto/nanogpt.md": ONNX,
    "docs/howto/onnx.md": ONNX,
    "docs/after.md": (*ONNX, "accelerate", "datasets", "peft"),
    "docs/from-model-to-file.ipynb": ONNX,
    YOLO: ("ultralytics", *ONNX),
}
"""Packages that a page is about: of an extra, but for ultralytics."""

CHECKS = {
    "README.md": check_readme,
    "docs/index.md": check_start,
    "docs/howto/estimate.md": check_estimate,
    "docs/howto/quality.md": check_quality,
    "docs/vision.md": check_vision,
    "docs/walk.md": check_walk,
    "docs/experts.md": check_experts,
    "docs/instances.md": check_instances,
    "docs/recover.md": check_recover,
    "docs/after.md": check_after,
    "docs/tutorials/image-classifier.md": check_image_classifier,
    "docs/tutorials/solver.md": check_solver,
    "docs/from-model-to-file.ipynb": check_notebook,
    "docs/mathematics.md": check_mathematics,
    "docs/howto/backend.md": check_backend,
    "docs/howto/architecture.md": check_architecture,
    "docs/howto/module.md": check_module,
    "docs/howto/own-model.md": check_own_model,
    "docs/howto/nanogpt.md": check_nanogpt,
    "docs/howto/forms.md": check_forms,
    "docs/howto/frozen.md": check_frozen,
    "docs/howto/formats.md": check_formats,
    "docs/howto/onnx.md": check_onnx,
    "docs/howto/graphs.md": check_graphs,
    YOLO: check_yolo,
}
