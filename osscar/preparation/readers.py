"""Weights and biases that are read by other code than their own module's.

A consumer is measured where its module is called.  A model whose code also reads the weight itself,
as ``F.linear(x, self.down.weight)`` or ``self.down.forward(x)``, uses it on inputs that nobody has
measured, so that a refit would change what it makes of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from osscar.network.hooks import running_modules

_ONLY_THE_FORMAT = frozenset(
    {Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros}
)
"""What asks a tensor for its number format and device, and reads none of its values."""


class _Watch(TorchFunctionMode):
    """Notes which module is running when an operator reads a weight."""

    def __init__(self, owners: Mapping[int, str], running: Sequence[str]) -> None:
        super().__init__()
        self.owners, self.running = owners, running
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        if made and func not in _ONLY_THE_FORMAT:
            inside = self.running[-1] if self.running else ""
            for leaf in pytree.tree_leaves((args, dict(kwargs or {}))):
                owner = self.owners.get(id(leaf))
                if owner is not None and owner != inside:
                    self.found.add(owner)
        return result


@contextmanager
def weights_read_elsewhere(model: nn.Module) -> Iterator[set[str]]:
    """Yield a set that fills with the names of modules whose weights others read meanwhile."""
    owners = {
        id(tensor): name
        for name, module in model.named_modules()
        for tensor in module.parameters(recurse=False)
    }
    with running_modules(model) as running, _Watch(owners, running) as watch:
        yield watch.found
