"""What trains a model and what decides: samples that share nothing, and how many a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from osscar.base.errors import DataError
from osscar.base.printable import are, pluralize
from osscar.data.batches import Batch, ModelInputs, as_inputs
from osscar.data.samples import named_generator
from osscar.proof.seen import RUN, fingerprints_of_runs
from osscar.recovery.request import RecoveryRequest

_STEP = {True: 4, False: 64}
_DECIDING = {True: 8, False: 128}
"""Windows, or samples of anything else, in a step, and those that decide at most, by default."""

_SHIFT = 8
"""Images are shifted by a share of their width of at most one over this."""


def samples_for(request: RecoveryRequest, *, windows: bool) -> int:
    """Return how many windows, or other samples, it takes if each trains once, or decides."""
    size = request.batch_size or _STEP[windows]
    deciding = request.held_out or _DECIDING[windows]
    return request.steps * size + deciding


def check_enough(dense: nn.Module, data: Any, request: RecoveryRequest) -> None:
    """Refuse data that are too few (DataError), for whoever does other work before a recovery."""
    split(as_inputs(dense, data), dense, request)


def step_size(inputs: ModelInputs, training: int, request: RecoveryRequest) -> int:
    """Return how many of so many samples that train a step takes."""
    return request.batch_size or min(_STEP[inputs.tokens], training)


def split(
    inputs: ModelInputs, model: nn.Module, request: RecoveryRequest
) -> tuple[list[Batch], list[Batch]]:
    """Return the samples that train, and those that decide.

    Those that decide are of windows the last ones, and no window trains that has 32 tokens in a row
    in common with one of them (half a window, if that is less); of anything else they are drawn at
    random.
    """
    samples = inputs.batches(model, 1)
    deciding = request.held_out or min(_DECIDING[inputs.tokens], max(1, len(samples) // 8))
    order = list(range(len(samples)))
    if not inputs.tokens:
        drawn = named_generator("held out", request.seed)
        order = torch.randperm(len(samples), generator=drawn).tolist()
    trained = max(0, len(samples) - deciding)
    training, held = (
        [samples[index] for index in sorted(some)] for some in (order[:trained], order[trained:])
    )
    if inputs.tokens:
        run = max(1, min(RUN, samples[0]["input_ids"].shape[1] // 2))
        known = np.concatenate([fingerprints_of_runs(one["input_ids"], run) for one in held])
        training = [
            one
            for one in training
            if not np.isin(fingerprints_of_runs(one["input_ids"], run), known).any()
        ]
    size = request.batch_size or 1
    if len(training) < size:
        raise DataError(
            f"{pluralize(len(samples), 'sample')} {are(len(samples))} too few: to decide what is "
            f"kept takes {deciding}, {len(training)} share nothing with those, and a step has "
            f"{size}; give more, or smaller numbers to `osscar recover --batch-size N --held-out N`"
        )
    return training, held


def in_batches(samples: Sequence[Batch], at_once: int) -> list[Batch]:
    """Return batches of so many samples, of batches of one."""
    starts = range(0, len(samples), at_once)
    some = [samples[start : start + at_once] for start in starts]
    return [{name: torch.cat([one[name] for one in each]) for name in each[0]} for each in some]


def shifted(sample: Batch, turn: int, seed: int) -> Batch:
    """Mirror and shift an image as chance has it in this turn.

    Its edge fills what is left free: a border of one colour is nothing that a model knows.
    """
    generator = named_generator(f"image {turn}", seed)
    ((name, image),) = sample.items()
    height, width = image.shape[-2:]
    most = max(1, width // _SHIFT)
    down, right = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    rows = (torch.arange(height) + down - most).clamp(0, height - 1)
    columns = (torch.arange(width) + right - most).clamp(0, width - 1)
    return {name: image[..., rows[:, None], columns]}
