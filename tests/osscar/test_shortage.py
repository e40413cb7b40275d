"""A device without memory left: what there was none for, and which option helps."""

import re

import pytest
import torch

import osscar
from osscar.base.errors import ModelError, NoMemoryError
from osscar.base.memory import attempt, is_shortage
from osscar.run import chain
from osscar.walk import walk
from solvers.heuristics import baselines
from tests.osscar.families import tiny, tokens

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


def failing(*args, **kwargs):
    raise OF_CUDA


def refusal(model):
    with pytest.raises(NoMemoryError, match="there is no memory for") as refused:
        osscar.prune(model, tokens(), neurons=0.5, backend="greedy", batch_size=3)
    return str(refused.value)


def test_an_attempt_catches_all_but_a_shortage_an_interrupt_and_what_is_to_pass():
    class PanicException(BaseException):
        """What libraries in Rust raise."""

    for error in (ValueError("no"), SystemError(), PanicException()):
        with attempt(ModelError) as tried:
            raise error
        assert tried.failed
        assert tried.error is error
    with attempt() as tried:
        pass
    assert not tried.failed
    passing = OF_CUDA, OF_CPU, OF_LIBRARY, MemoryError(), KeyboardInterrupt(), ModelError("mine")
    for error in passing:
        with pytest.raises(type(error)), attempt(ModelError):
            raise error


@pytest.fixture
def model():
    return tiny("opt", layers=1)


def test_a_batch_is_named_with_the_module(model):
    for error in (OF_CUDA, OF_CPU, OF_LIBRARY, MemoryError()):
        assert is_shortage(error)

    def full(module, args):
        if len(args[0]) == 3 or args[0].shape[0] == 3 * tokens().shape[1]:  # a whole batch
            raise OF_CUDA

    model.model.decoder.layers[0].fc1.register_forward_pre_hook(full)
    said = refusal(model)
    assert "calibration batch 0 in 'model.decoder.layers.0.fc1'" in said
    for way in ("smaller batches", "fewer samples", "--max-memory"):
        assert way in said


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (
            walk,
            "GramAccumulator",
            r"Gram matrices of '.*layers\.0\.neurons' with 40 inputs.*--skip",
        ),
        (baselines, "eliminate", r"problem of '.*layers\.0\.neurons' with 40 inputs.*--device cpu"),
        (chain, "shrunk", "OPTForCausalLM, of which pruning makes copies"),
    ],
)
def test_what_there_was_no_memory_for_is_named(owner, name, words, model, monkeypatch):
    monkeypatch.setattr(owner, name, failing)
    assert re.search(words, refusal(model))
