"""Rows that stay, whatever leaves: eliminated before a problem is posed, and refitted afterwards.

Of the rows of a linear map some, f, always stay, and the others, u, belong to units.  The loss
``tr(W'HW) - 2 tr(W'G) + e`` is least in ``W_f`` where ``H_ff W_f = G_f - H_fu W_u``.  Put in, it is
a loss of the same form in ``W_u`` alone, with

    H_uu - H_uf inv(H_ff) H_fu,    G_u - H_uf inv(H_ff) G_f,    e - tr(G_f' inv(H_ff) G_f)

so that what a support loses here is what it loses in the whole, with the fixed rows refitted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from solvers.linalg.symmetric import Symmetric


@dataclass(frozen=True, eq=False)
class FixedRows:
    """What was eliminated: ``H_ff = L L'``, and what gives its weights back."""

    factor: Symmetric = field(repr=False)
    """L, (f, f)."""
    across: Tensor = field(repr=False)
    """``H_uf inv(L')``, (u, f)."""
    target: Tensor = field(repr=False)
    """``inv(L) G_f``, (f, m)."""

    def refit(self, W: Tensor) -> Tensor:
        """Return the optimal weights of the fixed rows, (f, m), for any of the others, (u, m)."""
        found = self.target - self.across.T @ W
        self.factor.backward(found)
        return found


def eliminate_fixed(
    H: Symmetric, G: Tensor, e: float, count: int
) -> tuple[FixedRows, Symmetric, Tensor, float]:
    """Eliminate the first rows; return what gives them back, and H, G and e of the others.

    H: Positive definite in these rows, at the end of which a panel starts; it is given up, and G is
        written to.
    """
    H.factorize(count)
    factor, across, rest = H.split(count)
    target, own = G[:count], G[count:]
    factor.forward(target)
    own.addmm_(across, target, alpha=-1)
    explained = float(torch.linalg.vector_norm(target)) ** 2
    return FixedRows(factor, across, target.clone()), rest, own.clone(), e - explained
