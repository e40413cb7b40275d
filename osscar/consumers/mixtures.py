"""Mixtures of experts as consumers, which are called with tokens and routes.

A mixture is called with tokens, the experts that each of them is sent to, and a weight for each of
these, and returns for every token the sum of what the experts make of it, times the weights:

    y_t = sum over the experts e of token t of   w_te (x_te W_e + b_e)

W_e is a slice of a three-dimensional parameter, and x_te what expert e computes before it, as in
most mixtures of transformers.  No module is called with x_te.  It is read off the outputs, which
are linear in W: a W that picks neurons puts these out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import OsscarError
from osscar.base.memory import attempt
from osscar.network.hooks import hooks
from osscar.network.modules import forward
from osscar.routing.routed import Routed, last_layers

_TOLERANCE = 0.5
"""Power of the rounding unit up to which a mixture's output is the sum above: its code may add up
in any order, and code that computes something else is off by much more."""


@dataclass(frozen=True, eq=False)
class _Visits:
    """What the experts of a mixture read in one call: a row for each token at each of its experts.

    X holds inputs times weights, (visits, p).  `share` is that of an expert in corrections of its
    token, in proportion to squared weights: the split that asks experts for the least change.
    """

    X: Tensor
    expert: Tensor
    token: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """A module that sends tokens to experts, with the parameter that holds their last matrices.

    The experts lie in the first dimension of that, and inputs in `dim`.
    """

    name: str
    module: nn.Module
    parameter: str
    dim: int

    @property
    def weight(self) -> Tensor:
        """The parameter, outside of autograd."""
        found: Tensor = getattr(self.module, self.parameter)
        return found.detach()

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.weight)

    def holder(self, expert: int) -> str:
        """Return the name of the module that has the last matrix of an expert."""
        return self.name

    @torch.no_grad()
    def visits(self, x: Routed) -> _Visits:
        """Return what the experts read in a call; computed once for all of them."""
        known: _Visits | None = x.read.get(self.parameter)
        if known is not None:
            return known
        token, expert, weight = x.taken(self.count)
        X = self._inputs(x.hidden.detach()[token], expert[:, None], torch.ones_like(weight))
        squares = weight.double().square()
        total = squares.new_zeros(len(x.hidden)).index_add_(0, token, squares)[token]
        share = torch.where(total > 0, squares / total, 0.0)
        found = _Visits(X * weight[:, None], expert.long(), token, share)
        x.read[self.parameter] = found
        return found

    def _inputs(self, hidden: Tensor, experts: Tensor, ones: Tensor) -> Tensor:
        """Return what each expert's last matrix is multiplied with, (visits, p)."""
        outputs, p = self.weight.shape[3 - self.dim], self.weight.shape[self.dim]
        found = []
        for start in range(0, p, outputs):
            some = torch.arange(min(outputs, p - start))
            picking = torch.zeros_like(self.weight)
            picking.movedim(self.dim, 1)[:, start + some, some] = 1
            with self._replaced(picking):
                found.append(self.module.forward(hidden, experts, ones[:, None])[:, : len(some)])
        return torch.cat(found, 1) if found else hidden.new_zeros(len(hidden), 0)

    @contextmanager
    def _replaced(self, weight: Tensor) -> Iterator[None]:
        """Let the module compute with another weight, and without a bias, while the block runs."""
        own: dict[str, Any] = self.module._parameters
        before, bias = dict(own), own.get(f"{self.parameter}_bias")
        own[self.parameter] = weight
        if bias is not None:
            own[f"{self.parameter}_bias"] = torch.zeros_like(bias)
        try:
            yield
        finally:
            own.update(before)


@dataclass(frozen=True, eq=False)
class ListedMixture(Mixture):
    """A mixture of modules, in each of which the layer `parameter` returns what the expert does."""

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.module)  # type: ignore[arg-type]

    def last(self, expert: int) -> nn.Linear:
        """Return the last layer of an expert."""
        found = self.module[expert].get_submodule(self.parameter)  # type: ignore[index]
        assert isinstance(found, nn.Linear)
        return found

    def holder(self, expert: int) -> str:
        """Return the name of the last layer of an expert."""
        return f"{self.name}.{expert}.{self.parameter}".removesuffix(".")

    def _inputs(self, hidden: Tensor, experts: Tensor, ones: Tensor) -> Tensor:
        """Return what each expert's last layer reads, (visits, p)."""
        X = hidden.new_zeros(len(hidden), self.last(0).in_features)
        for number, expert in enumerate(self.module.children()):
            rows = (experts[:, 0] == number).nonzero().flatten()
            if len(rows):
                seen = last_layers(expert, hidden[rows])[self.parameter]
                X[rows] = seen.to(X)
        return X


@torch.no_grad()
def sound_mixtures(
    model: nn.Module, example: Mapping[str, Any], mixtures: Mapping[str, Mixture]
) -> frozenset[str]:
    """Run the model, and return which tensors really are the last matrices of a mixture."""
    if not mixtures:
        return frozenset()
    found: dict[str, bool] = {}

    def look(called: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        x = Routed.of(module, args, kwargs)
        for name, mixture in mixtures.items():
            if mixture.name == called:
                found[name] = found.get(name, True) and _sound(mixture, x, y)

    with hooks(model, {mixture.name for mixture in mixtures.values()}, after=look):
        forward(model, example)
    return frozenset(name for name, sound in found.items() if sound)


def _sound(mixture: Mixture, x: Routed | None, y: Any) -> bool:
    """Whether a mixture returns the sum over experts of what they are found to read, times W."""
    if x is None or not isinstance(y, Tensor):
        return False
    chance = torch.Generator().manual_seed(0)
    weight, hidden = (
        torch.randn(t.shape, generator=chance).to(t) for t in (mixture.weight, x.hidden)
    )
    drawn = Routed(hidden, x.experts, x.weights)
    with attempt(OsscarError) as tried:  # code of anyone's, which may not take single experts
        with mixture._replaced(weight):
            found = drawn.output(mixture.module)
        visits = mixture.visits(drawn)
    if tried.failed:
        return False
    W = weight.movedim(mixture.dim, 1).double()
    expected = W.new_zeros(len(hidden), W.shape[2])
    for expert in set(visits.expert.tolist()):
        here = visits.expert == expert
        expected.index_add_(0, visits.token[here], visits.X[here].double() @ W[expert])
    same = isinstance(found, Tensor) and found.shape == expected.shape == y.shape
    if not same or not bool(found.any()):
        return False
    eps = max(torch.finfo(given.dtype).eps for given in (found, hidden, x.weights))
    error, size = (torch.linalg.vector_norm(t) for t in (expected - found.double(), found.double()))
    return bool(error <= eps**_TOLERANCE * size)
