"""Padding: what masks hide of token sequences, which counts nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osscar.base.errors import DataError
from osscar.data.batches import accepted_arguments, needed_arguments

TOKENS = "input_ids"
_MASK = "attention_mask"

_ALONG = frozenset({TOKENS, _MASK, "token_type_ids", "position_ids"})
"""What has an entry for each token, and is cut where a sequence is."""

MASKS = ("attention_mask", "pixel_mask")
"""How masks are called in transformers, at the end of the name."""


def hides(model: nn.Module, tensors: Mapping[str, Any]) -> bool:
    """Whether a mask leaves something out of what a model of transformers reads.

    What any other makes of a mask, only its own code knows.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    takes = accepted_arguments(model)
    return any(
        name in takes and isinstance(mask, Tensor) and mask.numel() > 0 and not bool(mask.all())
        for name, mask in tensors.items()
        if str(name).endswith(MASKS)
    )


def without_padding(
    model: nn.Module, inputs: dict[str, Tensor], place: str
) -> list[dict[str, Tensor]]:
    """Return the sequences of a batch, each without its padding, (1, its length).

    A padded position would count wherever activations are summed, or outputs compared.
    """
    ids, mask = inputs[TOKENS], inputs.get(_MASK)
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    _check_mask(ids, mask, kept, place)
    passed = {
        name: tensor
        for name, tensor in inputs.items()
        if name != _MASK or name in needed_arguments(model)
    }
    along = {n for n, t in passed.items() if n in _ALONG and t.shape[:2] == ids.shape}
    return [
        {n: t[row : row + 1, of_row] if n in along else t[row : row + 1] for n, t in passed.items()}
        for row, of_row in enumerate(kept)
    ]


def _check_mask(ids: Tensor, mask: Tensor | None, kept: Tensor, place: str) -> None:
    """Refuse a mask that is more than padding at the ends of token sequences."""
    if mask is None:
        return
    if ids.ndim != 2 or mask.shape != ids.shape or not torch.equal(kept.to(mask.dtype), mask):
        raise DataError(
            f"{_MASK!r} of {place} is {mask.dtype} of {tuple(mask.shape)} for {TOKENS!r} of "
            f"{tuple(ids.shape)}; give one of the same shape, 1 for a token and 0 for padding"
        )
    begins = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    for row, count in enumerate(begins.tolist()):
        if count != 1:
            how = "hides all of it" if count == 0 else "leaves gaps in it"
            raise DataError(
                f"{_MASK!r} of sequence {row} in {place} {how}; give sequences with tokens, padded "
                "at their ends alone"
            )
