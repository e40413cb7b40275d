"""The strongest bound by common multipliers: alternate between multipliers and the polytope."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.bounds.quadratic import QuadraticBound, minimize, scaled_diagonal, tighten
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import LEAST_SHARE, MultiplierCertificate

_FIRST_SHAPE = 1.25


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    rounds: The most updates of the multipliers; each costs a Cholesky factorization and p^2 m.
    steps: The most gradient steps in each minimization over the polytope.
    tighten: Whether to optimize the diagonal as well, by barrier steps that cost n^3 each.
    repeat: Whether to update the multipliers for the optimized diagonal, and optimize it again:
        pays for few units, and doubles the time.
    progress: Stop updating when a round raises the bound of the cost by less than this share of it.
    """

    rounds: int = 6
    steps: int = 200
    tighten: bool = True
    repeat: bool = False
    progress: float = 2e-3


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A bound for the supports that the terms leave open.

    share, shape: What the multipliers were computed from, (n,) each: how likely each free unit is
        removed, and the diagonal q relative to that of Q.
    bound: The bound of the cost of removing ``terms.removals`` free units.
    """

    terms: RemovalTerms
    share: Tensor
    shape: Tensor
    bound: QuadraticBound

    @property
    def value(self) -> float:
        """The certified lower bound of the loss, -inf if rounding forbids any."""
        if not self.bound.dominates:
            return -math.inf
        return self.terms.certified(self.bound.value)

    @property
    def support(self) -> Tensor:
        """The places of the units that the minimizer removes least, sorted."""
        keep = len(self.bound.point) - self.terms.removals
        return self.bound.point.argsort(stable=True)[:keep].sort().values

    @property
    def certificate(self) -> MultiplierCertificate:
        """What the bound can be recomputed from, where the terms are those of a whole problem."""
        share = self.share.clamp(min=LEAST_SHARE, max=1.0)
        return MultiplierCertificate(share, self.shape, self.bound.q, self.bound.point)

    @property
    def claim(self) -> tuple[float, MultiplierCertificate | None]:
        """The bound and its evidence; zero where rounding forbids any, which needs none."""
        value = self.value
        return (value, self.certificate) if math.isfinite(value) else (0.0, None)


def relax(
    terms: RemovalTerms,
    effort: Effort,
    start: tuple[Tensor, Tensor] | None = None,
    *,
    cutoff: float = math.inf,
) -> Relaxation:
    """Bound the loss of every support that `terms` leave open.

    terms: At least one unit is free to go and one to stay.
    start: The share and shape of a `Relaxation` to start from; by default those units are favoured
        that cost least if they alone are removed.
    cutoff: Stop as soon as the bound reaches this loss.
    """
    best = _alternate(terms, effort, *(start or _cold_start(terms)), cutoff)
    if effort.tighten and best.value < cutoff:
        best = _tightened(best, effort)
        if effort.repeat and best.value < cutoff:
            again = _alternate(terms, effort, best.bound.point, best.bound.shape, cutoff)
            best = _better(_better(best, again), _tightened(again, effort))
    return best


def _cold_start(terms: RemovalTerms) -> tuple[Tensor, Tensor]:
    n, r = len(terms.units), terms.removals
    share = torch.full((n,), r / n, dtype=torch.float64, device=terms.units.device)
    share[terms.single_costs().argsort()[:r]] += 1.0
    return share.div_(2), torch.full_like(share, _FIRST_SHAPE)


def _alternate(
    terms: RemovalTerms, effort: Effort, share: Tensor, shape: Tensor, cutoff: float
) -> Relaxation:
    """Update the multipliers for the minimizer, and the minimizer for the multipliers."""
    best: Relaxation | None = None
    value = -math.inf
    for _ in range(effort.rounds):
        current = _update(terms, share, shape, effort.steps)
        best = current if best is None else _better(best, current)
        share, shape = (share + current.bound.point) / 2, current.bound.shape
        del current  # it holds a matrix
        before, value = value, best.value
        if value >= cutoff or value - before < effort.progress * (value - terms.constant):
            break
    assert best is not None
    return best


def _update(terms: RemovalTerms, share: Tensor, shape: Tensor, steps: int) -> Relaxation:
    a, Q, magnitudes = terms.aggregate(share, shape)
    Q = (Q + Q.T).div_(2)
    margin = terms.rounding.margin(len(terms.units))
    q = scaled_diagonal(Q, shape, margin)
    point = (share * (terms.removals / float(share.sum()))).clamp_(0.0, 1.0)
    first = QuadraticBound(a, Q, terms.removals, q, point, magnitudes, margin)
    return Relaxation(terms, share, shape, minimize(first, steps))


def _tightened(relaxation: Relaxation, effort: Effort) -> Relaxation:
    return _better(relaxation, replace(relaxation, bound=tighten(relaxation.bound, effort.steps)))


def _better(one: Relaxation, other: Relaxation) -> Relaxation:
    return other if other.value > one.value else one
