"""The exact program in which a diagonal, split off the Hessian, pays more for a unit kept in part.

For block-diagonal D with H - D positive semidefinite, the least loss of any support is the optimum
of a mixed-integer second-order cone program, the perspective reformulation (Frangioni and Gentile,
"Perspective cuts for a class of convex 0-1 mixed integer programs", Mathematical Programming 106,
2006; Gunluk and Linderoth, "Perspective reformulations of mixed integer nonlinear programs with
indicator variables", Mathematical Programming 124, 2010):

    min  e - 2 tr(G'W) + tr(W'(H - D)W) + sum_j s_j,       tr(W_j' D_j W_j) <= s_j z_j

over weights W, s >= 0 and binary z with k ones.  At binary z the split is an identity: D decides
how tight the relaxation is, and never what the optimum is, whatever rounding does to it.

Here the program is written around the refit with all units kept, ``W* = A G``, ``A = inv(H)``, and
for the units removed, x = 1 - z.  With C block-diagonal, ``C_j C_j' = A_jj``, let

    K = C' H C,    V = inv(C) W*,    D_j = t inv(A_jj) with t <= lambda_min(K),

and let y be the change of the weights of kept units, ``inv(C_j) W_j - V_j``.  Substitution, and
``x_j = x_j^2``, turn the program into one whose objective sums up terms that are not negative, and
is the loss without its constant:

    cost = min  tr(u'(K - t I)u) + sum_j (s_j + t |V_j|^2 x_j),       t |y_j|^2 <= s_j (1 - x_j)

with ``u_j = y_j - x_j V_j``.  Several consumers add up, and share x and s.

In units of the incumbent's cost, what is better than the incumbent has ``tr(u'K u) <= 1``.  The
diagonal blocks of inv(K) are identities, so

- no entry of y exceeds 1, and no s_j.  The rows ``|y| <= 1 - x`` keep the weights of a removed unit
  within a solver's tolerance of zero, where the cone alone would let their squares be.
- a unit with ``|V_j|^2 > 1`` cannot go, as its removal alone costs that much; it leaves the
  program.

Last, rows are multiplied by the fourth root of the diagonal of K: near a singular H that shares its
ill condition between the range of y and the curvature, and solvers can bear half of it in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from solvers.bounds.removal import ConsumerRemoval, RemovalTerms
from solvers.exact.outer_approximation import TOLERANCE, Array, Search
from solvers.linalg.symmetric import diagonal_blocks
from solvers.problem import NO_ROW

REACH = 1 + 1e-6
"""What an entry of y may reach: 1, and room for rounding."""

_SPLIT = 1 - 1e-4
"""Share of lambda_min(K) that is split off, so that rounding leaves the rest definite."""

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class PerspectiveConsumer:
    """One consumer's part of the program, for the rows of the units that may go.

    K: Hessian in the program's coordinates, (p, p).
    V: Refit with all units kept, in these coordinates and in roots of the cost's unit, (p, r).
    split: Diagonal that is split off K, (p,).
    reach: The most that an entry of y can be where the incumbent is improved, (p,).
    unit: The unit of each row, by its place in the program, (p,) int64.
    condition: Norm of K where its inverse has a unit diagonal.
    rounding: By which share rounding can have changed a cost.
    """

    K: Array
    V: Array
    split: Array
    reach: Array
    unit: NDArray[np.int64]
    condition: float
    rounding: float

    @classmethod
    def of(cls, terms: ConsumerRemoval, owned: Tensor, scale: float) -> PerspectiveConsumer:
        """Change the coordinates of one consumer.

        terms: Its A and W, for the units that may go.
        owned: Which rows are no padding of a short unit, (f, w) bool.
        scale: The cost's unit.
        """
        rows = owned.flatten()
        factors = torch.linalg.cholesky(diagonal_blocks(terms.A, terms.width))
        C = torch.zeros_like(terms.A)
        blocks = C.view(len(owned), terms.width, len(owned), terms.width)
        blocks.diagonal(dim1=0, dim2=2).copy_(factors.permute(1, 2, 0))
        half = torch.linalg.solve_triangular(C, terms.A, upper=False)
        inverse = torch.linalg.solve_triangular(C, half.T, upper=False)[rows][:, rows]
        K = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
        V = torch.linalg.solve_triangular(C, terms.W, upper=False)[rows] / math.sqrt(scale)
        condition = float(K.norm())
        noise = 4 * _EPS * len(K) * condition
        error = K @ inverse
        error.diagonal().sub_(1.0)
        split = max(_SPLIT * float(torch.linalg.eigvalsh(K)[0]) - noise, 0.0)
        balance = K.diagonal().pow(0.25)
        return cls(
            (K / balance[:, None] / balance).numpy(),
            (V * balance[:, None]).numpy(),
            (split / balance.square()).numpy(),
            (REACH * balance).numpy(),
            torch.nonzero(owned)[:, 0].numpy(),
            condition,
            float(error.norm()) + noise * float(torch.linalg.cond(factors).max()),
        )

    @property
    def rest(self) -> Array:
        """K without what is split off, (p, p), positive semidefinite."""
        return self.K - np.diag(self.split)

    def per_unit(self, weights: Array, units: int) -> Array:
        """Return what is split off at weights (p, r), summed over each unit's rows, (units,)."""
        total = np.zeros(units)
        np.add.at(total, self.unit, self.split * np.square(weights).sum(1))
        return total

    def best_change(self, removed: Array) -> Array:
        """Return the optimal y, (p, r), for binary x, (f,)."""
        goes = removed[self.unit] == 1
        y = np.zeros_like(self.V)
        coupling = self.K[np.ix_(~goes, goes)] @ self.V[goes]
        y[~goes] = np.linalg.solve(self.K[np.ix_(~goes, ~goes)], coupling)
        return y


