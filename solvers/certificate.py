"""A lower bound as numbers that anyone can check against the problem alone.

For any matrix Y with the rows of the weights, any q, and any x between 0 and 1 with n - k as its
sum, write ``A = inv(H)``, ``a_i = tr(Y_i' (A G)_i)``, and ``Q_ij`` for the sum over the block ij of
the element-wise product of A and Y Y' (all summed over the consumers),

    E(S)  >=  e - tr(G' A G)  -  x'(Diag(q) - Q) x  +  the n - k least entries of g,
              g = 2 a - q + 2 (Diag(q) - Q) x

for every support S of k units, provided that ``Diag(q) - Q`` is positive semidefinite; what is
added to ``e - tr(G'AG)`` may be raised to zero, since removing units never lowers the loss.  Proof:
the loss is ``e - tr(G'AG)`` plus ``max over Y_R of 2 tr(Y_R'(AG)_R) - tr(Y_R' A_RR Y_R)``, R being
the removed units; one Y for all R makes that ``2 a'x - x'Q x`` on indicators x of R, where
``x_j = x_j^2``; the rest is the tangent of a convex function.  So it does not matter how Y, q and x
were found, and the code below shares nothing with the code that finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from solvers.errors import VerificationError
from solvers.problem import NO_ROW, Consumer, SubsetProblem


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
        removals = problem.units - problem.keep
        self._check_ranges(problem.units, removals)
        total, a, Q = 0.0, torch.zeros_like(self.q), torch.diag(torch.zeros_like(self.q))
        for consumer in problem.consumers:
            loss, a_c, Q_c = self._consumer_terms(consumer)
            total, a, Q = total + loss, a + a_c, Q + Q_c
        P = torch.diag(self.q) - Q
        scale = self.q.rsqrt()
        if int(torch.linalg.cholesky_ex(P * scale[:, None] * scale).info):
            raise VerificationError("the certificate's q does not dominate Q: no bound follows")
        Px = P @ self.point
        g = 2 * a - self.q + 2 * Px
        cost = float(g.sort().values[:removals].sum()) - float(self.point @ Px)
        return total + max(cost, 0.0)

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

    def _consumer_terms(self, consumer: Consumer) -> tuple[float, Tensor, Tensor]:
        """Return ``e - tr(G'AG)``, a and Q of one consumer."""
        owner = torch.empty(len(consumer.H), dtype=torch.int64, device=consumer.H.device)
        units = torch.arange(len(consumer.rows), device=owner.device)
        present = consumer.rows != NO_ROW
        owner[consumer.rows[present]] = units[:, None].expand_as(consumer.rows)[present]
        A = torch.linalg.inv(consumer.H)
        A = (A + A.T) / 2
        W = A @ consumer.G
        x = self.share[owner]
        same = owner[:, None] == owner
        penalty = torch.where(same, (self.shape[owner] * (1 / x - 1))[:, None] * A, 0.0)
        Y = torch.linalg.solve(A + penalty, W) / x[:, None]
        a = torch.zeros_like(self.q).index_add_(0, owner, (Y * W).sum(1))
        Q_rows = torch.zeros(len(units), len(A), dtype=A.dtype, device=A.device)
        Q_rows.index_add_(0, owner, A * (Y @ Y.T))
        Q = torch.zeros_like(Q_rows[:, : len(units)]).contiguous().index_add_(1, owner, Q_rows)
        loss = consumer.e + float((W * (consumer.H @ W - 2 * consumer.G)).sum())
        return loss, a, Q
