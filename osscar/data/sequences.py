"""Batches of models of transformers, divided into samples without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from osscar.base.errors import DataError
from osscar.data.batches import ModelInputs
from osscar.data.reader import DECODER_TOKENS, TOKENS, Reader
from osscar.data.samples import IGNORED, LABELS

_MASKS = {
    TOKENS: "attention_mask",
    "input_values": "attention_mask",
    "input_features": "attention_mask",
    DECODER_TOKENS: "decoder_attention_mask",
    LABELS: "decoder_attention_mask",
}
"""Inputs that are sequences, (samples, positions, ...), and the mask of their padding."""

_PER_TOKEN = frozenset(
    {TOKENS, "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids"}
)
"""Inputs that have an entry for each token, and are cut where a sequence is."""

_IMAGES, _GRID = "pixel_values", "image_grid_thw"
"""Images, or patches of images with the grid of each: time, height and width."""


def hides(reader: Reader, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the masks that hide something from a model of transformers, where masks mean padding."""
    takes = reader.takes if reader.pads else ()
    masks = {n: t for n, t in tensors.items() if str(n).endswith("_mask") and n in takes}
    return tuple(n for n, t in masks.items() if isinstance(t, Tensor) and not bool(t.all()))


_RUN = 3
"""Padding tokens at an end of a sample that are no chance: a text may end with one of them."""


def padded_without_mask(inputs: ModelInputs) -> int:
    """Return how many samples of tokens have padding that no mask hides, as it may."""
    mask, tokens, pad = _MASKS[TOKENS], inputs.tensors.get(TOKENS), inputs.reader.padding_token
    if pad is None or tokens is None or tokens.ndim != 2 or tokens.shape[1] <= _RUN:
        return 0
    if mask in inputs.tensors or mask not in inputs.reader.takes:
        return 0
    ends = tokens[:, :_RUN], tokens[:, -_RUN:]
    padded = torch.stack([(end == pad).all(1) for end in ends]).any(0)
    return int(padded.sum())


def divided(
    reader: Reader, inputs: Mapping[str, Tensor], labels: Tensor | None
) -> list[Mapping[str, Tensor]] | None:
    """Return the samples of a batch, each without its padding; None where it reads no sequences."""
    if not reader.pads:
        return None
    kept = {
        name: _kept(name, inputs, mask)
        for name, mask in _MASKS.items()
        if name in inputs and _is_sequence(name, inputs[name], inputs.get(mask))
    }
    if not kept:
        return None
    if labels is not None and labels.ndim == 2:
        known = (labels != IGNORED).flip(1).cummax(1).values.flip(1)
        for name in (DECODER_TOKENS, LABELS):
            if name in kept and known.shape == kept[name].shape:
                kept[name] = _checked(LABELS, kept[name] & known)
    masks = {_MASKS[name] for name in kept}
    passed = {name: x for name, x in inputs.items() if name not in masks or name in reader.needs}
    samples = [dict[str, Tensor]() for _ in next(iter(kept.values()))]
    for name, x in passed.items():
        owner = next((one for one in kept if _is_cut_with(name, one, x, kept)), None)
        for row, part in enumerate(_by_row(name, inputs, reader.image_token, len(samples))):
            keep = None if owner is None else kept[owner][row]
            samples[row][name] = part if keep is None else part[:, keep]
    return samples  # type: ignore[return-value]


def _is_sequence(name: str, x: Tensor, mask: Tensor | None) -> bool:
    """Whether an input has padding to cut: tokens, and what its mask has an entry a position of."""
    if name in (TOKENS, DECODER_TOKENS):
        return True
    return x.ndim == 2 if name == LABELS else mask is not None and mask.shape == x.shape[:2]


def _is_cut_with(name: str, owner: str, x: Tensor, kept: Mapping[str, Tensor]) -> bool:
    of_decoder = owner in (DECODER_TOKENS, LABELS)
    per_position = name.startswith("decoder_") if of_decoder else name in _PER_TOKEN
    return (name == owner or per_position) and x.shape[:2] == kept[owner].shape


def _kept(name: str, inputs: Mapping[str, Tensor], mask_name: str) -> Tensor:
    """Return which positions of a sequence are not padded, (samples, positions) bool."""
    x, mask = inputs[name], inputs.get(mask_name)
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if kept.shape != x.shape[:2] or x.ndim < 2:
        raise DataError(
            f"{mask_name!r} has shape {tuple(kept.shape)} for {name!r} of {tuple(x.shape)}; give "
            "(samples, tokens) of both"
        )
    return _checked(mask_name, kept)


def _checked(name: str, kept: Tensor) -> Tensor:
    """Refuse sequences that are nothing but padding, or have some in between."""
    runs = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    if not bool((runs == 1).all()):
        row = int((runs != 1).nonzero()[0])
        raise DataError(
            f"{name!r} of sequence {row} hides all tokens, or has gaps; give "
            "sequences that are padded only at their ends"
        )
    return kept


def _by_row(name: str, inputs: Mapping[str, Tensor], token: int | None, rows: int) -> list[Tensor]:
    """Return what each sample has of an input; images go with the tokens that stand for them."""
    x = inputs[name]
    if rows == 1:
        return [x]
    ids = inputs.get(TOKENS)
    if name in (_IMAGES, _GRID) and ids is not None and token is not None and _IMAGES in inputs:
        # An image has as many tokens as others, or as many as its patches allow.
        tokens = (ids == token).sum(1).cumsum(0)
        pixels = len(inputs[_IMAGES]) * tokens
        ends = pixels // max(1, int(tokens[-1]))
        whole = bool((ends * tokens[-1] == pixels).all())
        if name == _GRID:
            patches = x.prod(-1).cumsum(0)
            whole = whole and bool(torch.isin(ends[ends > 0], patches).all())
            ends = torch.searchsorted(patches, ends, right=True)
        if whole and int(ends[-1]) == len(x):
            return list(torch.tensor_split(x, ends[:-1].cpu()))
    elif len(x) == rows:
        return [x[row : row + 1] for row in range(rows)]
    raise DataError(
        f"it is not known which of the {len(x)} entries of {name!r} belong to which of the {rows} "
        "samples; give batches of one sample"
    )
