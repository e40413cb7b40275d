"""Weights and biases that are read by other code than their own module's.

A consumer is measured where its module is called.  A model whose code also reads the weight itself,
as ``F.linear(x, self.down.weight)`` or ``self.down.forward(x)``, uses it on inputs that nobody has
measured, so that a refit would change what it makes of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from osscar.network.hooks import hooks

_ONLY_THE_FORMAT = frozenset(
    {Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros}
)
"""What asks a tensor for its number format and device, and reads none of its values."""


class _Watch(TorchFunctionMode):
    """Notes which module is running when an operator reads a weight."""

    def __init__(self, owners: Mapping[int, str], found: set[str]) -> None:
        super().__init__()
        self.owners, self.found = owners, found
        self.running: list[str] = []

    def entered(self, name: str, *_: Any) -> None:
        self.running.append(name)

    def left(self, *_: Any) -> None:
        self.running.pop()

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
    found: set[str] = set()
    watch = _Watch(owners, found)
    with hooks(model, before=watch.entered, after=watch.left, always=True), watch:
        yield found
