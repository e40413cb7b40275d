"""Computing in double precision what code asks for in a coarser one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_COARSER = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


class InDouble(TorchFunctionMode):
    """Gives code that asks for a coarser number format double precision while the block runs.

    Routers and normalizations round to float32 inside, whatever their weights are, and hide what is
    smaller than that.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, options = pytree.tree_map_only(torch.dtype, _finer, (args, dict(kwargs or {})))
        return _CASTS.get(func, func)(*args, **options)


def _finer(kind: torch.dtype) -> torch.dtype:
    return torch.float64 if kind in _COARSER else kind
