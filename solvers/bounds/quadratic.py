"""Lower bounds of ``2 a'x - x'Q x`` over the binary x with r ones, for positive semidefinite Q.

The function is concave, so a bound has to flatten it.  For any q with ``Diag(q) - Q`` positive
semidefinite, ``x_j = x_j^2`` gives

    2 a'x - x'Q x  =  (2 a - q)'x + x'(Diag(q) - Q) x     on binary x,

which is convex on ``0 <= x <= 1, sum x = r``; its linearization at any point of that polytope is a
bound that a sort evaluates, and its coefficients are reduced costs.  What q costs is
``sum q_j x_j (1 - x_j)`` at the minimizer, so the best q is large where x is binary anyway.
Maximizing over q is a semidefinite program whose Newton steps cost one n x n inverse and one solve:
the Hessian of ``log det(Diag(q) - Q)`` is the element-wise square of the inverse.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from solvers.certificates.certificate import LEAST_DIAGONAL
from solvers.linalg.descent import accelerated, project
from solvers.linalg.rounding import Magnitudes

LEAST_MARGIN = 1e-8
"""By which share q dominates at least: what an eigenvalue computed otherwise can differ by."""

_LEAST_WEIGHT = 1e-3
_BARRIERS = (0.1, 0.03, 0.01)
_NEWTON_STEPS = 2
_LANCZOS_FROM = 300
_POINT_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class QuadraticBound:
    """A certified bound: linearization at `point` with the diagonal `q`.

    a, Q: The function ``2 a'x - x'Q x``.
    removals: r, the number of ones.
    q: Diagonal with ``Diag(q) >= Q``.
    point: Where the convex function is linearized, (n,), in the polytope.
    magnitudes: Of what a and Q were summed up of.
    margin: By which share q has to dominate, so that it does in anyone's arithmetic.
    """

    a: Tensor
    Q: Tensor
    removals: int
    q: Tensor
    point: Tensor
    magnitudes: Magnitudes
    margin: float = LEAST_MARGIN

    @property
    def dominates(self) -> bool:
        """Whether ``Diag(q) - Q`` is positive definite by the margin."""
        return is_definite(self.q / (1 + self.margin), self.Q)

    @property
    def shape(self) -> Tensor:
        """The diagonal q relative to that of Q, (n,)."""
        return self.q / _floored(self.Q.diagonal())

    @property
    def slopes(self) -> Tensor:
        """Gradient of the convex function at `point`, (n,)."""
        return 2 * (self.a + (self.q * self.point - self.Q @ self.point)) - self.q

    @property
    def offset(self) -> float:
        """What the bound is below the sum of its least slopes; rounding is taken off here."""
        x = self.point
        curvature = float((self.q * x * x).sum() - x @ (self.Q @ x))
        return curvature + float(self.magnitudes.lost(self.q, x))

    @property
    def value(self) -> float:
        """The bound, with what rounding can have done to it taken off."""
        return float(self.slopes.sort().values[: self.removals].sum()) - self.offset


def scaled_diagonal(Q: Tensor, shape: Tensor, margin: float = LEAST_MARGIN) -> Tensor:
    """Return the least multiple q of ``shape o diag(Q)`` that dominates Q by a margin, (n,)."""
    d = _floored(Q.diagonal()) * shape
    scale = d.rsqrt()
    least = largest_eigenvalue((Q * scale[:, None]).mul_(scale))
    return d * (max(least, 1e-3) * (1 + 2 * margin))


def largest_eigenvalue(matrix: Tensor) -> float:
    """Return the largest eigenvalue of a positive semidefinite matrix, to ten digits.

    Large ones by Lanczos' method, a fifth of the time of all eigenvalues.  It starts from a fixed
    vector, so that answers do not change from run to run.
    """
    if len(matrix) >= _LANCZOS_FROM and matrix.device.type == "cpu":
        start = np.random.default_rng(0).standard_normal(len(matrix))
        with contextlib.suppress(ArpackNoConvergence):
            values = eigsh(matrix.numpy(), 1, v0=start, tol=1e-10, return_eigenvectors=False)
            return float(values[0])
    return float(torch.linalg.eigvalsh(matrix)[-1])


def minimize(bound: QuadraticBound, steps: int) -> QuadraticBound:
    """Move `point` towards the minimizer of the convex function, in at most so many steps."""
    start, total = bound.point[None], bound.q.new_tensor([bound.removals])
    weight = (1 / bound.q).expand_as(start)

    def step(y: Tensor) -> Tensor:
        # y - gradient(y) / (2 q), where the gradient is 2 (a + q y - Q y) - q: q y cancels.
        return project(((y @ bound.Q - bound.a) * weight).add_(0.5), weight, total)

    x = accelerated(start, step, bound.q, steps, _POINT_TOLERANCE)
    return replace(bound, point=x[0])


def tighten(bound: QuadraticBound, steps: int) -> QuadraticBound:
    """Return the better of a bound and of what barrier steps for q between minimizations give."""
    best, current = bound, bound
    for barrier in _BARRIERS:
        for _ in range(_NEWTON_STEPS):
            current = improved(current, barrier, steps)
            if current.value > best.value:
                best = current
    return best


def improved(bound: QuadraticBound, barrier: float, steps: int) -> QuadraticBound:
    """Return the bound after a barrier step for q, and a minimization over x."""
    return minimize(replace(bound, q=_newton_step(bound, barrier)), steps)


def _newton_step(bound: QuadraticBound, barrier: float) -> Tensor:
    """Return q after a Newton step on ``sum w q - mu log det(Diag(q) - Q)``, w = x (1 - x).

    With x the minimizer for q, the value is ``2 a'x - x'Q x - sum q_j x_j (1 - x_j)``; as x is
    optimal, its derivative in q_j is ``-x_j (1 - x_j)`` alone.  So w is what each q_j costs, and
    the best q has the least ``sum w q`` of all with ``Diag(q) >= Q``, which the barrier enforces.
    """
    # Where x is binary, q costs nothing; it would grow without end.
    weight = (bound.point * (1 - bound.point)).clamp_(min=_LEAST_WEIGHT)
    # At the minimizer for this mu, w_j = mu M_jj with M = inv(Diag(q) - Q): in units of w q, the
    # barrier is a share of the objective.
    mu = barrier * float((weight * bound.q).mean())
    # A step inwards first: on the boundary the inverse is useless.
    q = bound.q * (1 + 0.1 * barrier)
    step = _newton_direction(q, bound.Q, weight / mu)
    length = 1.0
    while length > 1e-3:
        moved = q + length * step
        if replace(bound, q=moved).dominates:
            # Where a full step would leave the cone, stay a tenth of what is left inside of it.
            return moved if length == 1.0 else q + 0.9 * length * step
        length /= 2
    return bound.q


def _newton_direction(q: Tensor, Q: Tensor, price: Tensor) -> Tensor:
    """Return ``inv(M o M) (diag(M) - price)`` with ``M = inv(Diag(q) - Q)``, in two matrices.

    Divided by mu, the gradient of the barrier's objective is ``price - diag(M)``, as the derivative
    of log det is the inverse; and its Hessian is ``M o M``, as that of M_ii in q_j is ``-M_ij^2``.
    """
    M = inverse_of(q, Q)
    slope = M.diagonal() - price
    M.square_()
    factor = torch.linalg.cholesky(M, out=M)  # definite, by Schur's product theorem
    return torch.cholesky_solve(slope[:, None], factor)[:, 0]


def inverse_of(q: Tensor, Q: Tensor) -> Tensor:
    """Return the inverse of ``Diag(q) - Q``, (n, n)."""
    matrix = -Q
    matrix.diagonal().add_(q)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix, out=matrix))


def made_dominating(bound: QuadraticBound) -> QuadraticBound:
    """Raise q, in growing steps, until it dominates Q by the margin."""
    step = bound.margin
    while not bound.dominates:
        bound, step = replace(bound, q=bound.q * (1 + step)), 2 * step
    return bound


def is_definite(q: Tensor, Q: Tensor) -> bool:
    """Return whether ``Diag(q) - Q`` is certainly positive definite, rounding included.

    If the Cholesky factorization of a matrix of unit diagonal, less ``n (n + 2) eps``, runs to its
    end, then the matrix is positive definite (Rump, "Verification of positive definiteness", BIT
    2006); another such term covers the rounding of the entries of Q.
    """
    if float(q.min()) <= 0:
        return False
    n = len(q)
    scale = q.rsqrt()
    matrix = (Q * -scale[:, None]).mul_(scale)
    matrix.diagonal().add_(1 - 2 * n * (n + 2) * torch.finfo(q.dtype).eps)
    return int(torch.linalg.cholesky_ex(matrix).info) == 0


def _floored(diagonal: Tensor) -> Tensor:
    """Return the diagonal with a floor: units that cost nothing need a positive entry too."""
    return diagonal.clamp(min=LEAST_DIAGONAL * float(diagonal.max()) or 1.0)
