"""Masking: what reads the removed units is zero, and the model keeps its shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Filled, Place
from osscar.shrinking.plan import PruningPlan


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Zero what reads the units that a plan removes, and put it back afterwards."""
    before: list[tuple[Tensor, Tensor, int, Tensor]] = []
    on_disk: list[tuple[OnDisk, Place]] = []
    try:
        for group in plan.groups:
            gone = set(range(group.units)) - set(group.kept)
            for slot in group.consumers:
                path, _, attribute = slot.tensor.rpartition(".")
                weight = getattr(model.get_submodule(path), attribute)
                index = torch.tensor(slot.indices(gone), device=weight.device)
                if isinstance(weight, OnDisk):
                    on_disk.append((weight, weight.place))
                    weight.place = weight.place.then(Filled(slot.dim, index))
                    continue
                weight = weight.detach()
                before.append((weight, index, slot.dim, weight.index_select(slot.dim, index)))
                weight.index_fill_(slot.dim, index, 0.0)
        yield
    finally:
        for weight, index, dim, values in reversed(before):
            weight.index_copy_(dim, index, values)
        for parameter, place in reversed(on_disk):
            parameter.place = place
