"""Micro-batches that fit into memory, number formats, and checkpointed activations."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from osscar.base.errors import DataError, NoMemoryError, OptionError
from osscar.distance.distance import Likeness, Reference
from osscar.network.modules import copied
from osscar.recovery import recover as module
from osscar.recovery.recover import Recovery, recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.training import Training
from osscar.recovery.weights import blocks, checkpointing
from tests.osscar.networks import images, small_net
from tests.osscar.recovery.perturbed import numbers, perturbed

# ---- micro-batches that fit --------------------------------------------------------------


def test_micro_batches_are_halved_until_a_step_fits_and_few_run_at_each_check(monkeypatch):
    dense, data = small_net(), images(90)
    sizes, compared, try_step = list[list[int]](), Reference.compared, Training.try_step
    said: list[str] = []

    def watched(self: Reference, model: nn.Module) -> Likeness:
        sizes.append([*map(self.distance.inputs.count, self.batches)])
        return compared(self, model)

    def tried(self: Training) -> None:
        if self.at_once > 8:
            raise MemoryError
        try_step(self)

    monkeypatch.setattr(Reference, "compared", watched)
    monkeypatch.setattr(Training, "try_step", tried)
    asked = {"steps": 2, "learning_rate": 1e-4, "held_out": 42, "batch_size": 32, "device": "cpu"}
    recovery = recover_as_asked(
        perturbed(dense), dense, data, RecoveryRequest(**asked), tell=said.append
    )
    assert said == ["memory: trains with micro-batches of 8, as more does not fit"]
    assert recovery.chosen["micro_batch_size"] == 8
    assert recovery.kept > 0
    all_of_them, few = [8] * 4 + [8, 2], [8] * 4
    assert sizes == [all_of_them, few, few, few, all_of_them]


@pytest.mark.parametrize("asked", [{}, {"micro_batch_size": 4}, {"checkpointing": True}])
def test_what_trains_is_never_chosen_by_memory_and_the_error_says_to_pass_it(asked):
    dense = small_net()
    request = RecoveryRequest(steps=1, batch_size=8, max_memory="1MB", device="cpu", **asked)
    size = asked.get("micro_batch_size", 1)
    with pytest.raises(
        NoMemoryError, match=rf"micro-batches of {size} \(it takes more than 0.01GB.*lora=16"
    ):
        recover_as_asked(perturbed(dense), dense, images(24), request)


# ---- number formats ----------------------------------------------------------------------


@pytest.mark.parametrize("multiplies", ["bf16", "no"])
def test_bfloat16_is_the_default_where_it_is_multiplied_and_runs(multiplies, monkeypatch):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: multiplies == "bf16")
    seen, code = set(), {"refuses": False}

    class Seen(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            found = super().forward(input)
            if found.requires_grad:
                seen.add(found.dtype)
            if code["refuses"] and found.dtype is torch.bfloat16:
                raise RuntimeError("expected m1 and m2 to have the same dtype")
            return found

    dense = nn.Sequential(Seen(6, 3))

    def recovered(asked: str | None) -> Recovery:
        seen.clear()
        request = RecoveryRequest(steps=1, device="cpu", mixed_precision=asked)
        return recover_as_asked(perturbed(dense), dense, numbers(), request)

    for refuses, asked, due in (
        *((False, None, multiplies), (True, None, "no"), (False, "no", "no")),
        (False, "bf16", "bf16"),
    ):
        code["refuses"] = refuses
        recovery = recovered(asked)
        assert recovery.chosen["mixed_precision"] == due
        assert seen == {torch.bfloat16 if due == "bf16" else torch.float32}
    code["refuses"] = True
    with pytest.raises(DataError, match="expected m1 and m2"):
        recovered("bf16")


# ---- checkpointed activations ------------------------------------------------------------


@pytest.mark.parametrize("which", ["transformers", "convolutions"])
def test_gradients_are_the_same_and_no_trace_is_left(which, dense, windows):
    model, x = (dense, windows[:2]) if which == "transformers" else (small_net(), images(4))
    own, other = copied(model), copied(model)
    assert len(blocks(own)) == 2
    kept = [vars(one).keys() for one in own.modules()]
    for one, around in ((own, checkpointing(own)), (other, nullcontext())):
        with around:
            out = one(x)
        getattr(out, "logits", out).square().mean().backward()
    assert [vars(one).keys() for one in own.modules()] == kept
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7)


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2))


def test_a_block_that_writes_to_its_input_is_refused_if_it_was_asked_for():
    model, data = nn.Sequential(nn.Linear(4, 4), Overwrites(), Overwrites()), torch.randn(24, 4)
    request = RecoveryRequest(steps=1, checkpointing=True, mixed_precision="no", device="cpu")
    with pytest.raises(OptionError, match="Overwrites writes to its inputs"):
        recover_as_asked(model, model, data, request)
