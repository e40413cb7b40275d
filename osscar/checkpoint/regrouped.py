"""Tensors of a model that transformers stores under other names, or in several parts.

Files hold the matrices of experts one by one, and transformers stacks them when it reads them.
Where a tensor is its parts one after the other, byte by byte, it is read and written as these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from osscar.base.memory import attempt
from osscar.network.tensor_files import Part
from osscar.offload.places import Chain, StoredTensor


def parts_in_files(model: nn.Module) -> dict[str, tuple[Part, ...]]:
    """Return, for tensors that transformers stores as parts in a row, these parts, by name."""
    if not isinstance(model, PreTrainedModel):
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = {name: (*shape[:-1], 1) for name, shape in shapes.items() if math.prod(shape)}
    ends = dict(zip(rows, itertools.accumulate(map(math.prod, rows.values())), strict=True))
    coded = {
        name: torch.arange(ends[name] - math.prod(shape), ends[name]).view(shape)
        for name, shape in rows.items()
    }
    converted: Mapping[str, Tensor] = {}
    with attempt():  # what it makes of a model is its own affair
        converted = revert_weight_conversion(model, dict(coded))
    stretches = sorted(
        ((int(codes.flatten()[0]), name, codes) for name, codes in converted.items()),
        key=lambda one: one[:2],
    )
    found: dict[str, tuple[Part, ...]] = {}
    for name, codes in coded.items():
        first, end = ends[name] - codes.numel(), ends[name]
        mine = [(stored, part) for at, stored, part in stretches if first <= at < end]
        if [stored for stored, _ in mine] == [name] or not _in_a_row(codes, [p for _, p in mine]):
            continue
        width = shapes[name][-1:]
        found[name] = tuple(Part(stored, (*part.shape[:-1], *width)) for stored, part in mine)
    return found


def _in_a_row(codes: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether parts are a tensor one after the other; of each row there is the first entry."""
    if any(part.shape[-1:] != codes.shape[-1:] for part in parts):
        return False
    return bool(parts) and torch.equal(torch.cat([p.flatten() for p in parts]), codes.flatten())


def chained(
    name: str, shape: tuple[int, ...], parts: Sequence[Part], places: Mapping[str, StoredTensor]
) -> StoredTensor | None:
    """Return where a tensor is, given its parts; None where one is missing, or not as it should."""
    found = [places.get(part.name) for part in parts]
    slices = [one for one in found if one is not None]
    alike = len({one.dtype for one in slices}) == 1 and len(slices) == len(parts)
    if not alike or any(s.shape != p.shape for s, p in zip(slices, parts, strict=True)):
        return None
    stretches = [(one.source, one.offset, one.nbytes) for one in slices]
    return StoredTensor(Chain(stretches), 0, shape, slices[0].dtype, name)
