"""What is set up before a recovery trains, in whatever way that fits into the memory there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from osscar.base.devices import resolve_device
from osscar.base.errors import NonFiniteError, OptionError
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import Batch, ModelInputs, as_inputs
from osscar.data.images import ImageSet
from osscar.network.model_state import ModelState
from osscar.network.modules import copied, device_of
from osscar.proof.program.program import ProgramModule
from osscar.recovery.memory import CHOSEN, Memory, fitting, needed, room
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import shifted, split, step_size
from osscar.recovery.target import HeldOut, Target, in_batches
from osscar.recovery.training import Training
from osscar.recovery.weights import formats, shared_weights, trainable


@dataclass(frozen=True, eq=False)
class Setup:
    """What all ways to train a smaller model towards a dense one have in common."""

    model: nn.Module
    teacher: nn.Module
    """The dense model, on the device of the training."""
    inputs: ModelInputs = field(repr=False)
    shifts: bool
    """Whether samples are mirrored and shifted."""
    samples: Sequence[Batch] = field(repr=False)
    deciding: Sequence[Batch] = field(repr=False)
    target: Target
    at_once: int
    """Samples of a pass, where no way asks for others."""
    request: RecoveryRequest
    ranks: Ranks

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dense: nn.Module,
        data: Any,
        request: RecoveryRequest,
        ranks: Ranks = ALONE,
    ) -> Setup:
        """Split the samples, and look at what the dense model puts out."""
        images = isinstance(data, ImageSet)
        if request.augment == "flip-shift" and not images:
            raise OptionError("augment is 'flip-shift', and the data are no images; leave it away")
        inputs = as_inputs(dense, data)
        if not isinstance(model, ProgramModule):  # which cannot be asked for a vocabulary
            as_inputs(model, data)
        device = torch.empty(0, device=resolve_device(request.device)).device  # with its number
        teacher = dense if device_of(dense) == device else copied(dense).to(device)
        samples, deciding = split(inputs, teacher, request)
        # In float32 a CPU is no faster with several windows at once than with one after the other,
        # and takes more memory.
        one_by_one = inputs.tokens and device.type == "cpu" and request.mixed_precision == "no"
        usual = 1 if one_by_one else step_size(inputs, len(samples), request)
        at_once = 1 if inputs.apart else request.micro_batch_size or usual
        target = Target.of(teacher, inputs, in_batches(deciding, at_once), request.loss)
        shifts = images and request.augment != "none"
        return cls(
            *(model, teacher, inputs, shifts, samples, deciding, target, at_once, request, ranks)
        )

    @property
    def device(self) -> torch.device:
        """Where both models are trained."""
        return device_of(self.teacher)

    def chosen(self, before: Mapping[str, Any] | None) -> tuple[RecoveryRequest, Memory]:
        """Return the way to train and what it needs, on all ranks as the first decides.

        It is the one that was chosen `before`, whatever is free by now, so that a run which goes on
        ends with the same bytes.
        """

        def decided() -> tuple[dict[str, Any], Memory]:
            if before is not None:
                known: dict[str, Any] = {name: before.get(name) for name in CHOSEN}
                return known, needed(self.training(replace(self.request, **known)))
            space = room(self.device, self.request.max_memory)
            way, memory = fitting(self.request, self.model, self.at_once, space, self.training)
            return {name: getattr(way, name) for name in CHOSEN}, memory

        changed, memory = self.ranks.broadcast("the way to train", decided)
        return replace(self.request, **changed), memory

    def training(self, way: RecoveryRequest) -> Training:
        """Set up a training of a copy of the model."""
        together, request = way.micro_batch_size or self.at_once, self.request
        work = trainable(self.model, self.teacher, self._alike, self.device, way)
        state = ModelState(work)
        with state.watching():
            first = in_batches(self.deciding[:together], together)[0]
            self.target.check_alike(work, self.teacher, first)
        state.put_back()
        return Training(
            model=work,
            state=state,
            formats=formats(work, self.model),
            dense=self.teacher,
            samples=self.samples,
            held=HeldOut.of(
                self.target, self.teacher, in_batches(self.deciding, together), self.ranks
            ),
            ranks=self.ranks,
            size=step_size(self.inputs, len(self.samples), request),
            at_once=together,
            precision=torch.bfloat16 if request.mixed_precision == "bf16" else None,
            seed=request.seed,
            augmented=partial(shifted, seed=request.seed)
            if self.shifts
            else lambda sample, _: sample,
            checkpointing=way.checkpointing,
        )

    def checked(self, way: RecoveryRequest) -> Training:
        """Set up a training; refuse one whose models are not finite on the held-out samples."""
        training = self.training(way)
        if training.distance() is not None:
            return training
        if self.request.loss is not None:
            raise NonFiniteError(
                "the loss is not finite on the held-out samples, before any training; let it "
                "return a finite number"
            )
        which = "dense" if training.held.distance(self.teacher) is None else "smaller"
        raise NonFiniteError(f"the {which} model's outputs on held-out samples are not finite")

    @cached_property
    def _alike(self) -> frozenset[str]:
        return shared_weights(self.model, self.teacher)
