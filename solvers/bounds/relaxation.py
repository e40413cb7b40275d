"""The strongest bound by common multipliers: alternate between multipliers and the polytope."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.bounds.quadratic import (
    QuadraticBound,
    is_definite,
    minimize,
    scaled_diagonal,
    tighten,
)
from solvers.bounds.removal import RemovalTerms

_FIRST_COUPLING = 1.25


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Parameters
    ----------
    rounds
        The most updates of the multipliers; each costs a Cholesky factorization and p^2 m.
    steps
        The most gradient steps in each minimization over the polytope.
    tighten
        Whether to optimize the diagonal as well, by barrier steps that cost n^3 each.
    progress
        Stop updating when a round raises the bound by less than this share of it.
    """

    rounds: int = 6
    steps: int = 200
    tighten: bool = True
    progress: float = 2e-3


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A bound for the supports that the terms leave open.

    Parameters
    ----------
    terms
        What was relaxed.
    share, coupling
        What the multipliers were computed from.
    bound
        The bound of the cost of removing ``terms.removals`` free units; None if that is forced.
    """

    terms: RemovalTerms
    share: Tensor
    coupling: float
    bound: QuadraticBound

    @property
    def value(self) -> float:
        """The certified lower bound of the loss, -inf if rounding forbids any."""
        if not is_definite(self.bound.q, self.bound.Q):
            return -math.inf
        return self.terms.certified(self.bound.value, self.magnitude)

    @property
    def magnitude(self) -> float:
        """Sum of the sizes of what the bound sums up."""
        return float(2 * self.bound.a.abs().sum() + 2 * self.bound.q.sum())


def relax(
    terms: RemovalTerms,
    effort: Effort,
    *,
    share: Tensor | None = None,
    cutoff: float = math.inf,
) -> Relaxation:
    """Bound the loss of every support that `terms` leave open.

    Parameters
    ----------
    terms
        At least one unit is free to go and one to stay.
    effort
        How hard to try.
    share
        For each free unit, how likely it is removed, (n,); by default the cheapest ones are.
    cutoff
        Stop as soon as the bound reaches this loss.
    """
    x = cheapest(terms) if share is None else share
    coupling, best = _FIRST_COUPLING, None
    for _ in range(effort.rounds):
        current = _update(terms, x, coupling, effort.steps)
        coupling = current.bound_ratio
        previous, best = best, _better(best, current.relaxation)
        if best.value >= cutoff:
            return best
        if previous is not None and best.value - previous.value < effort.progress * best.value:
            break
        x = (x + current.relaxation.bound.point) / 2
    assert best is not None
    if effort.tighten:
        tight = tighten(best.bound, effort.steps)
        best = _better(best, Relaxation(terms, best.share, best.coupling, tight))
    return best


def cheapest(terms: RemovalTerms) -> Tensor:
    """Return shares, (n,), that favour the units that cost least if they alone are removed."""
    n, r = len(terms.units), terms.removals
    x = torch.full((n,), r / n, dtype=torch.float64, device=terms.units.device)
    x[terms.single_costs().argsort()[:r]] += 1.0
    return x / 2 if r < n else x.fill_(1.0)


@dataclass(frozen=True, eq=False)
class _Update:
    relaxation: Relaxation
    bound_ratio: float


def _update(terms: RemovalTerms, x: Tensor, coupling: float, steps: int) -> _Update:
    a, Q = terms.aggregate(x, coupling)
    q = scaled_diagonal(Q)
    start = x * (terms.removals / float(x.sum()))
    point = QuadraticBound(a, Q, terms.removals, q, start.clamp_(0.0, 1.0))
    bound = minimize(point, steps)
    ratio = float((q / Q.diagonal().clamp(min=1e-300)).min())
    return _Update(Relaxation(terms, x, coupling, bound), ratio)


def _better(one: Relaxation | None, other: Relaxation) -> Relaxation:
    return other if one is None or other.value > one.value else one
