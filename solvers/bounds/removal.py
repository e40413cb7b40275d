"""The loss seen from the units that are removed, and its lower bound by common multipliers.

With ``A = inv(H)`` and the unpruned refit ``W = A G``, keeping S and removing R costs

    E(S) = e - tr(G' W) + c(R),      c(R) = tr(W_R' inv(A_RR) W_R)
                                          = max over Y_R of 2 tr(Y_R' W_R) - tr(Y_R' A_RR Y_R).

Multipliers Y that are common to all R therefore bound every support at once: with ``x`` the
indicator of R,

    c(R) >= 2 a'x - x'Q x,     a_i = tr(Y_i' W_i),     Q_ij = sum of the block ij of A o (Y Y')

(o is the element-wise product).  This is a function of n binary variables, whatever the width of
the units and the number of responses, and it adds up over consumers.  The classical perspective
bound replaces A by a diagonal D^-1 >= A before Y is known; here Q is bounded after Y is known.
The rows of Y of different units are far from parallel when there are many responses, so Q is much
closer to its diagonal than A is, and the bound is never worse (Schur's product theorem).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.closed_forms.row_blocks import by_unit, narrowed, unit_rows
from solvers.linalg.rounding import Magnitudes, Rounding
from solvers.problem import Consumer, SubsetProblem


@dataclass(frozen=True, eq=False)
class ConsumerRemoval:
    """One consumer's A and W; `multipliers` and `aggregate` take batches of them as well.

    A: Inverse Hessian, (..., n w, n w), units in order.
    W: Refit with all units kept, (..., n w, m).
    width: Rows w of each unit.
    unit: Rounding of the sums in `aggregate`, relative to the sums of magnitudes.
    """

    A: Tensor
    W: Tensor
    width: int
    unit: float

    @classmethod
    def of(cls, consumer: Consumer) -> tuple[ConsumerRemoval, float, Rounding]:
        """Invert the Hessian; return the terms, ``e - tr(G'W)``, and the rounding of both."""
        H, G = by_unit(consumer)
        factor = torch.linalg.cholesky(H)
        A = torch.cholesky_inverse(factor)
        responses = G.shape[1]
        G = narrowed(G)  # p columns at most, which changes no loss
        W = torch.cholesky_solve(G, factor)
        del factor  # a matrix, which `Rounding.of` has need of
        rounding, constant = Rounding.of(H, A, G, W, consumer.e, responses)
        unit = Magnitudes.unit_of(G.shape[1], consumer.width, len(consumer.rows))
        return cls(A, W, consumer.width, unit), constant, rounding

    def multipliers(
        self, share: Tensor, shape: Tensor | float, correlation: Tensor | None = None
    ) -> Tensor:
        """Return the Y, (..., n w, m), that suits a random R, unit j being in it with ``share[j]``.

        It is the maximizer of the expectation where `shape` is 1.  In general it maximizes what is
        left of it by a bound whose diagonal is ``shape o diag(Q)`` (`solvers.bounds.quadratic`).

        share: In (0, 1], (..., n).
        correlation: Of the units being in R, (n, n) with zeros on its diagonal; None if they are
            independent.
        """
        factor = self._factor(share, shape, correlation)
        Y = torch.cholesky_solve(self.W, factor)
        return Y.div_(share.repeat_interleave(self.width, -1)[..., None])

    def expected(self, share: Tensor, shape: float, correlation: Tensor) -> float:
        """Return the maximum that these multipliers attain, at a third of their cost."""
        factor = self._factor(share, shape, correlation)
        return float(torch.linalg.solve_triangular(factor, self.W, upper=False).square().sum())

    def _factor(self, share: Tensor, shape: Tensor | float, correlation: Tensor | None) -> Tensor:
        # E over R of 2 tr(Y_R'W_R) - tr(Y_R'A_RR Y_R): Y_i'W_i is weighted by x_i, and the block ij
        # of A by X_ij, the probability of both; here all of it is divided by x_i x_j.
        M = self.A.clone()
        if correlation is not None:
            s = (1 / share - 1).sqrt()
            ratio = (correlation * s[:, None]).mul_(s).add_(1.0)
            self._blocks(M).mul_(ratio[:, None, :, None])
        diagonal = self._blocks(M).diagonal(dim1=-4, dim2=-2)
        diagonal.mul_((1 + shape * (1 / share - 1))[..., None, None, :])
        factor: Tensor = torch.linalg.cholesky(M, out=M)
        return factor

    def aggregate(self, Y: Tensor) -> tuple[Tensor, Tensor, Magnitudes]:
        """Return this consumer's share of a, (..., n), and of Q, (..., n, n), and magnitudes."""
        terms = Y * self.W
        a = self._per_unit(terms.sum(-1))
        # |A_rs| <= sqrt(A_rr A_ss) bounds every term of Q_ij by a product of two numbers.
        rows = Y.norm(dim=-1) * self.A.diagonal(dim1=-2, dim2=-1).sqrt()
        magnitudes = Magnitudes(
            self._per_unit(terms.abs_().sum(-1)), self._per_unit(rows), self.unit
        )
        del terms  # as large as Y
        Q = (Y @ Y.mT).mul_(self.A)
        return a, Q if self.width == 1 else self._blocks(Q).sum((-3, -1)), magnitudes

    def _per_unit(self, rows: Tensor) -> Tensor:
        """Sum a (..., n w) vector up to (..., n)."""
        return rows.view(*rows.shape[:-1], -1, self.width).sum(-1)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """View a (..., n w, n w) matrix as (..., n, w, n, w)."""
        n = matrix.shape[-1] // self.width
        return matrix.view(*matrix.shape[:-2], n, self.width, n, self.width)

    def costs(self, removed: Tensor) -> Tensor:
        """Return c(R) for c choices of R, (c, r) -> (..., c)."""
        rows = unit_rows(removed.flatten(), self.width).view(len(removed), -1)
        factor = torch.linalg.cholesky(self.A[..., rows[:, :, None], rows[:, None, :]])
        W = self.W[..., rows, :]
        solved: Tensor = torch.linalg.solve_triangular(factor, W, upper=False)
        return solved.square().sum((-2, -1))


@dataclass(frozen=True, eq=False)
class RemovalTerms:
    """The terms of all consumers.

    consumers: A and W of each.
    constant: Loss with all units kept.
    removals: How many units have to be removed.
    units: Their number n.
    rounding: What rounding can have done, here and where a claim is checked.
    """

    consumers: tuple[ConsumerRemoval, ...]
    constant: float
    removals: int
    units: int
    rounding: Rounding

    @classmethod
    def of(cls, problem: SubsetProblem) -> RemovalTerms:
        """Factorize every consumer of a problem."""
        consumers, constants, roundings = zip(
            *(ConsumerRemoval.of(c) for c in problem.consumers), strict=True
        )
        return cls(
            consumers,
            sum(constants),
            problem.units - problem.keep,
            problem.units,
            sum(roundings[1:], roundings[0]).twice,
        )

    def certified(self, cost: float) -> float:
        """Turn a lower bound of the cost, less `Magnitudes.lost`, into one of the exact loss."""
        computed = torch.tensor(cost, dtype=torch.float64)
        return float(self.rounding.certified(self.constant, computed))

    def cost_reaching(self, loss: float) -> float:
        """Return the least cost for which `certified` gives at least this loss."""
        return self.rounding.cost_reaching(loss, self.constant)

    def aggregate(
        self, share: Tensor, shape: Tensor | float, correlation: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Magnitudes]:
        """Return a, Q and magnitudes, summed up, for multipliers (`ConsumerRemoval`) of these."""
        first, *others = self.consumers
        a, Q, magnitudes = first.aggregate(first.multipliers(share, shape, correlation))
        for c in others:
            a_c, Q_c, magnitudes_c = c.aggregate(c.multipliers(share, shape, correlation))
            a, Q, magnitudes = a.add_(a_c), Q.add_(Q_c), magnitudes + magnitudes_c
        return a, (Q + Q.T).div_(2), magnitudes

    def expected(self, share: Tensor, shape: float, correlation: Tensor) -> float:
        """Return the maximum, over the multipliers, of the expected bound of the cost."""
        return sum(c.expected(share, shape, correlation) for c in self.consumers)

    def costs(self, removed: Tensor) -> Tensor:
        """Return what removing the units in each row costs, (b, r) -> (b,)."""
        return torch.stack([c.costs(removed) for c in self.consumers]).sum(0)
