"""The strongest bound by common multipliers Y and a diagonal q, found together.

For fixed Y the best q bounds the cost by a semidefinite program, whose dual is over indicators x of
the removed units and their second moments X; exchanging it with the maximization over Y leaves

    min over x, X of  L(x, X) = tr(W' D inv(A o X) D W),      D = Diag(x),
    where  X - xx' is positive semidefinite,  diag X = x,  sum x = r

(summed over the consumers, a unit's x and X repeated for its rows).  L is convex; its gradient is
2 a in x and -Q in X, those of the maximizer ``Y = inv(A o X) D W``.  So what minimizes it over x
and X to first order is that semidefinite program again: this is the method of Frank and Wolfe ("An
algorithm for quadratic programming", Naval Research Logistics Quarterly 3, 1956).  With the barrier
that solves it, ``L - mu log det(X - xx')`` descends (Bredies, Lorenz and Maass, "A generalized
conditional gradient method and its connection to an iterative shrinkage method", Computational
Optimization and Applications 42, 2009).  Each Y gives a bound, and each (x, X) a limit, L(x, X),
that no bound with any common Y and q can exceed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.bounds.quadratic import (
    QuadraticBound,
    improved,
    inverse_of,
    minimize,
    scaled_diagonal,
    tighten,
)
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import MultiplierCertificate

_FIRST_SHAPE = 1.25
_FIRST_ROUNDS = 6
_FIRST_PROGRESS = 2e-3
"""Multipliers for independent units are updated until a round gains less than this share."""

_INWARDS = 6e-3
"""How far x is moved towards ``r / n``, so that no unit goes, or stays, in all that is mixed."""

_BARRIERS = (0.1, 0.86, 0.002)
"""The first barrier of the semidefinite program, by what each next is multiplied, the least."""

_SHAPES = (1.25, 0.75)
"""The first shape, and what is left of what it has beyond 1 from round to round."""

_FIRST_STEP = 0.3
_MOST_STEP = 0.35
_FACTORS = (0.5, 1.7)
_TRIES = 3
"""Steps towards new moments: the first that is tried, the largest, by what one that is tried is
multiplied to be smaller or larger, and how many are tried."""

_NEWTON_STEPS = 2


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    rounds: The most updates of multipliers and diagonal together; each takes 10 n^3 + 8 n^2 m.
    steps: The most gradient steps in each minimization over the polytope.
    """

    rounds: int = 8
    steps: int = 50


@dataclass(frozen=True, eq=False)
class Moments:
    """Means x in [0, 1], (n,), and covariance X - xx', (n, n), of the indicators of removal.

    The diagonal of the covariance is x (1 - x).
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def independent(cls, mean: Tensor) -> Moments:
        """Return those of units that are removed independently of each other."""
        return cls(mean, torch.diag(mean * (1 - mean)))

    @property
    def correlation(self) -> Tensor:
        """The covariance relative to its diagonal, (n, n), without that, and of float32 numbers."""
        scale = (self.mean * (1 - self.mean)).rsqrt()
        correlation = (self.covariance * scale[:, None]).mul_(scale).float().double()
        correlation.diagonal().zero_()
        return correlation

    def most(self, bound: QuadraticBound) -> float:
        """Return what no diagonal and point make of the multipliers of some bound."""
        second = self.mean @ bound.Q @ self.mean + (bound.Q * self.covariance).sum()
        return float(2 * bound.a @ self.mean - second)

    def towards(self, other: Moments, step: float) -> Moments:
        """Return the moments of a mixture that has the share `step` of others."""
        moved = self.mean - other.mean
        covariance = torch.lerp(self.covariance, other.covariance, step)
        covariance.addr_(moved, moved, alpha=step * (1 - step))
        return Moments((1 - step) * self.mean + step * other.mean, covariance)


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A bound for the supports that the terms leave open.

    share, shape, correlation: What the multipliers were computed from
        (`ConsumerRemoval.multipliers`): how likely each free unit is removed, (n,), the diagonal q
        relative to that of Q, (n,), and how removals go together, (n, n), None if they do not.
    bound: The bound of the cost of removing ``terms.removals`` free units.
    """

    terms: RemovalTerms
    share: Tensor
    shape: Tensor
    bound: QuadraticBound
    correlation: Tensor | None = None

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
        n = len(self.share)
        i, j = torch.tril_indices(n, n, -1, device=self.share.device)
        if self.correlation is None:
            packed = torch.zeros(len(i), dtype=torch.float32, device=self.share.device)
        else:
            packed = self.correlation[i, j].float()
        point = self.bound.point
        return MultiplierCertificate(self.share, self.shape, packed, self.bound.q, point)

    @property
    def claim(self) -> tuple[float, MultiplierCertificate | None]:
        """The bound and its evidence; zero where rounding forbids any, which needs none."""
        value = self.value
        return (value, self.certificate) if math.isfinite(value) else (0.0, None)