@dataclass(frozen=True, eq=False)
class PerspectiveProgram:
    """The data of the program; `solvers.exact.gurobi` hands them to a solver.

    terms: A and W for the f units that may go.
    owned: For each consumer, which rows of these units are no padding, (f, w) bool.
    scale: The cost's unit.
    """

    terms: RemovalTerms
    owned: tuple[Tensor, ...]
    scale: float

    @classmethod
    def of(cls, search: Search) -> PerspectiveProgram:
        """Leave out the units that nothing better than the incumbent removes."""
        single = search.terms.single_costs()[search.support]
        kept = search.support[single > REACH**2 * search.unit]
        terms = search.terms.keeping(kept)
        owned = tuple(c.rows[terms.units] != NO_ROW for c in search.problem.consumers)
        return cls(terms, owned, search.unit)

    @property
    def variables(self) -> int:
        """The number of variables: x, s and y."""
        parts = zip(self.owned, self.terms.consumers, strict=True)
        return 2 * len(self.terms.units) + sum(int(o.sum()) * c.W.shape[1] for o, c in parts)

    @cached_property
    def consumers(self) -> tuple[PerspectiveConsumer, ...]:
        """The terms of each consumer that reads one of the units."""
        parts = zip(self.terms.consumers, self.owned, strict=True)
        return tuple(PerspectiveConsumer.of(c, o, self.scale) for c, o in parts if bool(o.any()))

    @property
    def condition(self) -> float:
        """The condition of the worst consumer."""
        return max((c.condition for c in self.consumers), default=1.0)

    @property
    def slack(self) -> float:
        """What a bound gives up, in the cost's unit, for the tolerances of the solver.

        A feasibility tolerance lets the solver go below the optimum, which costs tightness only.
        Other tolerances may leave it above: where no reduced cost is wrong by more than one, by at
        most that times the sum of the ranges of all variables; and where a cone program is solved
        to a relative gap, by that gap, as no cost of interest exceeds 1.  And rounding has changed
        each cost by a share of it.
        """
        ranges = 2.0 * len(self.terms.units) * REACH**2
        for c in self.consumers:
            ranges += 2 * float(c.reach.sum()) * c.V.shape[1]
        rounding = max((c.rounding for c in self.consumers), default=0.0)
        return TOLERANCE * (ranges + 1) + rounding
