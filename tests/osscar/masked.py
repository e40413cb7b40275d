"""The dense model with the refitted weights of a smaller one, made by nothing that shrinks."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from osscar.run.result import PruningResult

M = TypeVar("M", bound=nn.Module)


def masked(dense: M, result: PruningResult) -> M:
    """Return the dense model with refitted consumers, zero where they read what has left."""
    model = copy.deepcopy(dense)
    mine, theirs = dict(model.named_parameters()), dict(result.model.named_parameters())
    gone: dict[tuple[str, int], set[int]] = {}
    for group in result.plan.groups:
        for slot in group.slots:
            indices = slot.indices(set(range(group.units)) - set(group.kept))
            gone.setdefault((slot.tensor, slot.dim), set()).update(indices)
    for name in {slot.tensor for group in result.plan.groups for slot in group.consumers}:
        for refitted in (name, f"{name.rpartition('.')[0]}.bias"):
            if refitted not in theirs:
                continue
            stays = [
                torch.tensor([i for i in range(size) if i not in gone.get((refitted, dim), ())])
                for dim, size in enumerate(mine[refitted].shape)
            ]
            with torch.no_grad():
                if refitted == name:
                    mine[refitted].zero_()
                grid = torch.meshgrid(*stays, indexing="ij")
                mine[refitted][grid] = theirs[refitted].to(mine[refitted].dtype)
    return model
