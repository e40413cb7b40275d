"""The kernels by which mixtures of experts of transformers multiply: some cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import nn

_KERNEL = "_experts_implementation"


def followed_mixtures(model: nn.Module) -> AbstractContextManager[None]:
    """Let mixtures of transformers run while the block does by the kernel that can be traced.

    The others look at which experts tokens are sent to, or gather a matrix for each token.
    """
    return _by_kernels(model, {"eager": "grouped_mm", "batched_mm": "grouped_mm"})


def computable_mixtures(model: nn.Module) -> AbstractContextManager[None]:
    """Let mixtures of transformers run while the block does by the kernel whose shapes torch tells.

    Those of ``grouped_mm`` it tells in bfloat16 alone, and ``eager`` looks at where tokens are
    sent.
    """
    return _by_kernels(model, {"eager": "batched_mm", "grouped_mm": "batched_mm"})


@contextmanager
def _by_kernels(model: nn.Module, instead: Mapping[str, str]) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [
        (config, kernel)
        for config in configs.values()
        if (kernel := getattr(config, _KERNEL, None)) is not None
    ]
    try:
        for config, kernel in before:
            setattr(config, _KERNEL, instead.get(kernel, kernel))
        yield
    finally:
        for config, kernel in before:
            setattr(config, _KERNEL, kernel)
