"""What a recovery trains on, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from osscar.base.devices import resolve_device
from osscar.base.errors import DataError, OptionError
from osscar.base.printable import are, pluralize
from osscar.data.batches import ModelInputs, as_inputs
from osscar.data.images import ImageSet
from osscar.data.parts import held_out, run_length, shuffled
from osscar.data.reader import Batch
from osscar.data.samples import alike, joined, named_generator, shapes_of
from osscar.distance.distance import Distance
from osscar.network.modules import copied, device_of
from osscar.preparation.failures import together
from osscar.proof.program import ProgramModule
from osscar.proof.seen import fingerprints_of_runs
from osscar.recovery.request import RecoveryRequest

STEP = {True: 4, False: 64}
"""Samples in an optimizer step: windows of text (True), or anything else (False)."""

HELD_OUT_MOST = {True: 8, False: 128}
"""How many samples are held out at most: windows of text (True), or anything else (False)."""

CHECKED = {True: 2, False: 32}
"""Held-out samples on which each check during the training is made; the last is made on all."""


def samples_for(request: RecoveryRequest, *, windows: bool) -> int:
    """Return how many windows, or other samples, let each train once or be held out."""
    size = request.batch_size or STEP[windows]
    return request.steps * size + (request.held_out or HELD_OUT_MOST[windows])


def split(inputs: ModelInputs, request: RecoveryRequest) -> tuple[list[Batch], list[Batch]]:
    """Return the samples that train, and those that are held out, one a batch (DataError).

    They are shuffled by the seed, copies together (`shuffled`), and the last are held out.  A
    window of text that has 32 tokens in a row in common with one of these (half a window, if that
    is less) does not train.
    """
    inputs = shuffled(inputs, request.seed)
    samples = inputs.batches(1)
    usual = max(1, held_out(len(samples), HELD_OUT_MOST[inputs.tokens]))
    held = request.held_out or usual
    if not inputs.tokens and held < len(samples):
        held = inputs.last(held)
    trained = max(0, len(samples) - held)
    training, apart = samples[:trained], samples[trained:]
    if inputs.tokens:
        run = run_length(samples[0]["input_ids"])
        known = np.concatenate([fingerprints_of_runs(one["input_ids"], run) for one in apart])
        training = [
            one
            for one in training
            if not np.isin(fingerprints_of_runs(one["input_ids"], run), known).any()
        ]
    size = request.batch_size or 1
    if len(training) < size:
        raise DataError(
            f"{pluralize(len(samples), 'sample')} {are(len(samples))} too few: {held} {are(held)} "
            f"held out, {len(training)} do not overlap with those, and a step takes {size}; give "
            "more, or recover with a smaller batch_size or held_out"
        )
    return training, apart


class Setup:
    """Both models and all samples: what does not depend on how the smaller model is trained."""

    def __init__(
        self, model: nn.Module, dense: nn.Module, data: Any, request: RecoveryRequest
    ) -> None:
        images = isinstance(data, ImageSet)
        if request.augment == "flip-shift" and not images:
            raise OptionError("augment is 'flip-shift', and the data are no images; omit it")
        self.model, self.request = model, request
        if not isinstance(model, ProgramModule):  # which has no vocabulary to be checked
            as_inputs(model, data)
        device = torch.empty(0, device=resolve_device(request.device)).device  # with its number
        self.dense = dense if device_of(dense) == device else copied(dense).to(device)
        self.inputs = together(self.dense, as_inputs(self.dense, data))
        self.shifts = images and request.augment != "none"
        self.samples, self.held_out = split(self.inputs, request)
        self.size = request.batch_size or min(STEP[self.inputs.tokens], len(self.samples))
        self.distance = Distance.from_outputs(
            self.dense, self.inputs, self.held_out[0], request.distance
        )

    def order(self, at_once: int, generator: torch.Generator) -> list[int]:
        """Draw the order of a pass, in which so many of equal shapes follow one another."""
        order: list[int] = torch.randperm(len(self.samples), generator=generator).tolist()
        if not self.inputs.together:
            return order
        batches = alike([shapes_of(self.samples[one]) for one in order], at_once)
        drawn = torch.randperm(len(batches), generator=generator).tolist()
        return [order[one] for batch in drawn for one in batches[batch]]


def in_batches(samples: Sequence[Batch], at_once: int) -> list[Batch]:
    """Join samples of equal shapes to batches of so many."""
    rows = alike([shapes_of(one) for one in samples], at_once)
    return [joined([samples[row] for row in each]) for each in rows]


def shifted(sample: Batch, turn: int, seed: int) -> Batch:
    """Mirror an image and shift it by an eighth of its width at most, at random in each turn."""
    generator = named_generator(f"image {turn}", seed)
    ((name, image),) = sample.items()
    height, width = image.shape[-2:]
    most = max(1, width // 8)
    down, right = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    wider = nn.functional.pad(image, (most, most, most, most), mode="replicate")
    return {name: wider[..., down : down + height, right : right + width]}
