"""A lower bound as numbers that anyone can check against the problem alone.

For any matrix Y with the rows of the weights, any q, and any x, write ``A = inv(H)``,
``a_i = tr(Y_i' (A G)_i)``, and ``Q_ij`` for the sum over the block ij of the element-wise product
of A and Y Y' (all summed over the consumers),

    E(S)  >=  e - tr(G' A G)  -  x'(Diag(q) - Q) x  +  the n - k least entries of g,
              g = 2 a - q + 2 (Diag(q) - Q) x

for every support S of k units, provided that ``Diag(q) - Q`` is positive semidefinite; what is
added to ``e - tr(G'AG)`` may be raised to zero, since removing units never lowers the loss.  Proof:
the loss is ``e - tr(G'AG)`` plus ``max over Y_R of 2 tr(Y_R'(AG)_R) - tr(Y_R' A_RR Y_R)``, R being
the removed units; one Y for all R makes that ``2 a'x - x'Q x`` on indicators x of R, where
``x_j = x_j^2``; the rest is the tangent of a convex function.  So it does not matter how Y, q and x
were found, and the code below shares nothing with the code that finds them.

The same holds among the supports that remove some units and keep others, with A and ``A G``
conditioned on both (`Inverses.given`), and g tells more than the bound: by how much it rises for
the supports in which one unit goes, or stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from solvers.errors import VerificationError
from solvers.problem import NO_ROW, Consumer, SubsetProblem

LEAST_SHARE = 1e-3
"""Multipliers are computed as if every unit were removed with at least this probability."""

LEAST_DIAGONAL = 1e-10
"""Diagonal entries of Q below this share of the largest count as that."""


class Certificate(Protocol):
    """Evidence for a lower bound."""

    def bound(self, problem: SubsetProblem) -> float:
        """Recompute the lower bound from the problem.

        Raises
        ------
        VerificationError
            If the evidence does not prove any bound.
        """


@dataclass(frozen=True, eq=False)
class MultiplierCertificate:
    """A point of the relaxation, from which the bound of the module's text follows.

    Parameters
    ----------
    share, shape
        (n,) in (0, 1] and (n,) positive; they stand for ``Y = inv(A + shape (1/share - 1) o
        blockdiag(A)) A G / share``.
    q
        Diagonal, (n,).
    point
        x, (n,).
    """

    share: Tensor
    shape: Tensor
    q: Tensor
    point: Tensor

    def bound(self, problem: SubsetProblem) -> float:
        """Recompute the lower bound from the problem, in float64.

        Raises
        ------
        VerificationError
            If a number is out of its range, or ``Diag(q) - Q`` is not positive semidefinite.
        """
        return float(self.linearization(Inverses.of(problem), problem.keep).value)

    def linearization(self, inverses: Inverses, keep: int) -> Linearization:
        """Return the bound with its slopes, of one node that leaves all units free."""
        removals = inverses.units - keep
        self._check_ranges(inverses.units, removals)
        nodes = inverses.unconditioned()
        a, Q = nodes.aggregate(self.share[None], self.shape[None])
        return nodes.linearize(a, Q, self.q[None], self.point[None], removals)

    def _check_ranges(self, n: int, removals: int) -> None:
        for name in ("share", "shape", "q", "point"):
            value = getattr(self, name)
            if value.shape != (n,) or not bool(torch.isfinite(value).all()):
                raise VerificationError(f"the certificate's {name} must be {n} finite numbers")
        if float(self.share.min()) <= 0 or float(self.share.max()) > 1:
            raise VerificationError("the certificate's share must be in (0, 1]")
        if float(self.q.min()) <= 0 or float(self.shape.min()) <= 0:
            raise VerificationError("the certificate's q and shape must be positive")
        if removals <= 0:
            raise VerificationError("nothing is removed, so there is nothing to certify")


@dataclass(frozen=True, eq=False)
class Inverses:
    """``A`` and ``A G`` of every consumer, the rows ordered by unit.

    Parameters
    ----------
    consumers
        A, (n w, n w), and A G, (n w, m), of each, with the rows w of its units; short units are
        filled up with rows of the unit matrix and of zeros, which add nothing anywhere, and more
        than n w responses are rotated into n w.
    constant
        ``e - tr(G' A G)``, summed over the consumers: the loss with all units kept.
    units
        Their number n.
    """

    consumers: tuple[tuple[Tensor, Tensor, int], ...]
    constant: float
    units: int

    @classmethod
    def of(cls, problem: SubsetProblem) -> Inverses:
        """Invert every Hessian of a problem."""
        parts = [_inverse(consumer) for consumer in problem.consumers]
        return cls(
            tuple((A, W, c.width) for (A, W, _), c in zip(parts, problem.consumers, strict=True)),
            sum(constant for _, _, constant in parts),
            problem.units,
        )

    def unconditioned(self) -> ConditionedNodes:
        """Return the node that leaves all units free."""
        parts = tuple((A[None], W[None], width) for A, W, width in self.consumers)
        spent = torch.full((1,), self.constant, dtype=torch.float64, device=parts[0][0].device)
        return ConditionedNodes(parts, spent)

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
        return ConditionedNodes(tuple(parts), self.constant + spent)


@dataclass(frozen=True, eq=False)
class ConditionedNodes:
    """What is left of a problem in b nodes that each leave f units free.

    Parameters
    ----------
    consumers
        Conditioned A, (b, f w, f w), and A G, (b, f w, m), of each, and w.
    spent
        Loss of the units that go, with all free ones kept, (b,).
    """

    consumers: tuple[tuple[Tensor, Tensor, int], ...]
    spent: Tensor

    def aggregate(self, share: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        """Return a, (b, f), and Q, (b, f, f), of the multipliers of `share` and `shape`, (b, f)."""
        x = share.clamp(LEAST_SHARE, 1.0)
        b, f = x.shape
        a = torch.zeros_like(x)
        Q = x.new_zeros(b, f, f)
        for A, W, w in self.consumers:
            M = A.clone()
            blocks = M.view(b, f, w, f, w).diagonal(dim1=1, dim2=3)
            blocks.mul_((1 + shape * (1 / x - 1))[:, None, None, :])
            Y = torch.cholesky_solve(W, torch.linalg.cholesky(M, out=M))
            Y /= x.repeat_interleave(w, 1)[:, :, None]
            del M, blocks
            a += (Y * W).reshape(b, f, -1).sum(2)
            Q += (Y @ Y.mT).mul_(A).view(b, f, w, f, w).sum((2, 4))
        return a, (Q + Q.mT) / 2

    def linearize(
        self, a: Tensor, Q: Tensor, q: Tensor, point: Tensor, removals: int
    ) -> Linearization:
        """Evaluate the bound of the module's text in every node.

        Raises
        ------
        VerificationError
            If ``Diag(q) - Q`` is not positive semidefinite in some node.
        """
        P = -Q
        P.diagonal(dim1=1, dim2=2).add_(q)
        scale = q.rsqrt()
        scaled = (P * scale[:, :, None]).mul_(scale[:, None, :])
        if bool(torch.linalg.cholesky_ex(scaled).info.any()):
            raise VerificationError("the certificate's q does not dominate Q: no bound follows")
        Px = (P @ point[:, :, None])[:, :, 0]
        g = 2 * a - q + 2 * Px
        ordered = g.sort(1).values
        cost = ordered[:, :removals].sum(1) - (point * Px).sum(1)
        last, following = ordered[:, removals - 1, None], ordered[:, removals : removals + 1]
        base = cost[:, None]
        return Linearization(
            self.spent + cost.clamp(min=0.0),
            self.spent[:, None] + (base + (g - last).clamp(min=0.0)).clamp(min=0.0),
            self.spent[:, None] + (base + (following - g).clamp(min=0.0)).clamp(min=0.0),
        )

    def cheapest(self, choices: Tensor) -> Tensor:
        """Return the least loss of removing the units at one of c choices of r places, (b,)."""
        loss = self.spent[:, None].expand(-1, len(choices))
        for A, W, width in self.consumers:
            rows = _rows(choices, width)
            A_r, W_r = A[:, rows[:, :, None], rows[:, None, :]], W[:, rows]
            loss = loss + (W_r * torch.linalg.solve(A_r, W_r)).sum((2, 3))
        return loss.min(1).values


@dataclass(frozen=True, eq=False)
class Linearization:
    """Lower bounds of the loss in b nodes.

    Parameters
    ----------
    value
        Of every support below the node, (b,).
    goes, stays
        Of those in which one free unit goes, or stays, (b, f) each.
    """

    value: Tensor
    goes: Tensor
    stays: Tensor


def _inverse(consumer: Consumer) -> tuple[Tensor, Tensor, float]:
    """Return A and A G with the rows ordered by unit, and ``e - tr(G' A G)``."""
    A = torch.linalg.inv(consumer.H)
    A = (A + A.T) / 2
    W = A @ consumer.G
    constant = consumer.e + float((W * (consumer.H @ W - 2 * consumer.G)).sum())
    order = consumer.rows.flatten()
    place = torch.nonzero(order != NO_ROW).flatten()
    ordered = torch.eye(len(order), dtype=A.dtype, device=A.device)
    ordered[place[:, None], place] = A[order[place][:, None], order[place]]
    weights = W.new_zeros(len(order), W.shape[1])
    weights[place] = W[order[place]]
    if W.shape[1] > len(order):  # only W W' matters
        weights = torch.linalg.qr(weights.T, mode="r").R.T
    return ordered, weights, constant


def _rows(units: Tensor, width: int) -> Tensor:
    """Return the rows, (b, u w), of some units, (b, u)."""
    offsets = torch.arange(width, device=units.device)
    return (units[:, :, None] * width + offsets).flatten(1)
