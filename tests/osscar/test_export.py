"""Files of ONNX and torch.export: what an engine computes from them is compared first."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

import osscar
from osscar.base.errors import (
    DataError,
    EquivalenceError,
    MissingDependency,
    ModelError,
    OutputError,
)
from osscar.export import onnx as writer
from osscar.export.open_program import OpenProgram
from osscar.models.user_code import build
from osscar.network.hooks import computable_mixtures
from tests.docs.json_schema import missing, undescribed
from tests.osscar.families import tiny, tokens
from tests.osscar.runs import Runs

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


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def run_file(file: Path, **inputs: Tensor) -> list[Tensor]:
    session = runtime.InferenceSession(file)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(np.asarray(array)) for array in found]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a net."""
    out = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return osscar.export_onnx(net(), out, example_inputs=torch.randn(2, 4)).path


class FlipsLargeBatches(nn.Module):
    """Does something else for more than four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(torch.relu(self.enter(x)))
        return y.flip(1) if x.shape[0] > 4 else y


def test_a_size_is_open_only_as_far_as_the_code_does_the_same(tmp_path: Path) -> None:
    model, x = FlipsLargeBatches().eval(), torch.randn(6, 4)
    file = osscar.export_onnx(model, tmp_path / "net.onnx", example_inputs=x[:2]).path
    torch.testing.assert_close(run_file(file, x=x[:2])[0], model(x[:2]))
    with pytest.raises(Exception, match="dimension"):
        run_file(file, x=x)


# ---- models of each sort -----------------------------------------------------------------


@pytest.mark.slow
def test_a_language_model_whose_layers_differ(run: Any, tmp_path: Path) -> None:
    dense, groups = tiny("llama-gqa"), {"model.layers.0.mlp.neurons": 12}
    result = osscar.prune(dense, tokens(), backend="magnitude", device="cpu", groups=groups)
    result.save(tmp_path / "small")
    status, out, err = run(
        "export", tmp_path / "small", "--format", "onnx", "--json", tmp_path / "out.json"
    )
    assert status == 0, err
    assert "it takes input_ids int64 (batch, length)" in out
    assert "it returns logits float32 (batch, length, 97)" in out
    document = json.loads((tmp_path / "out.json").read_text())
    assert undescribed(document) == missing(document) == set()
    assert document["inputs"] == {"input_ids": "int64 (batch, length)"}
    for shape in ((1, 1), (3, 30)):
        ids = tokens(*shape)
        with torch.no_grad():
            expected = result.model(ids).logits
        (found,) = run_file(tmp_path / "small.onnx", input_ids=ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_code_of_ones_own_with_several_inputs_and_outputs(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", tokens=np.arange(48).reshape(8, 6) % 9, features=np.ones((8, 4), "f"))
    asked = ("--calibration", "data.npz", "--neurons", "0.5", "--backend", "magnitude")
    assert run("prune", "mine.py:two", *asked, "--out", "small")[0] == 0
    for form in EITHER:
        assert run("export", "small", "--format", form)[0] == 2  # it is not known what builds it
        status, _, err = run("export", "small", "--format", form, "--dense", "mine.py:two")
        assert status == 0, err
    again = osscar.load("small", dense=build("mine.py:two")[0])
    x = {"tokens": torch.ones(5, 6).long(), "features": torch.randn(5, 4)}
    found = run_file(Path("small.onnx"), **x)
    assert all(map(torch.allclose, again(**x).values(), found))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        *("data.npz", "mine.py", "small.onnx", "small.pt2")
    ]


def test_images_of_the_size_that_a_config_says(tmp_path: Path, runs: Runs) -> None:
    model = runs["vit"].result.model
    osscar.save(model, tmp_path / "vit")
    found = osscar.export_pt2(tmp_path / "vit")
    assert found.inputs == {"pixel_values": "float32 (batch, 3, 32, 32)"}
    images, program = torch.randn(5, 3, 32, 32), torch.export.load(found.path).module()
    assert torch.allclose(program(pixel_values=images).logits, model(images).logits, atol=1e-5)


def test_images_of_the_size_that_a_model_was_pruned_with(
    tmp_path: Path, run: Any, runs: Runs
) -> None:
    model = runs["resnet"].dense
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(DataError, match=r"it is not known what this ResNetFor.* takes.*inputs="):
        osscar.export_onnx(tmp_path / "dense")
    runs["resnet"].result.save(tmp_path / "small")
    found = osscar.export_pt2(tmp_path / "small")
    assert found.inputs == {"pixel_values": "float32 (batch, 3, 24, 24)"}
    np.savez(tmp_path / "x.npz", pixel_values=np.ones((1, 3, 20, 28), "f"))
    asked = ("--format", "pt2", "--inputs", tmp_path / "x.npz")
    status, _, err = run("export", tmp_path / "dense", *asked, "--out", tmp_path / "dense.pt2")
    assert status == 0, err
    program = torch.export.load(tmp_path / "dense.pt2").module()
    x = torch.randn(3, 3, 20, 28)
    assert torch.allclose(program(pixel_values=x).logits, model(x).logits, atol=1e-5)


@pytest.mark.slow
def test_an_exported_program(tmp_path: Path) -> None:
    dense = tiny("gpt2", layers=1)
    result = osscar.prune(
        dense, tokens(), backend="magnitude", device="cpu", heads="1/2", form="exported"
    )
    found = osscar.export_onnx(result.save(tmp_path / "small").path)
    assert found.inputs["input_ids"] == "int64 (batch, length)"
    ids = tokens(3, 9)
    assert torch.allclose(
        run_file(found.path, input_ids=ids)[0], result.model(ids).logits, atol=1e-4
    )


@pytest.mark.slow
def test_a_mask_beside_the_tokens(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_a_mixture_of_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        **{"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4},
    )
    model = MixtralForCausalLM(config).eval()
    kernel = config._experts_implementation
    found = osscar.export_onnx(model, tmp_path / "mixture.onnx")
    assert found.inputs["input_ids"] == "int64 (batch, length)"
    assert config._experts_implementation == kernel


# ---- sizes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_length_that_is_a_number_in_the_file_is_not_called_open(tmp_path: Path) -> None:
    """torch writes the length down in a loop over the tokens, and still calls it open."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1)
    found = osscar.export_onnx(MambaForCausalLM(config).eval(), tmp_path / "mamba.onnx")
    assert found.inputs["input_ids"] == "int64 (batch, 12)"


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
def test_sizes_that_an_engine_gets_wrong_are_closed(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(), torch.randn(2, 4)
    original = osscar.export.open_program._prove

    def only_two(expected: Any, found: Any, names: Any) -> None:
        original(expected, [one + (len(one) != 2) for one in found], names)

    monkeypatch.setattr("osscar.export.open_program._prove", only_two)
    found = EITHER[form](model, tmp_path / f"net.{form}", example_inputs=x)
    assert found.inputs["input"] == "float32 (2, 4)"


def test_weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 8)
    model, x = nn.Linear(64, 64).eval(), torch.randn(2, 64)
    found = osscar.export_onnx(model, tmp_path / "net.onnx", example_inputs=x)
    assert found.weights == tmp_path / "net.onnx.data"
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) > 64 * 64 * 4
    (tmp_path / "elsewhere").mkdir()
    for path in (found.path, found.weights):
        path.rename(tmp_path / "elsewhere" / path.name)
    (again,) = run_file(tmp_path / "elsewhere" / "net.onnx", input=x)
    assert torch.allclose(again, model(x), atol=1e-5)
    (tmp_path / "net.onnx.data").write_text("mine")
    with pytest.raises(OutputError, match=r"net\.onnx\.data is there already"):
        osscar.export_onnx(model, tmp_path / "net.onnx", example_inputs=x)


