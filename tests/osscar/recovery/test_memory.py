"""The way to train that fits into memory, and gradient checkpointing."""

from __future__ import annotations

import dataclasses
import gc
import sys

import pytest
import torch
from torch import Tensor, nn

import osscar
from osscar.allocation.divergence import Likeness, Reference
from osscar.base.errors import NoMemoryError, OptionError
from osscar.base.memory import give_back, resident_memory
from osscar.network.modules import copied
from osscar.recovery.checkpointing import blocks, checkpointing
from osscar.recovery.memory import way_that_fits
from osscar.recovery.recover import recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.training import Training
from tests.osscar.networks import images, small_net
from tests.osscar.recovery.packages import needs_peft
from tests.osscar.recovery.perturbed import bytes_of, perturbed

# ---- ways that need less -----------------------------------------------------------------


def way(space: int, **asked: object) -> RecoveryRequest:
    """Choose among steps that need 4 bytes a sample, and 100 of weights or 10 of adapters."""

    def try_step(way: RecoveryRequest) -> None:
        passes = 4 * (way.micro_batch_size or 0) // (2 if way.checkpointing else 1)
        if passes + (100 if way.lora is None else 10) > space:
            raise MemoryError(f"of {space} bytes")

    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)))
    request = RecoveryRequest(**asked)
    at_once = request.micro_batch_size or 8
    return way_that_fits(request, model, at_once, torch.device("cpu"), try_step)


@pytest.mark.parametrize(
    ("space", "micro", "checkpointed", "lora"),
    [
        (132, 8, False, None),
        (131, 4, False, None),
        (104, 1, False, None),
        (103, 1, True, None),
        pytest.param(101, 1, True, 16, marks=needs_peft),
    ],
)
def test_the_first_way_that_fits_is_taken(space, micro, checkpointed, lora):
    found = way(space)
    assert (found.micro_batch_size, found.checkpointing, found.lora) == (micro, checkpointed, lora)


@needs_peft
def test_what_is_asked_for_stays():
    found = way(103, micro_batch_size=8)
    assert (found.micro_batch_size, found.checkpointing, found.lora) == (8, True, 16)
    with pytest.raises(NoMemoryError, match=r"with micro-batches of 8, checkpointing, .*: of 11 b"):
        way(11, micro_batch_size=8)


def test_what_nobody_asked_for_may_not_work_and_all_else_is_raised():
    tried = []

    def try_step(way: RecoveryRequest) -> None:
        tried.append(way)
        if way.checkpointing:
            raise OptionError("a block writes to what it is given")
        raise MemoryError

    model, cpu = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())), "cpu"
    with pytest.raises(NoMemoryError, match="Sequential, with micro-batches of 1: "):
        way_that_fits(RecoveryRequest(), model, 2, torch.device(cpu), try_step)
    assert [one.checkpointing for one in tried] == [False, False, True]
    with pytest.raises(OptionError, match="a block writes"):
        way_that_fits(RecoveryRequest(checkpointing=True), model, 2, torch.device(cpu), try_step)


class Wide(nn.Module):
    """Makes 20 MB for each sample between small matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 1), nn.Linear(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).expand(-1, 5 * 10**6).sigmoid().mean(1, keepdim=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has in memory")
def test_a_limit_of_the_process_is_kept_and_what_was_chosen_is_said():
    """A step of 8 samples makes 500 MB at least, and of one 60 MB."""
    torch.manual_seed(0)
    dense, data, said = Wide(), torch.randn(24, 8), list[str]()
    gc.collect()
    give_back()
    request = RecoveryRequest(steps=1, batch_size=8, learning_rate=1e-3, device="cpu")
    limited = dataclasses.replace(request, max_memory=resident_memory() + 250 * 10**6)
    result = recover_as_asked(perturbed(dense), dense, data, limited, tell=said.append)
    chosen = result.chosen["micro_batch_size"]
    assert chosen in (1, 2, 4)
    assert said == [f"memory: there is none for more than micro-batches of {chosen}"]
    assert result.request == limited
    given = dataclasses.replace(request, micro_batch_size=chosen)
    again = recover_as_asked(perturbed(dense), dense, data, given, tell=said.append)
    assert bytes_of(again.model) == bytes_of(result.model)  # the steps that were tried left nothing
    assert len(said) == 1
    with pytest.raises(NoMemoryError, match=r"micro-batches of 1.*: it takes more than .* in all"):
        recover_as_asked(dense, dense, data, dataclasses.replace(request, max_memory="100MB"))


def test_held_out_samples_run_as_many_at_once_as_fit(monkeypatch):
    dense, data = small_net(), images(24)
    sizes, compared, try_step = set[int](), Reference.compared, Training.try_steps

    def watched(self: Reference, model: nn.Module) -> Likeness:
        sizes.update(map(self.distance.inputs.count, self.batches))
        return compared(self, model)

    def tried(self: Training) -> None:
        if (self.way.micro_batch_size or 0) > 2:
            raise MemoryError
        try_step(self)

    monkeypatch.setattr(Reference, "compared", watched)
    monkeypatch.setattr(Training, "try_steps", tried)
    asked = {"steps": 1, "learning_rate": 1e-4, "held_out": 8, "batch_size": 8, "device": "cpu"}
    osscar.recover(perturbed(dense), dense, data, **asked)
    assert sizes == {2}


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
