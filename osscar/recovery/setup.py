"""What is set up before a recovery trains, whatever the way in which it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from osscar.allocation.divergence import Distance
from osscar.base.devices import resolve_device
from osscar.base.errors import OptionError
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import Batch, ModelInputs, as_inputs
from osscar.data.images import ImageSet
from osscar.network.modules import copied, device_of
from osscar.proof.program.program import ProgramModule
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import split, step_size


@dataclass(frozen=True, eq=False)
class Setup:
    """What all ways to train a smaller model towards a dense one have in common.

    Parameters
    ----------
    model
        The smaller model, as it came.
    dense
        The dense model, on the device of the training.
    inputs
        What both read.
    samples, deciding
        Those that train, and those that decide, one a batch.
    shifts
        Whether samples that train are mirrored and shifted.
    distance
        How far a model is from the dense one.
    size, at_once
        Samples of a step, of all ranks, and of a pass of one of them where no way says another
        number.
    request
        What is asked for.
    ranks
        Share out the samples of a step, and those that decide.
    """

    model: nn.Module
    dense: nn.Module
    inputs: ModelInputs = field(repr=False)
    samples: Sequence[Batch] = field(repr=False)
    deciding: Sequence[Batch] = field(repr=False)
    shifts: bool
    distance: Distance
    size: int
    at_once: int
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
        """Split the samples, and look at what the dense model puts out for one."""
        images = isinstance(data, ImageSet)
        if request.augment == "flip-shift" and not images:
            raise OptionError("augment is 'flip-shift', and the data are no images; omit it")
        inputs = as_inputs(dense, data)
        if not isinstance(model, ProgramModule):  # which cannot be asked for a vocabulary
            as_inputs(model, data)
        device = torch.empty(0, device=resolve_device(request.device)).device  # with its number
        dense = dense if device_of(dense) == device else copied(dense).to(device)
        samples, deciding = split(inputs, dense, request)
        size = step_size(inputs, len(samples), request)
        # In float32 a CPU is no faster with several windows at once than with one after the other,
        # and takes more memory.
        one_by_one = inputs.tokens and device.type == "cpu" and request.mixed_precision == "no"
        usual = 1 if one_by_one else size
        at_once = 1 if inputs.apart else request.micro_batch_size or usual
        return cls(
            model=model,
            dense=dense,
            inputs=inputs,
            samples=samples,
            deciding=deciding,
            shifts=images and request.augment != "none",
            distance=Distance.of(dense, inputs, deciding[0], request.loss),
            size=size,
            at_once=at_once,
            request=request,
            ranks=ranks,
        )