@pytest.mark.slow
def test_weights_beside_a_file_leave_with_it_if_it_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threshold = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    model, x, out = nn.Linear(64, 64).eval(), torch.randn(2, 64), tmp_path / "net.onnx"
    with monkeypatch.context() as patched:
        patched.setattr(threshold, 8)
        osscar.export_onnx(model, out, example_inputs=x)
    osscar.export_onnx(model, out, example_inputs=x, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    session, beside = writer._session, tmp_path / "net.onnx.data"

    def while_written(runtime: Any, file: Path) -> Any:
        beside.write_text("mine")
        return session(runtime, file)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_session", while_written)
        osscar.export_onnx(model, out, example_inputs=x, overwrite=True)
    assert beside.read_text() == "mine"
    with pytest.raises(OutputError, match=r"net\.onnx\.data is there already"):
        osscar.export_onnx(model, out, example_inputs=x, overwrite=True)
    assert beside.read_text() == "mine"


# ---- bad input ---------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_not_kept(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_write", lambda traced, names, path: shutil.copy(written, path))
    x = torch.randn(2, 4)
    out = tmp_path / "net.onnx"
    with pytest.raises(EquivalenceError, match=r"ONNX Runtime computes.*differs.* by \d\.\d+e"):
        osscar.export_onnx(net(seed=1), out, example_inputs=x)
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"the one before")
    with pytest.raises(EquivalenceError):
        osscar.export_onnx(net(seed=1), out, example_inputs=x, overwrite=True)
    assert out.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [out]
    assert osscar.export_onnx(net(), out, example_inputs=x, overwrite=True).path == out


