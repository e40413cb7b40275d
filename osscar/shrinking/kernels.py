"""The kernels by which mixtures of experts of transformers multiply: some cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_KERNEL = "_experts_implementation"
_UNTRACEABLE = ("eager", "batched_mm")


@contextmanager
def followed_mixtures(model: nn.Module) -> Iterator[None]:
    """Let mixtures of transformers run while the block does by the kernel that can be traced.

    The others look at which experts tokens are sent to, or gather a matrix for each token.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [
        (config, kernel)
        for config in configs.values()
        if (kernel := getattr(config, _KERNEL, None)) is not None
    ]
    try:
        for config, kernel in before:
            if kernel in _UNTRACEABLE:
                setattr(config, _KERNEL, "grouped_mm")
        yield
    finally:
        for config, kernel in before:
            setattr(config, _KERNEL, kernel)