def relax(terms: RemovalTerms, effort: Effort, *, cutoff: float = math.inf) -> Relaxation:
    """Bound the loss of every support that `terms` leave open, until it reaches a cutoff."""
    first = alternate(terms, effort.steps, cutoff=cutoff)
    if first.value >= cutoff:
        return first
    if not effort.rounds:
        return _alone(first, effort)
    found, most = _together(first, effort, cutoff)
    # Near a singular H the steps may need more rounds than there are.
    if math.isfinite(found.value) and found.bound.value >= most:
        return found
    alone = _alone(first, effort)
    return better(alone, found)


def _alone(first: Relaxation, effort: Effort) -> Relaxation:
    """Return the relaxation with the best diagonal for its multipliers."""
    return better(first, replace(first, bound=tighten(first.bound, effort.steps)))


def alternate(
    terms: RemovalTerms,
    steps: int,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    rounds: int = _FIRST_ROUNDS,
    cutoff: float = math.inf,
) -> Relaxation:
    """Update multipliers for independent units with the minimizer, and that with the multipliers.

    start: Share and shape of the first multipliers; by default those units are favoured that cost
        least if they alone are removed.
    """
    if start is None:
        n, r, device = terms.units, terms.removals, terms.consumers[0].A.device
        share = torch.full((n,), r / n, dtype=torch.float64, device=device)
        share[terms.costs(torch.arange(n, device=device)[:, None]).argsort()[:r]] += 1.0
        start = share.div_(2), torch.full_like(share, _FIRST_SHAPE)
    share, shape = start
    best: Relaxation | None = None
    value = -math.inf
    for _ in range(rounds):
        current = _update(terms, share, shape, steps)
        best = current if best is None else better(best, current)
        share, shape = (share + current.bound.point) / 2, current.bound.shape
        del current  # it holds a matrix
        before, value = value, best.value
        if value >= cutoff or value - before < _FIRST_PROGRESS * (value - terms.constant):
            break
    assert best is not None
    return best


def better(one: Relaxation, other: Relaxation) -> Relaxation:
    """Return the one with the higher bound."""
    return other if other.value > one.value else one


def _inner(terms: RemovalTerms, share: Tensor) -> Tensor:
    """Return a point of the polytope moved off its faces."""
    return torch.lerp(share, torch.full_like(share, terms.removals / len(share)), _INWARDS)


def _summing_up(terms: RemovalTerms, mean: Tensor) -> Tensor:
    """Return means, of which each mixture has rounded the sum, that sum up."""
    return mean * (terms.removals / math.fsum(mean.tolist()))


def _update(terms: RemovalTerms, share: Tensor, shape: Tensor, steps: int) -> Relaxation:
    share = _summing_up(terms, _inner(terms, share))
    a, Q, magnitudes = terms.aggregate(share, shape)
    margin = terms.rounding.margin(terms.units)
    q = scaled_diagonal(Q, shape, margin)
    point = (share * (terms.removals / float(share.sum()))).clamp_(0.0, 1.0)
    first = QuadraticBound(a, Q, terms.removals, q, point, magnitudes, margin)
    return Relaxation(terms, share, shape, minimize(first, steps))


