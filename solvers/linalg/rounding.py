"""What rounding can have done to a loss that is computed from the inverse of H.

With ``A = inv(H)`` and ``W = A G``, keeping all units but R loses ``constant + c(R)``, with
``constant = e - tr(G'W)`` and ``c(R) = tr(W_R' inv(A_RR) W_R)``.  The A and W at hand are rounded;
residuals tell how far they can be from the exact ones, and with them every c(R):

- where ``|I - H A| <= d`` in any norm, ``(1 - d) inv(H) <= A <= (1 + d) inv(H)``, and these
  inequalities pass on to principal blocks and their inverses;
- a W that is off by ``inv(H) F`` changes ``sqrt(c(R))``, a norm of W, by no more than the norm of
  the difference, ``sqrt(tr(F' inv(H) F))``.

And what it can have done to a linearization of ``2 a'x - x'Q x``
(`solvers.certificates.certificate`) follows from the sizes of what a and Q were summed up of.

A search claims what anyone who checks it will prove: it takes off its own rounding, and as much
again for theirs (`Rounding.twice`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps

_LEAST_MARGIN = 1e-8
_MARGIN = 16.0
"""How many times the error of the inverse a margin is."""


@dataclass(frozen=True)
class Rounding:
    """How far exact losses can be from those that the computed A and W give.

    inverse: Any norm of ``I - H A`` bounds the eigenvalues of ``inv(H)^-1 A - I``, hence the
        relative change of every c(R).
    refit: Square root of ``tr(F' inv(H) F)`` with ``F = G - H W``: by how much ``sqrt(c(R))`` can
        change.
    unit: Rounding of the sum that is c(R), relative to it.
    offset: Rounding of the constant, as `solvers.linalg.gram.quadratic_rounding` has it.
    """

    inverse: float
    refit: float
    unit: float
    offset: float

    @classmethod
    def of(
        cls, H: Tensor, A: Tensor, G: Tensor, W: Tensor, e: float, responses: int
    ) -> tuple[Rounding, float]:
        """Measure them, in units that give H a unit diagonal; return the constant as well.

        A, W: Inverse and refit, as computed.
        responses: How many columns G had before it was rotated into at most p.
        """
        p, m = W.shape
        scale = H.diagonal().rsqrt()
        spread = float((A / scale[:, None]).div_(scale).norm())
        floor = 4 * _EPS * math.sqrt(p) * float((H * scale[:, None]).mul_(scale).norm()) * spread
        product = (H @ A).mul_(scale[:, None]).div_(scale)
        product.diagonal().sub_(1.0)
        inverse = float(product.norm()) + floor
        del product
        # As e + tr(W'HW) - 2 tr(W'G): the rounding of W enters in second order only.
        residual = H @ W - G
        constant = e + float((W * (residual - G)).sum(1).sum())
        refit = math.sqrt(max(float((residual * (A @ residual)).sum()), 0.0))
        # The residual is itself a difference, and G may be a rotation: both round.
        sizes = H.abs() @ W.abs() + G.abs()
        steps = _EPS * (p + responses + 2)
        refit += steps * math.sqrt(spread) * float((sizes * scale[:, None]).norm())
        offset = _EPS * (2 * p + responses + 8) * (e + float((W.abs() * (sizes + G.abs())).sum()))
        refit /= math.sqrt(max(1 - inverse, _EPS))
        return cls(inverse, refit, _EPS * p * m, offset), constant

    def certified(self, constant: float, cost: Tensor) -> Tensor:
        """Turn lower bounds of costs, less `Magnitudes.lost`, into ones of exact losses."""
        computed = (cost * (1 - self.unit)).clamp(min=0.0)
        root = ((computed * max(1 - self.inverse, 0.0)).sqrt() - self.refit).clamp(min=0.0)
        return (constant - self.offset - self.refit**2 + root.square()).clamp(min=0.0)

    def exceeded(self, constant: float, cost: float) -> float:
        """Turn an upper bound of what is no less than a cost c(R) into one of an exact loss.

        constant: Loss with all units kept, as computed.
        cost: ``tr(W' inv(A o C) W)`` with C - 11' positive semidefinite, as computed.  What holds
            of A holds of ``A o C``, by Schur's product theorem, whose condition is no worse; and as
            ``A o C`` exceeds A, a W that is off changes the root by no more than that of c(R).
        """
        root = math.sqrt(max(cost, 0.0) * (1 + self.unit) * (1 + 2 * self.inverse)) + self.refit
        return constant + self.offset + root**2

    @property
    def twice(self) -> Rounding:
        """That of a search and of its check together."""
        return Rounding(2 * self.inverse, 2 * self.refit, 2 * self.unit, 2 * self.offset)

    def cost_reaching(self, loss: float, constant: float) -> float:
        """Return the least cost for which `certified` gives at least this loss."""
        excess = max(loss - constant + self.offset + self.refit**2, 0.0)
        computed = (math.sqrt(excess) + self.refit) ** 2 / max(1 - self.inverse, _EPS)
        return computed * (1 + 8 * _EPS) / max(1 - self.unit, _EPS)

    def margin(self, units: int) -> float:
        """Return by which share a diagonal has to dominate, so that it does in anyone's arithmetic.

        Blocks of A are factorized again, by the search and by who checks it, each time with an
        error of the order of that of A itself; and the factorization that shows it dominates takes
        ``2 n (n + 2) eps`` (Rump, "Verification of positive definiteness", BIT 46, 2006).

        units: n, the entries of the diagonal.
        """
        return max(_LEAST_MARGIN, 8 * units * (units + 2) * _EPS, _MARGIN * self.inverse)

    def __add__(self, other: Rounding) -> Rounding:
        """Return what holds for the sum of two consumers."""
        return Rounding(
            max(self.inverse, other.inverse),
            math.hypot(self.refit, other.refit),
            max(self.unit, other.unit),
            self.offset + other.offset,
        )


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """How large the numbers are that the function ``2 a'x - x'Q x`` was summed up of.

    a: Magnitudes summed up in ``a_i``, (..., n).
    Q: Numbers s with no more than ``s_i s_j`` summed up in ``Q_ij``, (..., n).
    unit: Rounding of these sums, relative to the sums of magnitudes.
    """

    a: Tensor
    Q: Tensor
    unit: float

    @staticmethod
    def unit_of(responses: int, width: int, units: int) -> float:
        """Return the rounding of one consumer's sums, relative to the sums of magnitudes."""
        return _EPS * (responses + width**2 + 2 * units + 8)

    def lost(self, q: Tensor, point: Tensor) -> Tensor:
        """Return by how much rounding can have raised the linearization; both are (..., n)."""
        # The terms of g and of x'Px with their magnitudes, P being Diag(q) - Q.
        row_sums = q * point + self.Q * (self.Q * point).sum(-1, keepdim=True)
        return self.unit * (2 * self.a + q + (2 + point) * row_sums).sum(-1)

    def __add__(self, other: Magnitudes) -> Magnitudes:
        """Return what holds for the sum of two consumers."""
        return Magnitudes(
            self.a + other.a, torch.hypot(self.Q, other.Q), max(self.unit, other.unit)
        )
