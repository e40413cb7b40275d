"""Tracing of code that reads numbers off its inputs, such as the grids of images.

An export sees shapes and no values.  Where code decides by whole numbers in the inputs alone, a
trace can follow it for those of the example: what is computed from these alone is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_MADE = frozenset(
    {torch.arange, torch.empty, torch.full, torch.ones, torch.scalar_tensor, torch.tensor}
    | {torch.zeros}
)
"""Functions that make a tensor of numbers."""


class _Computing(TorchFunctionMode):
    """Compute what depends on nothing but tensors that have values, and on numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = all(type(one) is Tensor for one in tensors) if tensors else func in _MADE
        if known and not any(isinstance(leaf, torch.SymInt) for leaf in leaves):
            with unset_fake_temporarily(), disable_proxy_modes_tracing():
                found = func(*args, **(kwargs or {}))
            # Fractions that are made, such as a bias of attention, are as others.
            if tensors or not found.is_floating_point():
                return found
        return func(*args, **(kwargs or {}))


def whole_numbers(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs that are tensors of whole numbers."""
    kinds = (torch.int64, torch.int32)
    return {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.dtype in kinds}


@contextmanager
def values_known(model: torch.nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model read the values of some of its keyword arguments while it is exported."""

    def given(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, **values}

    hook = model.register_forward_pre_hook(given, with_kwargs=True)
    try:
        with _Computing():
            yield
    finally:
        hook.remove()
