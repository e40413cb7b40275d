"""What a recovery needs in memory, the ways that need less, and gradient checkpointing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import osscar
from osscar.base.errors import NoMemoryError, OptionError
from osscar.network.modules import copied
from osscar.offload.device_memory import DeviceMemory
from osscar.recovery import memory
from osscar.recovery.checkpointing import blocks, checkpointing
from osscar.recovery.memory import Memory, fitting
from osscar.recovery.recover import recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.target import HeldOut
from tests.osscar.networks import images, small_net
from tests.osscar.recovery.packages import needs_peft

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration positions:UserWarning")


@pytest.fixture(scope="module")
def smaller(dense: nn.Module, windows: Tensor) -> nn.Module:
    return osscar.prune(dense, windows, sparsity=0.3).model


@pytest.fixture
def told(dense: nn.Module, smaller: nn.Module, windows: Tensor) -> Callable[..., Memory]:
    def call(**asked: Any) -> Memory:
        heard = list[Memory]()
        request = RecoveryRequest(steps=1, learning_rate=1e-4, device="cpu", **asked)
        result = recover_as_asked(
            smaller, dense, windows, request, told=lambda memory, way: heard.append(memory)
        )
        assert heard == [result.memory]
        return result.memory

    return call


def size(*tensors: Tensor) -> int:
    return sum(one.nbytes for one in tensors)


# ---- what is needed ----------------------------------------------------------------------


def test_of_all_weights_there_are_a_copy_gradients_moments_and_the_best(told, smaller):
    found, all_of_them = told(), size(*smaller.parameters())
    assert found.weights == all_of_them + size(*smaller.buffers())
    assert (found.best, found.gradients, found.moments) == (
        all_of_them,
        all_of_them,
        2 * all_of_them,
    )
    assert found.shared == 0
    assert found.held_out == 2 * 16 * 64 * 4  # predictions of two windows


def test_what_is_not_trained_is_shared_where_pruning_has_left_it(told, smaller, dense):
    others = dict(dense.named_parameters())
    vectors = [one for one in smaller.parameters() if one.ndim <= 1]
    alike = [
        one
        for name, one in smaller.named_parameters()
        if one.ndim > 1 and torch.equal(one, others[name])
    ]
    assert alike
    found = told(train="norms")
    assert found.gradients == size(*vectors)
    assert found.shared == size(*alike)
    assert found.weights + found.shared == told().weights


@needs_peft
def test_passes_are_counted_alike_on_shapes_and_on_values(told, monkeypatch):
    on_shapes = told(lora=2).passes

    def refused() -> None:
        raise RuntimeError("branches on values")

    monkeypatch.setattr(memory, "on_shapes", refused)
    assert told(lora=2).passes == pytest.approx(on_shapes, rel=0.05)


def test_tensors_are_counted_as_long_as_they_live():

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 1000))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    live = memory._Live()
    model, x = Product(), torch.ones(4, 8)
    with live:
        one = model(x)
        two = one + 1
        del one
        three = two * 2
        del two
        four = three.view(-1)[:10]
    assert live.most == 2 * 4 * 4000
    assert live._now == 4 * 4000
    del three, four
    gc.collect()
    assert live._now == 0


def test_more_at_once_need_more_and_checkpointing_less(told):
    four, one = told(micro_batch_size=4), told(micro_batch_size=1)
    assert 3 * one.passes < four.passes < 4.2 * one.passes
    assert told(micro_batch_size=4, checkpointing=True).passes < 0.9 * four.passes


# ---- ways that need less -----------------------------------------------------------------


def ways(space: int | None, **asked: Any) -> RecoveryRequest:
    """Choose among trainings that need 4 bytes a sample, and 100 of weights or 10 of adapters."""

    def needs(way: RecoveryRequest) -> Memory:
        passes = 4 * (way.micro_batch_size or 0) // (2 if way.checkpointing else 1)
        weights = 100 if way.lora is None else 10
        return Memory(weights, 0, 0, 0, 0, passes, 0, 0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "needed", needs)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)))
        return fitting(
            RecoveryRequest(**asked),
            model,
            asked.get("micro_batch_size", 8),
            space,
            lambda way: way,
        )[0]


@pytest.mark.parametrize(
    ("space", "micro", "checkpointed", "lora"),
    [
        (None, 8, False, None),
        (132, 8, False, None),
        (131, 4, False, None),
        (104, 1, False, None),
        (103, 1, True, None),
        pytest.param(101, 1, True, 16, marks=needs_peft),
    ],
)
def test_the_first_way_that_fits_is_taken(space, micro, checkpointed, lora):
    way = ways(space)
    assert (way.micro_batch_size, way.checkpointing, way.lora) == (micro, checkpointed, lora)


@needs_peft
def test_what_is_asked_for_stays():
    way = ways(103, micro_batch_size=8)
    assert (way.micro_batch_size, way.checkpointing, way.lora) == (8, True, 16)
    with pytest.raises(NoMemoryError):
        ways(101, train="norms")


@needs_peft
def test_a_limit_that_nothing_fits_is_an_error_that_tells_the_least():
    with pytest.raises(NoMemoryError, match=r"needs 132B .* least 12B \(micro-batches of 1, "):
        ways(11)


def test_held_out_samples_run_as_many_at_once_as_fit(monkeypatch):
    dense, data = small_net(), images(24)
    smaller = osscar.prune(dense, data, backend="magnitude", channels=0.5).model
    sizes, distance = set[int](), HeldOut.distance

    def watched(self: HeldOut, model: nn.Module) -> float | None:
        sizes.update(map(self.target.inputs.count, self.batches))
        return distance(self, model)

    monkeypatch.setattr(HeldOut, "distance", watched)
    monkeypatch.setattr(
        memory, "needed", lambda training: Memory(0, 0, 0, 0, 0, training.at_once, 0, 0)
    )
    monkeypatch.setattr(DeviceMemory, "held", lambda self: 0)
    asked = {"steps": 1, "learning_rate": 1e-4, "held_out": 8, "batch_size": 8, "device": "cpu"}
    recover_as_asked(smaller, dense, data, RecoveryRequest(**asked, max_memory=2))
    assert sizes == {2}


@pytest.mark.slow
@needs_peft
def test_a_limit_is_kept_and_said(dense, smaller, windows, told, monkeypatch):
    usual, least = told().total, told(checkpointing=True, lora=16).total
    monkeypatch.setattr(DeviceMemory, "held", lambda self: 0)
    request = RecoveryRequest(steps=1, learning_rate=1e-4, device="cpu", max_memory=usual - 1)
    result = recover_as_asked(smaller, dense, windows, request)
    assert result.memory.total < usual
    assert result.request == request
    assert result.document()["chosen"]["checkpointing"] is True
    assert result.document()["memory_bytes"] == result.memory.total
    with pytest.raises(NoMemoryError, match="besides what the process has"):
        recover_as_asked(smaller, dense, windows, replace(request, max_memory=least // 2))


def test_a_limit_is_a_size():
    with pytest.raises(OptionError, match="no size of memory"):
        RecoveryRequest(max_memory="much")
    assert type(RecoveryRequest(max_memory=np.int64(10**9)).to_json()["max_memory"]) is int
    assert RecoveryRequest(max_memory="1GB").max_memory == "1GB"


# ---- gradient checkpointing --------------------------------------------------------------


@pytest.mark.parametrize("which", ["transformers", "convolutions"])
def test_gradients_are_the_same_and_no_trace_is_left(which, dense, windows):
    model, x = (dense, windows[:2]) if which == "transformers" else (small_net(), images(4))
    own, other = copied(model), copied(model)
    assert len(blocks(own)) == 2
    kept = [vars(one).keys() for one in own.modules()]
    for one, again in ((own, True), (other, False)):
        if again:
            with checkpointing(one):
                out = one(x)
        else:
            out = one(x)
        out = out if isinstance(out, Tensor) else out.logits
        out.square().mean().backward()
    assert [vars(one).keys() for one in own.modules()] == kept
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7)


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2))


def test_a_block_that_writes_to_its_input_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), Overwrites(), Overwrites())
    with (
        pytest.raises(OptionError, match="Overwrites writes to what it is given"),
        checkpointing(model),
    ):
        model(torch.ones(2, 4))
    assert "forward" not in vars(model[1])


def test_a_model_without_blocks_is_refused():
    with (
        pytest.raises(OptionError, match="Linear repeats no blocks"),
        checkpointing(nn.Linear(2, 2)),
    ):
        pass
