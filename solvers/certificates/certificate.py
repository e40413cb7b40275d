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
from typing import Any

import torch
from torch import Tensor

from solvers.certificates.inverses import (
    ConditionedNodes,
    Inverses,
    Linearization,
    Terms,
    by_row,
    check_definite,
    cholesky,
    moment_ratio,
)
from solvers.errors import VerificationError
from solvers.problem import SubsetProblem

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
        if not (supports := math.comb(problem.units, removals)) <= _MOST_SUPPORTS:
            raise VerificationError(
                f"the certificate enumerates {supports} supports; at most {_MOST_SUPPORTS} are "
                "allowed"
            )
        inverses = Inverses.of(problem)
        return inverses.proved(_least_loss(inverses, removals))


def _least_loss(inverses: Inverses, removals: int) -> float:
    """Return the least loss, as computed, of all supports that lack so many units."""
    nodes = inverses.unconditioned()
    rows = max((removals * width) ** 2 for _, _, width in inverses.consumers)
    choices = iter(combinations(range(inverses.units), removals))
    least = math.inf
    while batch := list(islice(choices, max(_BATCH_ELEMENTS // max(rows, 1), 1))):
        some = torch.tensor(batch, dtype=torch.int64, device=inverses.device)
        least = min(least, float(nodes.cheapest(some.view(len(batch), removals))))
    return least


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
        if not abs(math.fsum(self.share.tolist()) - removals) <= n * _EPS * removals:
            raise VerificationError(f"the certificate's share does not sum up to {removals}")
        correlation = self._correlation(1.0)
        check_definite(correlation.clone()[None], "correlation is not positive definite")
        ratio = moment_ratio(self.share, correlation)
        cost = 0.0
        for A, W, width in inverses.consumers:
            factor = cholesky((by_row(ratio, width) * A)[None])[0]
            solved = torch.linalg.solve_triangular(factor, W, upper=False)
            cost += float(solved.square().sum(1).sum())
        limit = inverses.rounding.exceeded(inverses.constant, cost)
        if not math.isfinite(limit):
            raise VerificationError(f"the certificate's limit is {limit}")
        return limit

    def linearization(self, inverses: Inverses, keep: int) -> Linearization:
        """Return the bound with its slopes, of one node that leaves all units free."""
        removals = inverses.units - keep
        if not removals > 0:
            raise VerificationError("nothing is removed, so there is nothing to certify")
        nodes, terms = self._terms(inverses)
        return nodes.linearize(terms, self.q[None], self.point[None], removals)

    def _terms(self, inverses: Inverses) -> tuple[ConditionedNodes, Terms]:
        """Return the node that leaves all units free, with the terms of its bound."""
        self._check(inverses)
        nodes = inverses.unconditioned()
        ratio = moment_ratio(self.share, self._correlation(self.shape))
        return nodes, nodes.aggregate(self.share[None], ratio[None])

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
            if value.dtype != dtype:
                raise VerificationError(f"the certificate's {name} must be {dtype} numbers")
        if not (float(self.share.min()) > 0 and float(self.share.max()) <= 1):
            raise VerificationError("the certificate's share must be in (0, 1]")
        if not (float(self.q.min()) > 0 and float(self.shape.min()) > 0):
            raise VerificationError("the certificate's q and shape must be positive")
        if not (n == 1 or float(self.correlation.abs().max()) <= 1):
            raise VerificationError("the certificate's correlation must be in [-1, 1]")
        check_point("certificate", self.point)


def check_numbers(name: str, value: Any, size: tuple[int, ...], device: torch.device) -> None:
    """Refuse what is no tensor of finite numbers of this size and device."""
    if not isinstance(value, Tensor) or value.device != device:
        raise VerificationError(f"the {name} must be a tensor on {device}")
    # Of others, many operations are not defined, nor do complex numbers compare.
    if value.layout is not torch.strided or value.is_nested or value.dtype not in _NUMBERS:
        raise VerificationError(f"the {name} must be a dense tensor of real numbers")
    if tuple(value.shape) != size or not bool(torch.isfinite(value).all()):
        spelled = " x ".join(map(str, size))
        raise VerificationError(f"the {name} must be {spelled} finite numbers")


def check_point(owner: str, point: Tensor) -> None:
    """Refuse a point outside of the unit cube: far away, a tangent is all rounding."""
    if not (float(point.min()) >= 0 and float(point.max()) <= 1):
        raise VerificationError(f"the {owner}'s point must be in [0, 1]")
