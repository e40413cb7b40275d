"""What trains a model and what decides: samples that share nothing, and how many a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import DataError
from osscar.base.printable import are, pluralize
from osscar.data.batches import Batch, ModelInputs, as_inputs
from osscar.data.samples import named_generator
from osscar.recovery.request import RecoveryRequest

_STEP = {True: 4, False: 64}
_DECIDING = {True: 8, False: 128}
"""Windows, or samples of anything else, in a step, and those that decide at most, by default."""

_SHIFT = 8
"""Images are shifted by a share of their width of at most one over this."""

_OVERLAP = 4
"""So many tokens with which one window ends and another begins are taken for an overlap."""

_SPECIAL = 4
"""The most tokens that a tokenizer puts around a text on either side."""


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

    Those that decide are of windows the last ones, none of whose text is in a window that trains,
    and of anything else drawn at random.
    """
    samples = inputs.batches(model, 1)
    deciding = request.held_out or min(_DECIDING[inputs.tokens], max(1, len(samples) // 8))
    order = list(range(len(samples)))
    if not inputs.tokens:
        drawn = named_generator("held out", request.seed)
        order = torch.randperm(len(samples), generator=drawn).tolist()
    trained = max(0, len(samples) - deciding)
    held = [samples[index] for index in sorted(order[trained:])]
    training = [samples[index] for index in sorted(order[:trained])]
    if inputs.tokens:
        text = _text_of(samples)
        apart = [text[index] for index in order[trained:]]
        known = [any(_share(text[index], one) for one in apart) for index in order[:trained]]
        training = [one for one, shared in zip(training, known, strict=True) if not shared]
    size = request.batch_size or 1
    if len(training) < size:
        raise DataError(
            f"{pluralize(len(samples), 'sample')} {are(len(samples))} too few: to decide what is "
            f"kept takes {deciding}, {len(training)} share nothing with those, and a step has "
            f"{size}; give more, or smaller numbers to `osscar recover --batch-size N --held-out N`"
        )
    return training, held


def _text_of(samples: Sequence[Batch]) -> Tensor:
    """Return the tokens of windows without the special ones, with which all begin and end."""
    windows = torch.cat([one["input_ids"] for one in samples])
    same, length = (windows == windows[0]).all(0).int(), windows.shape[1]
    most = min(_SPECIAL, (length - 1) // 2)
    before, after = (int(side[:most].cumprod(0).sum()) for side in (same, same.flip(0)))
    return windows[:, before : length - after]


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two windows share text: of one length, one of them ends as the other begins."""
    return _begins_in(one, other) or _begins_in(other, one)


def _begins_in(second: Tensor, first: Tensor) -> bool:
    least = min(_OVERLAP, len(first))
    starts = (first.unfold(0, least, 1) == second[:least]).all(1).nonzero().flatten()
    return any(torch.equal(first[at:], second[: len(first) - at]) for at in starts.tolist())


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
