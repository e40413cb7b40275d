"""Weights and biases that are read by other code than their own module's.

A consumer is measured where its module is called.  Code that also reads the weight itself, as
``F.linear(x, self.down.weight)`` or ``self.down.forward(x)``, uses it on inputs that are not
measured there: such a weight is observed where code multiplies by it
(`osscar.consumers.products`), or not refitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def writes(leaves: Iterable[Any]) -> dict[int, int]:
    """Return how often tensors were written to, by `id`; 0 where nobody counts."""
    return {id(x): 0 if x.is_inference() else x._version for x in leaves if isinstance(x, Tensor)}


def reads_values(func: Any, leaves: Sequence[Any], before: Mapping[int, int], result: Any) -> bool:
    """Whether a function has put out tensors that it was not given, or has written to those.

    `before` is what `writes` said of its arguments, which are `leaves`.
    """
    made = any(isinstance(x, Tensor) and id(x) not in before for x in pytree.tree_leaves(result))
    return func not in _ONLY_THE_FORMAT and (made or writes(leaves) != before)


class _Watch(TorchFunctionMode):
    """Notes which module is running when an operator reads a weight."""

    def __init__(self, owners: Mapping[int, str], running: Sequence[str]) -> None:
        super().__init__()
        self.owners, self.running = owners, running
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves = pytree.tree_leaves((args, dict(kwargs or {})))
        before = writes(leaves)
        result = func(*args, **(kwargs or {}))
        if reads_values(func, leaves, before, result):
            inside = self.running[-1] if self.running else ""
            for leaf in leaves:
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
