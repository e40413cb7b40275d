"""A device without memory left: what there was none for, and which option helps."""

import re
import sys

import pytest
import torch

import osscar
from osscar.base.errors import NoMemoryError
from osscar.cli import main
from osscar.models import pretrained
from osscar.offload.places import Slice
from osscar.run import chain
from osscar.walk import walk
from solvers.heuristics import greedy
from tests.osscar.families import tiny, tokens
from tests.osscar.test_streamed import written

OF_CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 6.13 GiB. GPU 0 has a total capacity of 23.5 GiB"
)
OF_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 6576668672 bytes. Error code 12 (Cannot allocate memory)"
)
OF_LIBRARY = RuntimeError(
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
)
each = pytest.mark.parametrize("error", [OF_CUDA, OF_CPU, OF_LIBRARY, MemoryError()], ids=str)
one = pytest.mark.parametrize("error", [OF_CUDA], ids=str)


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def pruned(model):
    return osscar.prune(model, tokens(), neurons=0.5, backend="greedy", batch_size=3)


def refusal(model):
    with pytest.raises(NoMemoryError, match="there is no memory for") as refused:
        pruned(model)
    return str(refused.value)


@each
def test_a_batch_is_named_with_the_module(error):
    model = tiny("opt")

    def full(module, args):
        if len(args[0]) == 3 or args[0].shape[0] == 3 * tokens().shape[1]:  # a whole batch
            raise error

    model.model.decoder.layers[1].fc1.register_forward_pre_hook(full)
    said = refusal(model)
    assert "calibration batch 0 in 'model.decoder.layers.1.fc1'" in said
    assert all(way in said for way in ("smaller batches", "fewer samples", "--max-memory")), said


@one
def test_gram_matrices_are_named_with_their_inputs(error, monkeypatch):
    monkeypatch.setattr(walk, "GramAccumulator", failing(error))
    said = refusal(tiny("opt"))
    assert "Gram matrices of 'model.decoder.layers.0.neurons' with 40 inputs" in said
    assert "skip=" in said


@one
def test_a_problem_is_named_with_its_inputs(error, monkeypatch):
    monkeypatch.setattr(greedy, "eliminate", failing(error))
    said = refusal(tiny("opt"))
    assert "the problem of 'model.decoder.layers.0.neurons' with 40 inputs" in said
    assert "device=cpu" in said


@one
def test_a_weight_that_lies_on_disk_is_named(error, monkeypatch, tmp_path):
    model = osscar.load_model(written(tmp_path, "opt"), device="cpu", max_memory="64GB").model
    monkeypatch.setattr(Slice, "read", failing(error))
    said = refusal(model)
    assert re.search(r"'[\w.]+\.weight' on cpu \([\d.]+K?B, read from disk\)", said)
    assert "a smaller max_memory=" in said


@one
def test_elsewhere_the_model_is_named(error, monkeypatch):
    monkeypatch.setattr(chain, "shrunk", failing(error))
    assert "OPTForCausalLM, of which pruning makes copies" in refusal(tiny("opt"))


ROOM_FOR = """
from pathlib import Path
import torch

def build():
    built = Path(__file__ + ".built")
    if built.exists() or {none}:
        raise MemoryError
    built.touch()
    return torch.nn.Linear(2, 2), torch.zeros(2, 2)
"""


def test_a_model_of_ones_own_is_named(tmp_path):
    for name, none in (("none", True), ("one", False)):
        (tmp_path / f"{name}.py").write_text(ROOM_FOR.format(none=none))
    with pytest.raises(NoMemoryError, match=r"no memory for the weights of .*none.py:build"):
        osscar.load_model(f"{tmp_path / 'none.py'}:build")
    # It is called twice, to tell whether it draws its weights.
    with pytest.warns(UserWarning, match="cannot be told, since it cannot be called again"):
        osscar.load_model(f"{tmp_path / 'one.py'}:build", device="cpu")


@one
def test_the_command_ends_in_one_line(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        pretrained.transformers.AutoModelForCausalLM, "from_pretrained", failing(error)
    )
    command = ["osscar", "prune", "demo", "--neurons", "0.5", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "there is no memory for the weights of demo" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