def _together(first: Relaxation, effort: Effort, cutoff: float) -> tuple[Relaxation, float]:
    """Find multipliers and diagonal together, and what no bound with the first ones exceeds."""
    terms, found, point = first.terms, first.bound.shape, first.bound.point
    moments, step = Moments.independent(_inner(terms, point)), _FIRST_STEP
    barrier, factor, least_barrier = _BARRIERS
    shape, left = _SHAPES
    ends = [moments]
    for done in range(effort.rounds):
        bound = _bound_at(terms, moments, shape, found, point)
        for _ in range(_NEWTON_STEPS):
            bound = improved(bound, barrier, effort.steps)
        found, point = bound.shape, bound.point
        if terms.certified(bound.value) >= cutoff:
            break
        response = _response(terms, bound)
        weight = barrier * float((point * (1 - point) * bound.q).mean())
        del bound  # it holds a matrix, as does the response
        before, (moments, step) = moments, _moved(terms, moments, response, shape, weight, step)
        del response
        ends = [moments]
        if done == effort.rounds - 1:
            # Bounds jump from round to round: often that of the mean of two moments is better.
            ends.append(moments.towards(before, 0.5))
        del before
        barrier, shape = max(barrier * factor, least_barrier), 1 + left * (shape - 1)
    ends = [replace(end, mean=_summing_up(terms, end.mean)) for end in ends]
    bounds = (minimize(_bound_at(terms, end, 1.0, found, point), effort.steps) for end in ends)
    moments, bound = max(zip(ends, bounds, strict=True), key=lambda pair: pair[1].value)
    bound, ones = tighten(bound, effort.steps), torch.ones_like(moments.mean)
    together = Relaxation(terms, moments.mean, ones, bound, moments.correlation)
    return together, moments.most(first.bound)


def _moved(
    terms: RemovalTerms,
    moments: Moments,
    response: Moments,
    shape: float,
    weight: float,
    step: float,
) -> tuple[Moments, float]:
    """Move moments towards the response to them, if ``L - weight log det(X - xx')`` descends.

    Some steps are tried, beginning from the last; the one taken is returned, too.
    """

    def height(some: Moments) -> float:
        factored = torch.linalg.cholesky_ex(some.covariance)
        if int(factored.info):
            return math.inf
        volume = 2 * float(factored.L.diagonal().log().sum())
        return terms.expected(some.mean, shape, some.correlation) - weight * volume

    start = lowest = height(moments)
    best, chosen, tried = moments, 0.0, min(1.2 * step, _MOST_STEP)
    for _ in range(_TRIES):
        mixed = moments.towards(response, tried)
        value = height(mixed)
        if value < lowest:
            lowest, best, chosen = value, mixed, tried
        elif chosen:
            break
        less, more = _FACTORS
        tried *= more if value < start and more * tried <= _MOST_STEP else less
    return best, chosen or tried


def _bound_at(
    terms: RemovalTerms, moments: Moments, shape: float, found: Tensor, point: Tensor
) -> QuadraticBound:
    """Return the bound of the multipliers that suit some moments, near one already found.

    found, point: Diagonal q relative to that of Q, as rows of multipliers that scale scale both;
        and where it was linearized.
    """
    a, Q, magnitudes = terms.aggregate(moments.mean, shape, moments.correlation)
    margin = terms.rounding.margin(len(found))
    q = scaled_diagonal(Q, found, margin)
    return QuadraticBound(a, Q, terms.removals, q, point, magnitudes, margin)


def _response(terms: RemovalTerms, bound: QuadraticBound) -> Moments:
    """Return moments for which q is best: the covariance is as the inverse of ``Diag(q) - Q``."""
    mean = _inner(terms, bound.point)
    covariance = inverse_of(bound.q, bound.Q)
    scale = (mean * (1 - mean) / covariance.diagonal()).sqrt()
    return Moments(mean, covariance.mul_(scale[:, None]).mul_(scale))
