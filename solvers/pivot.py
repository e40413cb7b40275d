"""Symmetric sweeps: the one place where inverses are updated.

For a support S, with ``A = inv(H_SS)``, refit ``W = A G_S`` and residual ``R = G - H_:S W``, one
consumer's state is two symmetric p x p matrices,

    N = [ -A       A H_SR          ]        K = U U',   U = W on the rows in S, R on the others,
        [ H_RS A   H_RR - H_RS A H_SR ]

the sweep of H on S and the Gram matrix of the sweep of G.  Everything that a search needs to know
can be read off them, and moving rows in or out of S updates both by low-rank terms.  (Sweep:
Goodnight, "A tutorial on the SWEEP operator", The American Statistician 33(3), 1979.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.problem import NO_ROW, Consumer, SubsetProblem

_PROBES = 16


@dataclass(eq=False)
class ConsumerState:
    """N and K of one consumer, with the rows ordered unit by unit and all units equally wide.

    A unit with fewer rows than the widest is filled up with rows that are decoupled from all
    others and have no correlation with the target, which changes no loss.

    Parameters
    ----------
    N, K
        Sweep of H and Gram matrix of the sweep of G, (n w, n w) float64, laid out as in the text
        above; changed in place by `sweep`.
    width
        Rows w of each unit.
    inside
        (n w,) bool, the rows in S.
    """

    N: Tensor
    K: Tensor
    width: int
    inside: Tensor

    def sweep(self, units: Tensor) -> None:
        """Move the given units to the other side of the support.

        Parameters
        ----------
        units
            (u,) int64; those inside leave and those outside enter.
        """
        rows = unit_rows(units, self.width)
        sign = torch.where(self.inside[rows], -1.0, 1.0).to(self.N)
        pivot = torch.linalg.inv(self.N[rows[:, None], rows])
        pivot = (pivot + pivot.T) / 2
        columns, K_columns = self.N[:, rows], self.K[:, rows]
        K_block = K_columns[rows]
        Z = columns @ pivot
        Q = K_columns - Z @ (K_block / 2)
        self.N.addmm_(Z, columns.T, alpha=-1)
        self.K.addmm_(torch.cat([Z, Q], 1), torch.cat([Q, Z], 1).T, alpha=-1)
        signed = pivot * sign
        self._set_cross(self.N, rows, Z * sign, -sign[:, None] * signed)
        self._set_cross(
            self.K, rows, (K_columns - Z @ K_block) @ signed, signed.T @ K_block @ signed
        )
        self.inside[rows] = ~self.inside[rows]

    @staticmethod
    def _set_cross(matrix: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> None:
        columns[rows] = block
        matrix[:, rows] = columns
        matrix[rows] = columns.T


@dataclass(eq=False)
class PivotState:
    """The states of all consumers of a problem, on one support.

    Parameters
    ----------
    problem
        The problem that is being solved.
    consumers
        One state for each of its consumers.
    kept
        (n,) bool, the units in the support.
    """

    problem: SubsetProblem
    consumers: tuple[ConsumerState, ...]
    kept: Tensor

    @classmethod
    def full(cls, problem: SubsetProblem) -> PivotState:
        """Factorize with every unit kept."""
        return cls.on_support(problem, torch.arange(problem.units, device=problem.device))

    @classmethod
    def on_support(cls, problem: SubsetProblem, support: Tensor) -> PivotState:
        """Factorize on a support, (k,) int64.

        Costs one Cholesky factorization of the kept rows and a few products; N and K are the only
        p x p matrices that stay.
        """
        kept = torch.zeros(problem.units, dtype=torch.bool, device=problem.device)
        kept[support] = True
        return cls(problem, tuple(_factorize(c, kept) for c in problem.consumers), kept)

    @property
    def support(self) -> Tensor:
        """The kept units, (k,) int64, sorted."""
        return torch.nonzero(self.kept).flatten()

    @property
    def removed(self) -> Tensor:
        """The removed units, (n - k,) int64, sorted."""
        return torch.nonzero(~self.kept).flatten()

    def sweep(self, units: Tensor | Sequence[int]) -> None:
        """Move the given units to the other side of the support, all at once."""
        moved = torch.as_tensor(units, dtype=torch.int64, device=self.kept.device)
        for consumer in self.consumers:
            consumer.sweep(moved)
        self.kept[moved] = ~self.kept[moved]

    def drift(self) -> float:
        """Return the error of ``H_SS A = I`` on a few rows: rounding, as long as sweeps are few."""
        return max(
            _drift(state, consumer, self.kept)
            for state, consumer in zip(self.consumers, self.problem.consumers, strict=True)
        )

    def removal_losses(self) -> Tensor:
        """Return by how much the loss rises when one unit leaves, (n,); inf for removed units.

        ``tr(W_i' inv(A_ii) W_i) = tr(inv(A_ii) K_ii)`` for each unit.
        """
        return torch.where(self.kept, self._one_unit_scores(-1.0), torch.inf)

    def addition_gains(self) -> Tensor:
        """Return by how much the loss falls when one unit enters, (n,); -inf for kept units.

        ``tr(R_j' inv(s_j) R_j) = tr(inv(N_jj) K_jj)`` for each unit.
        """
        return torch.where(self.kept, -torch.inf, self._one_unit_scores(1.0))

    def _one_unit_scores(self, sign: float) -> Tensor:
        side = self.kept if sign < 0 else ~self.kept
        total = torch.zeros(len(self.kept), dtype=torch.float64, device=self.kept.device)
        for state in self.consumers:
            if state.width == 1:
                total += state.K.diagonal() / (sign * state.N.diagonal())
            else:
                total[side] += block_scores(
                    sign * diagonal_blocks(state.N, state.width)[side],
                    diagonal_blocks(state.K, state.width)[side],
                )
        return total


def block_scores(A: Tensor, K: Tensor) -> Tensor:
    """Return ``tr(inv(A) K)`` for batches of positive definite (w, w) blocks; shape (...)."""
    if A.shape[-1] == 1:
        return (K / A)[..., 0, 0]
    solved = torch.cholesky_solve(K, torch.linalg.cholesky(A))
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1)


def _drift(state: ConsumerState, consumer: Consumer, kept: Tensor) -> float:
    H, _ = equal_width(consumer)
    S = torch.nonzero(kept.repeat_interleave(state.width)).flatten()
    places = torch.linspace(0, len(S) - 1, _PROBES, device=S.device).long()
    some = S[places]
    error = H[some[:, None], S] @ state.N[some[:, None], S].T
    error += (some[:, None] == some).to(error)
    return float(error.abs().max())


def _factorize(consumer: Consumer, kept: Tensor) -> ConsumerState:
    H, G = equal_width(consumer)
    inside = kept.repeat_interleave(consumer.width)
    S, R = torch.nonzero(inside).flatten(), torch.nonzero(~inside).flatten()
    if len(R) == 0:
        A, W = invert(H, G)
        return ConsumerState(A.neg_(), W @ W.T, consumer.width, inside)
    # With H_SS = L L', C = inv(L) H_SR and h = inv(L) G_S: what is left of the removed rows is
    # H_RR - C'C and G_R - C'h, which round as H does.  H_RS A H_SR rounds as A does, near a
    # singular H by more than what is left: that would then not even be positive definite.
    factor = torch.linalg.cholesky(H[S[:, None], S])
    C = torch.linalg.solve_triangular(factor, H[S[:, None], R], upper=False)
    h = torch.linalg.solve_triangular(factor, G[S], upper=False)
    U = torch.empty_like(G)
    U[R] = G[R].addmm_(C.T, h, alpha=-1)
    U[S] = torch.linalg.solve_triangular(factor.T, h, upper=True)
    del h
    N = torch.empty_like(H)
    N[R[:, None], R] = H[R[:, None], R].addmm_(C.T, C, alpha=-1)
    C = torch.linalg.solve_triangular(factor.T, C, upper=True)
    N[S[:, None], R] = C
    N[R[:, None], S] = C.T
    del C
    N[S[:, None], S] = torch.cholesky_inverse(factor, out=factor).neg_()
    return ConsumerState(N, U @ U.T, consumer.width, inside)


def invert(H: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``inv(H)`` and ``inv(H) G`` for a positive definite H."""
    factor = torch.linalg.cholesky(H)
    W = torch.cholesky_solve(G, factor)
    return torch.cholesky_inverse(factor), W


def solve_spd(A: Tensor, B: Tensor) -> Tensor:
    """Return ``inv(A) B`` for a small positive definite A."""
    if len(A) == 1:
        return B / A
    return torch.cholesky_solve(B, torch.linalg.cholesky(A))


def unit_rows(units: Tensor, width: int) -> Tensor:
    """Return the rows, (len(units) * width,) int64, of units that are `width` rows each."""
    if width == 1:
        return units
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """Return a copy of the diagonal blocks, (n, w, w), of a (n w, n w) matrix."""
    n = len(matrix) // width
    blocks = matrix.view(n, width, n, width).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def equal_width(consumer: Consumer) -> tuple[Tensor, Tensor]:
    """Return H and G with the rows ordered by unit, short units filled up with decoupled rows."""
    order = consumer.rows.flatten()
    if torch.equal(order, torch.arange(len(consumer.H), device=order.device)):
        return consumer.H, consumer.G
    H = consumer.H[order[:, None], order]
    G = consumer.G[order]
    filler = torch.nonzero(order == NO_ROW).flatten()
    H[filler] = 0
    H[:, filler] = 0
    H[filler, filler] = float(consumer.H.diagonal().mean())
    G[filler] = 0
    return H, G
