"""A lower bound as numbers that anyone can check against the problem alone.

For any matrix Y with the rows of the weights, any q, and any x, write ``A = inv(H)``,
``a_i = tr(Y_i' (A G)_i)``, and ``Q_ij`` for the sum over the block ij of the element-wise product
of A and Y Y' (all summed over the consumers),

    E(S)  >=  e - tr(G' A G)  -  x'(Diag(q) - Q) x  +  the n - k least entries of g,
              g = 2 a - q + 2 (Diag(q) - Q) x

for every support S of k units, provided that ``Diag(q) - Q`` is positive semidefinite; what is
added to ``e - tr(G'AG)`` may be raised to zero, as removing units never lowers the loss.  Proof:
the loss is ``e - tr(G'AG)`` plus ``max over Y_R of 2 tr(Y_R'(AG)_R) - tr(Y_R' A_RR Y_R)``, R being
the removed units; one Y for all R makes that ``2 a'x - x'Q x`` on indicators x of R, where
``x_j = x_j^2``; the rest is the tangent of a convex function.  So it does not matter how Y, q and x
were found, and the code below shares nothing with the code that finds them but the analysis of
rounding (`solvers.linalg.rounding`).

Large multipliers cancel: what rounding can have done to each of these sums is taken off it, in
proportion to the magnitudes that were summed up, so that no q makes a bound of rounding.

The multipliers come from moments: a mean x of the indicators of the removed units, and their
correlation.  Where they are moments (``X - xx'`` positive semidefinite, ``diag X = x``, ``sum x``
the number of removed units), the same numbers give a *limit*: no Y, q and tangent prove more than
``e - tr(G'AG) + tr(W'D inv(A o X) D W)``, with W = A G and D = Diag(x).  Proof: what is added to
``e - tr(G'AG)`` is at most ``(2 a - q)'x + x'(Diag(q) - Q) x``, as that is convex; this at most
``2 a'x - tr(Q X)``, as ``Diag(q) - Q`` and ``X - xx'`` are positive semidefinite and diag X = x;
and this, as a function of Y, at most the last term.

The same holds among the supports that remove some units and keep others, with A and ``A G``
conditioned on both (`Inverses.given`), and g tells more than the bound: by how much it rises for
the supports in which one unit goes, or stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from solvers.errors import require
from solvers.linalg.rounding import Magnitudes, Rounding
from solvers.problem import Consumer, SubsetProblem

_EPS = torch.finfo(torch.float64).eps

Terms: TypeAlias = tuple[Tensor, Tensor, Magnitudes]
"""Of b nodes: a, (b, f), Q, (b, f, f), and the magnitudes of what they were summed up of."""


@dataclass(frozen=True, eq=False)
class Inverses:
    """``A`` and ``A G`` of every consumer, the rows ordered by unit.

    consumers: A, (n w, n w), and A G, (n w, m), of each, with the rows w of its units; more than
        n w responses are rotated into n w.
    constant: ``e - tr(G' A G)``, summed over the consumers: the loss with all units kept.
    units: Their number n.
    rounding: How far A, A G and the constant can be from the exact ones.
    """

    consumers: tuple[tuple[Tensor, Tensor, int], ...]
    constant: float
    units: int
    rounding: Rounding

    @classmethod
    def of(cls, problem: SubsetProblem) -> Inverses:
        """Invert every Hessian of a problem."""
        A_W, constants, roundings = zip(*map(_inverse, problem.consumers), strict=True)
        widths = [consumer.width for consumer in problem.consumers]
        return cls(
            tuple((A, W, width) for (A, W), width in zip(A_W, widths, strict=True)),
            sum(constants),
            problem.units,
            sum(roundings[1:], roundings[0]),
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.consumers[0][0].device

    @property
    def unit(self) -> float:
        """Rounding of the sums that evaluate a bound, relative to the sum of their magnitudes."""
        return max(Magnitudes.unit_of(W.shape[1], w, self.units) for _, W, w in self.consumers)

    def proved(self, loss: float) -> float:
        """Turn a lower bound of computed losses into one of exact ones (VerificationError)."""
        finite = math.isfinite(loss) and math.isfinite(self.constant)
        require(finite, f"the certificate proves {loss}, which is no bound")
        cost = torch.tensor(loss - self.constant, dtype=torch.float64)
        return float(self.rounding.certified(self.constant, cost))

    def unconditioned(self) -> ConditionedNodes:
        """Return the node that leaves all units free."""
        parts = tuple((A[None], W[None], width) for A, W, width in self.consumers)
        spent = torch.full((1,), self.constant, dtype=torch.float64, device=self.device)
        return ConditionedNodes(parts, spent, self.unit)

    def given(self, removed: Tensor, free: Tensor) -> ConditionedNodes:
        """Condition on units that go, (b, r), and on those that stay: all but the `free`, (b, f).

        Removing R costs ``tr(W_R' inv(A_RR) W_R)`` with W = A G, and leaves for the free units F
        ``A_FF - A_FR inv(A_RR) A_RF`` and ``W_F - A_FR inv(A_RR) W_R``.
        """
        parts, spent = [], torch.zeros(len(free), dtype=torch.float64, device=free.device)
        for A, W, width in self.consumers:
            f, r = _rows(free, width), _rows(removed, width)
            A_f, W_f = A[f[:, :, None], f[:, None, :]], W[f]
            if r.shape[1]:
                A_fr = A[f[:, :, None], r[:, None, :]]
                A_rr = A[r[:, :, None], r[:, None, :]]
                solved = torch.linalg.solve(A_rr, torch.cat([A_fr.mT, W[r]], 2))
                spent = spent + (W[r] * solved[:, :, A_f.shape[2] :]).sum((1, 2))
                A_f = A_f - A_fr @ solved[:, :, : A_f.shape[2]]
                W_f = W_f - A_fr @ solved[:, :, A_f.shape[2] :]
            parts.append((A_f, W_f, width))
        return ConditionedNodes(tuple(parts), self.constant + spent, self.unit)


@dataclass(frozen=True, eq=False)
class ConditionedNodes:
    """What is left of a problem in b nodes that each leave f units free.

    consumers: Conditioned A, (b, f w, f w), and A G, (b, f w, m), of each, and w.
    spent: Loss of the units that go, with all free ones kept, (b,).
    unit: Rounding of the sums that evaluate a bound, relative to the sum of their magnitudes.
    """

    consumers: tuple[tuple[Tensor, Tensor, int], ...]
    spent: Tensor
    unit: float

    def aggregate(self, x: Tensor, ratio: Tensor) -> Terms:
        """Return a, Q and magnitudes for ``Y = inv(A o ratio) A G / x``.

        x: (b, f).
        ratio: Of ``X_ij`` to ``x_i x_j`` for units i and j, (b, f, f).
        """
        b, f = x.shape
        a, a_size, Q_size = torch.zeros(3, b, f, dtype=x.dtype, device=x.device)
        Q = x.new_zeros(b, f, f)
        for A, W, w in self.consumers:
            Y = torch.cholesky_solve(W, cholesky(by_row(ratio, w) * A))
            Y /= x.repeat_interleave(w, 1)[:, :, None]
            terms = Y * W
            a += terms.reshape(b, f, -1).sum(2)
            a_size += terms.abs_().reshape(b, f, -1).sum(2)
            Q += (Y @ Y.mT).mul_(A).view(b, f, w, f, w).sum((2, 4))
            # |A_rs| <= sqrt(A_rr A_ss) bounds every term of Q_ij by a product of two numbers.
            rows = Y.norm(dim=2) * A.diagonal(dim1=1, dim2=2).sqrt()
            Q_size = torch.hypot(Q_size, rows.view(b, f, w).sum(2))
        return a, (Q + Q.mT) / 2, Magnitudes(a_size, Q_size, self.unit)

    def linearize(self, terms: Terms, q: Tensor, point: Tensor, removals: int) -> Linearization:
        """Evaluate the bound of the module's text in every node.

        Raises VerificationError if ``Diag(q) - Q`` is not positive semidefinite in some node, or
            numbers overflow.
        """
        a, Q, magnitudes = terms
        P = _dominating(Q, q)
        Px = (P @ point[:, :, None])[:, :, 0]
        g = 2 * a - q + 2 * Px
        lost = magnitudes.lost(q, point)
        ordered = g.sort(1).values
        cost = ordered[:, :removals].sum(1) - (point * Px).sum(1) - lost
        last, following = ordered[:, removals - 1, None], ordered[:, removals : removals + 1]
        base = cost[:, None]
        bounds = Linearization(
            self.spent + cost.clamp(min=0.0),
            self.spent[:, None] + (base + (g - last).clamp(min=0.0)).clamp(min=0.0),
            self.spent[:, None] + (base + (following - g).clamp(min=0.0)).clamp(min=0.0),
        )
        finite = all(bool(torch.isfinite(part).all()) for part in bounds)
        require(finite, "the certificate's numbers overflow: no bound follows")
        return bounds

    def cheapest(self, choices: Tensor) -> Tensor:
        """Return the least loss of removing the units at one of c choices of r places, (b,)."""
        loss = self.spent[:, None].expand(-1, len(choices))
        for A, W, width in self.consumers:
            rows = _rows(choices, width)
            A_r, W_r = A[:, rows[:, :, None], rows[:, None, :]], W[:, rows]
            loss = loss + (W_r * torch.linalg.solve(A_r, W_r)).sum((2, 3))
        return loss.min(1).values


class Linearization(NamedTuple):
    """Lower bounds of the loss in b nodes.

    value: Of every support below the node, (b,).
    goes, stays: Of those in which one free unit goes, or stays, (b, f) each.
    """

    value: Tensor
    goes: Tensor
    stays: Tensor


def _dominating(Q: Tensor, q: Tensor) -> Tensor:
    """Return ``P = Diag(q) - Q``; refuse it unless it is certainly positive definite."""
    P = -Q
    P.diagonal(dim1=1, dim2=2).add_(q)
    scale = q.rsqrt()
    scaled = (P * scale[:, :, None]).mul_(scale[:, None, :])
    check_definite(scaled, "q does not dominate Q: no bound follows")
    return P


def check_definite(scaled: Tensor, otherwise: str) -> None:
    """Refuse matrices with entries of at most 1, (b, n, n), which are overwritten.

    Less ``2 n (n + 2) eps`` on its diagonal, each has to have a Cholesky factor (Rump,
    "Verification of positive definiteness", BIT 46, 2006).
    """
    n = scaled.shape[1]
    scaled.diagonal(dim1=1, dim2=2).sub_(2 * n * (n + 2) * _EPS)
    finite = bool(torch.isfinite(scaled).all())
    definite = finite and bool((torch.linalg.cholesky_ex(scaled).info == 0).all())
    require(definite, f"the certificate's {otherwise}")


def moment_ratio(x: Tensor, correlation: Tensor) -> Tensor:
    """Return ``X_ij / (x_i x_j)``, (n, n), for means x, (n,), and correlations, (n, n)."""
    s = (1 / x - 1).sqrt()
    return (correlation * s[:, None]).mul_(s).add_(1.0)


def by_row(ratio: Tensor, width: int) -> Tensor:
    """Repeat entries for units, (..., f, f), for their rows, (..., f w, f w)."""
    if width == 1:
        return ratio
    return ratio.repeat_interleave(width, -2).repeat_interleave(width, -1)


def cholesky(matrices: Tensor) -> Tensor:
    """Return Cholesky factors of matrices, (b, p, p)."""
    factored = torch.linalg.cholesky_ex(matrices)
    definite = bool((factored.info == 0).all())
    require(definite, "the certificate's moments give no multipliers")
    factors: Tensor = factored.L
    return factors


def _inverse(consumer: Consumer) -> tuple[tuple[Tensor, Tensor], float, Rounding]:
    """Return A and A G with the rows ordered by unit, ``e - tr(G' A G)``, and their rounding."""
    H = consumer.H
    factor = torch.linalg.cholesky(H)
    A = torch.cholesky_inverse(factor)
    W = torch.cholesky_solve(consumer.G, factor)
    del factor  # a matrix, which the next line has need of
    responses = W.shape[1]
    rounding, constant = Rounding.of(H, A, consumer.G, W, consumer.e, responses)
    order = consumer.rows.flatten()
    A, W = A[order[:, None], order], W[order]
    if responses > len(order):  # only W W' matters
        W = torch.linalg.qr(W.T, mode="r").R.T
    return (A, W), constant, rounding


def _rows(units: Tensor, width: int) -> Tensor:
    """Return the rows, (b, u w), of some units, (b, u)."""
    offsets = torch.arange(width, device=units.device)
    return (units[:, :, None] * width + offsets).flatten(1)


LEAST_SHARE = 1e-3
"""Multipliers of a tree are computed as if every unit were removed at least so often."""

LEAST_DIAGONAL = 1e-10
"""Diagonal entries of Q below this share of the largest count as that."""

_MOST_SUPPORTS = 20_000
"""As many as 16 units have, and some more."""

_BATCH_ELEMENTS = 1 << 20
"""Elements of the blocks of one batch of supports."""

_EPS = torch.finfo(torch.float64).eps

_NUMBERS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@dataclass(frozen=True, eq=False)
class EnumerationCertificate:
    """The evidence that there are few enough supports to compute the loss of each."""

    def bound(self, problem: SubsetProblem) -> float:
        """Return the least loss of all supports, at most 20,000 (VerificationError)."""
        removals = problem.units - problem.keep
        require(
            (supports := math.comb(problem.units, removals)) <= _MOST_SUPPORTS,
            f"the certificate enumerates {supports} supports; at most {_MOST_SUPPORTS} are allowed",
        )
        inverses = Inverses.of(problem)
        return inverses.proved(_least_loss(inverses, removals))


def _least_loss(inverses: Inverses, removals: int) -> float:
    """Return the least loss, as computed, of all supports that lack so many units."""
    nodes = inverses.unconditioned()
    rows = max((removals * width) ** 2 for _, _, width in inverses.consumers)
    choices = iter(combinations(range(inverses.units), removals))
    least = torch.full((1,), math.inf, dtype=torch.float64, device=inverses.device)
    while batch := list(islice(choices, max(_BATCH_ELEMENTS // max(rows, 1), 1))):
        some = torch.tensor(batch, dtype=torch.int64, device=inverses.device)
        # Of two numbers of Python, the lesser is not NaN where one of them is.
        least = torch.minimum(least, nodes.cheapest(some.view(len(batch), removals)))
    return float(least)


@dataclass(frozen=True, eq=False)
class MultiplierCertificate:
    """A point of the relaxation, from which the bound of the module's text follows.

    share, shape: (n,) in (0, 1] and (n,) positive.
    correlation: (n (n - 1) / 2,) float32, the entries R_ij below the diagonal, row by row.  With
        ``s = (1/share - 1)^1/2`` these three stand for ``Y = inv(A o C) A G / share``, where C is
        ``1 + R_ij s_i s_j`` in the rows of units i and j, and ``1 + shape_i s_i^2`` where i = j.
    q: Diagonal, (n,), positive.
    point: x, (n,), in [0, 1].
    """

    share: Tensor
    shape: Tensor
    correlation: Tensor
    q: Tensor
    point: Tensor

    def bound(self, problem: SubsetProblem) -> float:
        """Recompute the lower bound from the problem, in float64.

        Raises VerificationError if a number is out of its range, or ``Diag(q) - Q`` is not positive
            semidefinite.
        """
        inverses = Inverses.of(problem)
        return inverses.proved(float(self.linearization(inverses, problem.keep).value))

    def limit(self, problem: SubsetProblem) -> float:
        """Recompute from the problem, in float64, what no bound of this kind can exceed.

        Raises VerificationError if a number is out of its range, or share and correlation are no
            moments of choices of so many units.
        """
        inverses = Inverses.of(problem)
        self._check(inverses)
        n, removals = problem.units, problem.units - problem.keep
        sums_up = abs(math.fsum(self.share.tolist()) - removals) <= n * _EPS * removals
        require(sums_up, f"the certificate's share does not sum up to {removals}")
        correlation = self._correlation(1.0)
        check_definite(correlation.clone()[None], "correlation is not positive definite")
        ratio = moment_ratio(self.share, correlation)
        cost = 0.0
        for A, W, width in inverses.consumers:
            factor = cholesky((by_row(ratio, width) * A)[None])[0]
            solved = torch.linalg.solve_triangular(factor, W, upper=False)
            cost += float(solved.square().sum(1).sum())
        limit = inverses.rounding.exceeded(inverses.constant, cost)
        require(math.isfinite(limit), f"the certificate's limit is {limit}")
        return limit

    def linearization(self, inverses: Inverses, keep: int) -> Linearization:
        """Return the bound with its slopes, of one node that leaves all units free."""
        removals = inverses.units - keep
        require(removals > 0, "nothing is removed, so there is nothing to certify")
        self._check(inverses)
        nodes = inverses.unconditioned()
        ratio = moment_ratio(self.share, self._correlation(self.shape))
        terms = nodes.aggregate(self.share[None], ratio[None])
        return nodes.linearize(terms, self.q[None], self.point[None], removals)

    def _correlation(self, diagonal: Tensor | float) -> Tensor:
        """Return the correlation, (n, n), with that diagonal."""
        n = len(self.share)
        i, j = torch.tril_indices(n, n, -1, device=self.share.device)
        whole = self.share.new_zeros(n, n)
        whole[i, j] = whole[j, i] = self.correlation.double()
        whole.diagonal().add_(diagonal)
        return whole

    def _check(self, inverses: Inverses) -> None:
        n = inverses.units
        for name in ("share", "shape", "correlation", "q", "point"):
            value, packed = getattr(self, name), name == "correlation"
            size = (n * (n - 1) // 2,) if packed else (n,)
            check_numbers(f"certificate's {name}", value, size, inverses.device)
            dtype = torch.float32 if packed else torch.float64
            require(value.dtype == dtype, f"the certificate's {name} must be {dtype} numbers")
        positive = all(float(one.min()) > 0 for one in (self.share, self.q, self.shape))
        require(positive, "the certificate's share, q and shape must be positive")
        related = n == 1 or float(self.correlation.abs().max()) <= 1
        require(related, "the certificate's correlation must be in [-1, 1]")
        for name in ("share", "point"):
            check_range(f"certificate's {name}", getattr(self, name))


def check_numbers(name: str, value: Any, size: tuple[int, ...], device: torch.device) -> None:
    """Refuse what is no tensor of finite numbers of this size and device."""
    here = isinstance(value, Tensor) and value.device == device
    require(here, f"the {name} must be a tensor on {device}")
    # Of others, many operations are not defined, nor do complex numbers compare.
    dense = value.layout is torch.strided and not value.is_nested and value.dtype in _NUMBERS
    require(dense, f"the {name} must be a dense tensor of real numbers")
    right = tuple(value.shape) == size and bool(torch.isfinite(value).all())
    require(right, f"the {name} must be {' x '.join(map(str, size))} finite numbers")


def check_range(name: str, numbers: Tensor) -> None:
    """Refuse a share, or a point, outside of [0, 1]: far away, a tangent is all rounding."""
    inside = float(numbers.min()) >= 0 and float(numbers.max()) <= 1
    require(inside, f"the {name} must be in [0, 1]")
