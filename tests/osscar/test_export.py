"""Files of ONNX and torch.export: what an engine computes from them is compared first."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import osscar
from osscar.base.errors import DataError, EquivalenceError, ModelError, OutputError
from osscar.export import traced as writer
from osscar.models.load import build_from_code
from tests.docs.json_schema import undescribed
from tests.osscar.gpts import nano

_, _, runtime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
EITHER = {"onnx": osscar.export_onnx, "pt2": osscar.export_pt2}

CODE = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.join = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, tokens, features):
        joined = self.join(torch.cat([self.embed(tokens).mean(1), features], 1))
        return {"scores": joined, "largest": joined.argmax(1)}

def two():
    torch.manual_seed(0)
    example = {"tokens": torch.arange(6).repeat(2, 1), "features": torch.ones(2, 4)}
    return Two(), example
"""


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def run_file(file, **inputs):
    session = runtime.InferenceSession(file)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(np.asarray(array)) for array in found]


# ---- models of each sort -----------------------------------------------------------------


def test_code_of_ones_own_with_several_inputs_and_outputs(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    osscar.save(build_from_code("mine.py:two")[0], "small")
    np.savez("data.npz", tokens=np.arange(48).reshape(8, 6) % 9, features=np.ones((8, 4), "f"))
    for form in EITHER:
        words = ("export", "small", "--format", form)
        assert run(*words)[0] == 2  # it is not known what builds it
        words += ("--dense", "mine.py:two", "--inputs", "data.npz", "--json", "out.json")
        status, _, err = run(*words)
        assert status == 0, err
        document = json.loads(Path("out.json").read_text())
        assert undescribed(document) == set()
        assert document["inputs"]["features"] == "float32 (batch, 4)"
    again = osscar.load("small", dense=build_from_code("mine.py:two")[0])
    x = {"tokens": torch.ones(5, 6).long(), "features": torch.randn(5, 4)}
    found = run_file(Path("small.onnx"), **x)
    assert all(map(torch.allclose, again(**x).values(), found))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        *("data.npz", "mine.py", "out.json", "small.onnx", "small.pt2")
    ]


@pytest.mark.slow
def test_images_of_the_size_that_a_pruning_says(tmp_path, runs):
    runs["resnet"].result.save(tmp_path / "resnet")
    found = osscar.export_pt2(tmp_path / "resnet")
    assert found.inputs == {"pixel_values": "float32 (batch, 3, 24, 24)"}
    images, program = torch.randn(5, 3, 24, 24), torch.export.load(found.path).module()
    expected = runs["resnet"].result.model(images).logits
    assert torch.allclose(program(pixel_values=images).logits, expected, atol=1e-5)


@pytest.mark.slow
def test_a_length_that_is_a_number_in_the_file_is_not_called_open(tmp_path):
    """torch writes the length down in a loop over the tokens, and still calls it open."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1)
    found = osscar.export_onnx(MambaForCausalLM(config).eval(), tmp_path / "mamba.onnx")
    assert found.inputs["input_ids"] == "int64 (batch, 12)"


def test_sizes_that_an_engine_gets_wrong_are_closed(tmp_path, monkeypatch):
    model, x = net(), torch.randn(2, 4)
    original = osscar.export.open_program.prove_equal

    def only_two(expected, found, names):
        original(expected, [one + (len(one) != 2) for one in found], names=names)

    monkeypatch.setattr("osscar.export.open_program.prove_equal", only_two)
    found = osscar.export_pt2(model, tmp_path / "net.pt2", example_inputs=x)
    assert found.inputs["input"] == "float32 (2, 4)"


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it_and_leave_with_it(tmp_path, monkeypatch):
    threshold = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    out, beside = tmp_path / "net.onnx", tmp_path / "net.onnx.data"
    model, x = nn.Linear(64, 64).eval(), torch.randn(2, 64)
    with monkeypatch.context() as patched:
        patched.setattr(threshold, 8)
        found = osscar.export_onnx(model, out, example_inputs=x)
    assert found.weights == beside
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) > 64 * 64 * 4
    (again,) = run_file(shutil.copytree(tmp_path, tmp_path / "moved") / out.name, input=x)
    assert torch.allclose(again, model(x), atol=1e-5)
    shutil.rmtree(tmp_path / "moved")
    osscar.export_onnx(model, out, example_inputs=x, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    beside.write_text("mine")
    with pytest.raises(OutputError, match=r"net\.onnx\.data exists"):
        osscar.export_onnx(model, out, example_inputs=x, overwrite=True)
    assert beside.read_text() == "mine"


# ---- bad input ---------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    x, out, other = torch.randn(2, 4), tmp_path / "net.onnx", tmp_path / "other.onnx"
    osscar.export_onnx(net(), other, example_inputs=x)
    monkeypatch.setattr(writer, "_write", lambda traced, names, path: shutil.copy(other, path))
    out.write_bytes(b"the one before")
    with pytest.raises(EquivalenceError, match=r"ONNX Runtime computes.*differs.* by \d\.\d+e"):
        osscar.export_onnx(net(seed=1), out, example_inputs=x, overwrite=True)
    assert out.read_bytes() == b"the one before"
    assert set(tmp_path.iterdir()) == {out, other}


class Returns(nn.Linear):
    """Puts out what a function makes of what it reads."""

    def __init__(self, makes):
        super().__init__(4, 3)
        self.makes = makes

    def forward(self, x):
        return self.makes(super().forward(x))


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (Returns(lambda y: (y, 3)), (2, 4), ModelError, r"returns 3 \(int\), which"),
        (Returns(torch.linalg.svdvals), (2, 4), ModelError, r"cannot write.*svd"),
        (net(), None, DataError, "it is not known what this Sequential takes"),
        (net(), (2, 5), ModelError, r"fails on.*\(input \(2, 5\)\): .*inputs="),
    ],
)
def test_what_cannot_be_written_leaves_nothing(model, given, error, message, tmp_path):
    example = None if given is None else torch.randn(given)
    with pytest.raises(error, match=message):
        osscar.export_onnx(model.eval(), tmp_path / "net.onnx", example_inputs=example)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_named_and_nothing_is_left(tmp_path):
    """Also by the archive of torch, whose own writer ends the process then."""
    model, x = nn.Linear(100, 100).eval(), torch.randn(2, 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*File too large"):
            osscar.export_pt2(model, tmp_path / "net.pt2", example_inputs=x)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_labels_are_left_out_and_lengths_are_free(tmp_path):
    """Of a network of one's own that was pruned with them: of its loss, nothing is written."""
    torch.manual_seed(0)
    model, _ = nano()
    x, y = torch.randint(12, (2, 32, 7))
    given = {"idx": x, "targets": y}
    smaller = osscar.prune(model, given, neurons=0.5, backend="magnitude", device="cpu").model
    written = osscar.export_pt2(smaller, tmp_path / "net.pt2")
    assert written.inputs == {"idx": "int64 (batch, idx_1)"}
    program = torch.export.load(tmp_path / "net.pt2").module()
    for shape in ((1, 5), (3, 10)):
        idx = torch.randint(12, shape)
        torch.testing.assert_close(program(idx=idx)[0], smaller(idx)[0], rtol=1e-4, atol=1e-5)
