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
from osscar.base.errors import (
    DataError,
    EquivalenceError,
    ModelError,
    OutputError,
)
from osscar.export import onnx as writer
from osscar.export.open_program import OpenProgram
from osscar.models.user_code import build
from osscar.network.hooks import computable_mixtures
from tests.docs.json_schema import undescribed
from tests.osscar.families import tiny, tokens
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


class FlipsLargeBatches(nn.Sequential):
    """Does something else for more than four samples."""

    def forward(self, x):
        y = super().forward(x)
        return y.flip(1) if x.shape[0] > 4 else y


def test_a_size_is_open_only_as_far_as_the_code_does_the_same(tmp_path):
    model, x = FlipsLargeBatches(*net()).eval(), torch.randn(6, 4)
    file = osscar.export_onnx(model, tmp_path / "net.onnx", example_inputs=x[:2]).path
    torch.testing.assert_close(run_file(file, x=x[:2])[0], model(x[:2]))
    with pytest.raises(Exception, match="dimension"):
        run_file(file, x=x)


# ---- models of each sort -----------------------------------------------------------------


def test_code_of_ones_own_with_several_inputs_and_outputs(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    osscar.save(build("mine.py:two")[0], "small")
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
    again = osscar.load("small", dense=build("mine.py:two")[0])
    x = {"tokens": torch.ones(5, 6).long(), "features": torch.randn(5, 4)}
    found = run_file(Path("small.onnx"), **x)
    assert all(map(torch.allclose, again(**x).values(), found))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        *("data.npz", "mine.py", "out.json", "small.onnx", "small.pt2")
    ]


def test_images_of_the_size_that_a_config_or_a_pruning_says(tmp_path, runs):
    osscar.save(runs["vit"].result.model, tmp_path / "vit")
    runs["resnet"].result.save(tmp_path / "resnet")
    for name, size in (("vit", 32), ("resnet", 24)):
        found = osscar.export_pt2(tmp_path / name)
        assert found.inputs == {"pixel_values": f"float32 (batch, 3, {size}, {size})"}
        images, program = torch.randn(5, 3, size, size), torch.export.load(found.path).module()
        expected = runs[name].result.model(images).logits
        assert torch.allclose(program(pixel_values=images).logits, expected, atol=1e-5)


@pytest.mark.slow
def test_a_mask_beside_the_tokens(tmp_path):
    """Nothing in the program relies on as many rows in both."""
    model, mask = tiny("llama-gqa", layers=1), torch.ones(2, 10, dtype=torch.int64)
    mask[1, -3:] = 0
    given = {"attention_mask": mask, "input_ids": tokens(2, 10)}
    found = osscar.export_onnx(model, tmp_path / "masked.onnx", example_inputs=given)
    assert set(found.inputs.values()) == {"int64 (batch, length)"}
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, :4] = 0
    (logits,) = run_file(found.path, input_ids=ids, attention_mask=mask)
    expected = model(ids, attention_mask=mask).logits
    assert torch.allclose(logits[mask == 1], expected[mask == 1], atol=1e-4)


# ---- sizes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_length_that_is_a_number_in_the_file_is_not_called_open(tmp_path):
    """torch writes the length down in a loop over the tokens, and still calls it open."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1)
    found = osscar.export_onnx(MambaForCausalLM(config).eval(), tmp_path / "mamba.onnx")
    assert found.inputs["input_ids"] == "int64 (batch, 12)"


def test_sizes_that_an_engine_gets_wrong_are_closed(tmp_path, monkeypatch):
    model, x = net(), torch.randn(2, 4)
    original = osscar.export.open_program._prove

    def only_two(expected, found, names):
        original(expected, [one + (len(one) != 2) for one in found], names)

    monkeypatch.setattr("osscar.export.open_program._prove", only_two)
    found = osscar.export_pt2(model, tmp_path / "net.pt2", example_inputs=x)
    assert found.inputs["input"] == "float32 (2, 4)"


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
    for there in (True, False):  # which does not name them, or is not there
        with pytest.raises(OutputError, match=r"net\.onnx\.data exists"):
            osscar.export_onnx(model, out, example_inputs=x, overwrite=there)
        out.unlink(missing_ok=True)
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


class Singular(nn.Linear):
    def forward(self, x):
        return torch.linalg.svdvals(super().forward(x))


class Decides(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Returns(nn.Linear):
    """Puts out what a function makes of what it reads."""

    def __init__(self, makes):
        super().__init__(4, 3)
        self.makes = makes

    def forward(self, x):
        return self.makes(super().forward(x))


def test_outputs_that_are_called_like_others_get_names_of_their_own():
    for makes, names in (
        (lambda y: {"x": y, "output_x": y, "b": None}, ["output_x", "output_output_x"]),
        (lambda y: {"a": {"b": y}, "a.b": y}, ["a.b", "output_a.b"]),
    ):
        opened = OpenProgram(Returns(makes).eval(), {"x": torch.randn(2, 4)}, computable_mixtures)
        assert opened.output_names == names


X = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (Returns(lambda y: (y, 3)), X, ModelError, r"returns 3 \(int\), which"),
        (net().double(), X, ModelError, r"float64.*model\.float\(\)"),
        (torch.jit.trace(net(), X), X, ModelError, "TorchScript"),
        (nn.DataParallel(net()), X, ModelError, r"wraps.* \(model\.module\)"),
        (Singular(4, 3), X, ModelError, r"cannot write.*svd"),
        (Decides(4, 3), X, ModelError, "cannot follow the model"),
        (net(), None, DataError, "it is not known what this Sequential takes"),
        (net(), {"x": X}, DataError, "takes no 'x'"),
        (net(), torch.randn(2, 5), ModelError, r"fails on.*\(input \(2, 5\)\): .*inputs="),
        (net(), "nowhere.npz", osscar.OsscarError, "there is no such file"),
        (net(), __file__, osscar.OsscarError, "Sequential reads tensors"),
        (nn.ReLU(), X, ModelError, "has no parameters"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(model, given, error, message, tmp_path):
    with pytest.raises(error, match=message):
        osscar.export_onnx(model.eval(), tmp_path / "net.onnx", example_inputs=given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", EITHER.values(), ids=EITHER)
def test_a_disk_that_refuses_is_named_and_nothing_is_left(write, tmp_path):
    """Also by the archive of torch, whose own writer ends the process then."""
    model, x = nn.Linear(100, 100).eval(), torch.randn(2, 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*allow larger files"):
            write(model, tmp_path / "net.file", example_inputs=x)
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
    needs = {"example_inputs": {"idx": x[:2], "targets": y[:2]}}
    asked = osscar.export_pt2(smaller, tmp_path / "loss.pt2", **needs)
    assert list(asked.inputs) == ["idx", "targets"]
