"""Gradient checkpointing: what a block keeps for the backward pass is computed again there.

As Chen et al. have it (2016); transformers' own is for training mode, with dropout, while a
recovery trains in evaluation mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from osscar.base.errors import OptionError
from osscar.network.hooks import other_forwards


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats, none of which is inside another.

    They are what transformers says, or of a list or sequence the members of one class.
    """
    found = {one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)}
    if not found:
        for holder in model.modules():
            if isinstance(holder, nn.ModuleList | nn.Sequential):
                classes = Counter(map(type, holder))
                found |= {one for one in holder if classes[type(one)] > 1 and any(one.children())}
    inner = {below for one in found for below in one.modules() if below is not one}
    return [one for one in model.modules() if one in found - inner]


def checkpointing(model: nn.Module) -> AbstractContextManager[None]:
    """Let each block of a model keep only what it is given, in the passes of a `with` block.

    Raises
    ------
    OptionError
        If the model repeats no blocks, or, in a pass, if one writes to what it is given.
    """
    repeated = blocks(model)
    if not repeated:
        raise OptionError(
            f"checkpointing is asked for, and {type(model).__name__} repeats no blocks that could "
            "be computed again; omit it"
        )
    return other_forwards([(block, _checkpointed(block)) for block in repeated])


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        versions = [tensor._version for tensor in given]
        result = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if [tensor._version for tensor in given] != versions:
            raise OptionError(
                f"{type(block).__name__} writes to what it is given, so that it cannot be computed "
                "again: omit checkpointing"
            )
        return result

    return call