class Singular(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(super().forward(x))


class Decides(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Returns(nn.Linear):
    """Puts out what a function makes of what it reads."""

    def __init__(self, makes: Any) -> None:
        super().__init__(4, 3)
        self.makes = makes

    def forward(self, x: Tensor) -> Any:
        return self.makes(super().forward(x))


@pytest.mark.parametrize(
    ("makes", "names"),
    [
        (lambda y: {"x": y, "output_x": y, "b": None}, ["output_x", "output_output_x"]),
        (lambda y: {"a": {"b": y}, "a.b": y}, ["a.b", "output_a.b"]),
    ],
)
def test_outputs_that_are_called_like_others_get_names_of_their_own(
    makes: Any, names: list[str]
) -> None:
    model = Returns(makes).eval()
    opened = OpenProgram(model, {"x": torch.randn(2, 4)}, computable_mixtures)
    assert opened.output_names == names


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (Returns(lambda y: (y, 3)), torch.randn(2, 4), ModelError, r"puts out 3 \(int\), which"),
        (Returns(lambda y: {"a": y, "b": "c"}), torch.randn(2, 4), ModelError, r"out 'c' \(str\)"),
        (net().double(), torch.randn(2, 4), ModelError, r"float64.*model\.float\(\)"),
        (torch.jit.trace(net(), torch.randn(2, 4)), torch.randn(2, 4), ModelError, "TorchScript"),
        (nn.DataParallel(net()), torch.randn(2, 4), ModelError, r"wraps.* as model\.module"),
        (Singular(4, 3), torch.randn(2, 4), ModelError, r"cannot write.*svd"),
        (Decides(4, 3), torch.randn(2, 4), ModelError, "cannot follow the model"),
        (net(), None, DataError, "it is not known what this Sequential takes"),
        (net(), {"x": torch.randn(2, 4)}, DataError, "takes no 'x'"),
        (net(), torch.randn(2, 5), ModelError, r"fails on.*\(input \(2, 5\)\): .*inputs="),
        (net(), "nowhere.npz", osscar.OsscarError, "there is no .npz"),
        (nn.Linear(4, 3).half(), torch.randn(2, 4), ModelError, r"float16.*model\.float\(\)"),
        (nn.ReLU(), torch.randn(2, 4), ModelError, "has no parameters"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(
    model: nn.Module, given: Any, error: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        osscar.export_onnx(model.eval(), tmp_path / "net.onnx", example_inputs=given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", EITHER.values(), ids=EITHER)
def test_a_disk_that_refuses_is_named_and_nothing_is_left(write: Any, tmp_path: Path) -> None:
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


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match=r"'onnxscript'; install.*'osscar\[onnx\]'"):
        osscar.export_onnx(net(), tmp_path / "net.onnx", example_inputs=torch.randn(2, 4))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "tflite"), "--format is 'tflite'; give gguf, onnx or pt2"),
        (("--format", "onnx", "--dtype", "f16"), "--dtype is for gguf"),
        (("--format", "gguf", "--inputs", "x.npz"), "--inputs is for onnx and pt2"),
        (("--format", "gguf", "--dense", "a.py:b"), "--dense is for onnx and pt2"),
        (("--format", "onnx"), "no directory with a checkpoint"),
        (("--format", "onnx", "--dense", "net"), "'net' names no code; give module:name or path"),
    ],
)
def test_options_that_do_not_go_together(run: Any, words: Any, message: str) -> None:
    for name in ("nowhere", "x" * 300):
        status, _, err = run("export", name, *words)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
