"""What mixtures of experts are called with: tokens, their experts, and weights of these.

A mixture returns for every token the sum of what its experts make of it, times the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from osscar.network.hooks import hooks


@dataclass(frozen=True, eq=False)
class Routed:
    """What a mixture is called with."""

    hidden: Tensor
    """Tokens, (tokens, d)."""
    experts: Tensor
    """Which experts each of them is sent to, (tokens, k); numbers that no expert has say that a
    place is not taken."""
    weights: Tensor
    """Of these experts in the sum, (tokens, k)."""
    read: dict[str, Any] = field(default_factory=dict, repr=False)
    """What its readers keep of it, by a name of their own."""

    @classmethod
    def of(cls, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routed | None:
        """Take the arguments of a call; None where they are others."""
        try:
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        except TypeError:  # a call that fails anyway
            return None
        values = tuple(given.values())
        if len(values) != 3 or not all(isinstance(value, Tensor) for value in values):
            return None
        hidden, experts, weights = values
        fits = (
            hidden.ndim == experts.ndim == 2
            and len(hidden) == len(experts)
            and experts.shape == weights.shape
            and hidden.is_floating_point()
            and weights.is_floating_point()
            and experts.dtype in (torch.int64, torch.int32)
        )
        return cls(hidden, experts, weights) if fits else None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments in their order."""
        return self.hidden, self.experts, self.weights

    def output(self, module: nn.Module) -> Any:
        """Return what a module, without its hooks, makes of it."""
        return module.forward(*self.tensors)

    def taken(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return token, expert and weight of each place that one of `count` experts takes."""
        taken = (self.experts >= 0) & (self.experts < count)
        token, _ = taken.nonzero(as_tuple=True)
        return token, self.experts[taken], self.weights.detach()[taken]


# ---- experts that are modules -------------------------------------------------------------


def last_layers(expert: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Return which linear layers return what an expert does, with what each of them reads."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def look(name: str, _: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        seen.setdefault(name, []).append((x.detach(), y))

    linear = [
        name
        for name, inner in expert.named_modules()
        if isinstance(inner, nn.Linear) and "weight" in inner._parameters  # and is not computed
    ]
    with hooks(expert, linear, after=look):
        y = expert(hidden)
    return {
        name: calls[0][0]
        for name, calls in seen.items()
        if len(calls) == 1 and calls[0][1].shape == y.shape and torch.equal(calls[0][1], y)
    }
