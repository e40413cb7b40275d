"""Symmetric sweeps: the one place where inverses are updated.

For a support S, with ``A = inv(H_SS)``, refit ``W = A G_S`` and residual ``R = G - H_:S W``, one
consumer's state is a symmetric p x p matrix and a p x m one,

    N = [ -A       A H_SR          ]        U = [ W ]
        [ H_RS A   H_RR - H_RS A H_SR ]         [ R ]

the sweeps of H and of G.  Everything that a search needs to know can be read off N and the products
``K = U U'``, and moving rows in or out of S updates both by low-rank terms.  (Sweep: Goodnight, "A
tutorial on the SWEEP operator", The American Statistician 33(3), 1979.)

Exchanges of one kept unit for one removed unit: the exact gain of every pair.

For a state on support S, removing unit i first turns the Schur complement of unit j into
``s + F A_ii F'`` and its residual into ``R_j + F W_i`` with ``F = N_ji inv(A_ii)``, so that the
exchange lowers the loss by

    tr(inv(s + F A_ii F') (R_j + F W_i)(R_j + F W_i)')  -  tr(inv(A_ii) W_i W_i')

summed over the consumers.  Only N and K enter, so all k (n - k) pairs cost a few dense passes.

These gains are rounded: near a singular H they are found to be off by a twentieth of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.closed_forms.row_blocks import gram_on, narrowed, unit_rows
from solvers.linalg.gram import TILE_ROWS, quadratic
from solvers.linalg.symmetric import Symmetric
from solvers.problem import Consumer, SubsetProblem

_PROBES = 16


class ConsumerState:
    """N and U of one consumer; changed in place by `sweep`.

    N, U: As in the text above, (n w, n w) and (n w, m) float64 or narrower, rows by place: units in
        S came first when they were factorized, and do while as many enter as leave.
    kept: (n,) bool, the units in S.
    N_blocks, K_blocks: Diagonal blocks of N and K, (n, w, w), by unit.
    """

    N_blocks: Tensor
    K_blocks: Tensor

    def __init__(self, consumer: Consumer, kept: Tensor) -> None:
        self.consumer, self.width = consumer, consumer.width
        units = torch.cat([torch.nonzero(kept).flatten(), torch.nonzero(~kept).flatten()])
        self._place = units.argsort()
        self.kept = kept.clone()
        self._leading: int | None = int(kept.sum()) * self.width
        """How many places those in S take, where they come first."""
        self._factorize(consumer.rows[units].flatten(), self._leading)
        self._read_blocks()

    def _factorize(self, rows: Tensor, k: int) -> None:
        # With H_SS = L L', C = inv(L) H_SR and h = inv(L) G_S: what is left of the removed rows is
        # H_RR - C'C and G_R - C'h, which round as H does.  H_RS A H_SR rounds as A does, near a
        # singular H by more than what is left: that would then not even be positive definite.
        self.N, self.U = gram_on(self.consumer, rows, cut=k), narrowed(self.consumer.G[rows])
        self.N.factorize(k)
        self.N.forward(self.U, k)
        self.N.backward(self.U, k)
        self.N.divide(k)
        self.N.invert(k)
        for start, panel in self.N.spans():
            if start < k:
                panel.neg_()

    def _read_blocks(self) -> None:
        w = self.width
        # Some rows at a time: their squares are as many as U.
        parts = torch.split(self.U.view(len(self._place), w, -1), max(1, TILE_ROWS // w))
        K = torch.cat([U.square().sum(2, keepdim=True) if w == 1 else U @ U.mT for U in parts])
        self.N_blocks, self.K_blocks = self.N.diagonal_blocks(w)[self._place], K[self._place]

    def part(self, units: Tensor) -> ConsumerState:
        """Return the state of some units, (u,) int64, alone, while no other is moved.

        A sweep of units changes the rows and columns of others by what these have in common with
        it, so that a principal block follows from itself.  Losses cannot be asked of it.
        """
        made = object.__new__(ConsumerState)
        at = self._at(units)
        made.consumer, made.width, made.kept = self.consumer, self.width, self.kept[units]
        made.N = Symmetric.of(self.N.entries(at, at), width=self.width)
        made.U = narrowed(self.U[at])
        made._place = torch.arange(len(units), device=units.device)
        count = int(made.kept.sum())
        made._leading = count * self.width if bool(made.kept[:count].all()) else None
        made._read_blocks()
        return made

    def pairs(self, leave: Tensor, enter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the entries of N and of K of all pairs of units, (l w, e w) each."""
        some, others = self._at(leave), self._at(enter)
        first = self._leading or 0
        N = self.N.rows(some, first)[:, others - first]
        # Only a few rows are copied; all of those that enter would be as many as U has.
        return N, (self.U[some] @ self.U[first:].T)[:, others - first]

    def _at(self, units: Tensor) -> Tensor:
        return unit_rows(self._place[units], self.width)

    def sweep(self, units: Tensor) -> None:
        """Move the given units, (u,) int64, to the other side of the support."""
        at, inside = self._at(units), self.kept[units]
        sign = torch.where(inside, -1.0, 1.0).to(self.U).repeat_interleave(self.width)
        columns, own = self.N.rows(at).T, self.U[at]
        pivot = _inverse(columns[at])
        Z = columns @ pivot
        self.N.subtract(Z, columns.T)
        self.U.addmm_(Z, own, alpha=-1)
        leaving, entering = units[inside], units[~inside]
        if len(leaving) == len(entering):  # units that enter take the places of those that leave
            places = self._place[leaving]
            self._place[leaving], self._place[entering] = self._place[entering], places
        else:
            self._leading = None
        self.kept[units] = ~inside
        at, signed = self._at(units), pivot * sign
        Z *= sign
        Z[at] = -sign[:, None] * signed
        self.N.set_rows(at, Z.T)
        self.U[at] = signed.T @ own
        self._read_blocks()

    def loss(self) -> float | None:
        """Return the loss of the refit W; None where U has fewer columns than that."""
        consumer, units = self.consumer, torch.nonzero(self.kept).flatten()
        if self.U.shape[1] < consumer.G.shape[1]:
            return None
        rows = consumer.rows[units].flatten()
        return quadratic(consumer.hessian, consumer.G, consumer.e, self.U[self._at(units)], rows)

    def drift(self) -> float:
        """Return the error of ``H_SS A = I`` on a few rows."""
        S = unit_rows(torch.nonzero(self.kept).flatten(), self.width)
        some = S[torch.linspace(0, len(S) - 1, _PROBES, device=S.device).long()]
        place, order = unit_rows(self._place, self.width), self.consumer.rows.flatten()
        error = (
            self.consumer.hessian.entries(order[some], order[S])
            @ self.N.rows(place[some])[:, place[S]].T
        )
        error += (some[:, None] == some).to(error)
        return float(error.abs().max())


def _inverse(A: Tensor) -> Tensor:
    """Return the inverse of a symmetric matrix of any signs and scales of rows.

    Units that leave have the scale of ``1 / H`` and those that enter that of ``H``: elimination
    with row exchanges alone would lose the digits of the one among those of the other.
    """
    size = A.diagonal().abs()
    scale = torch.where(size > 0, size, 1.0).rsqrt()
    inverse: Tensor = torch.linalg.inv(scale[:, None] * A * scale)
    return (inverse + inverse.T) * (scale[:, None] * scale / 2)


@dataclass(eq=False)
class PivotState:
    """The states of all consumers of a problem, on the support of the units `kept`, (n,) bool."""

    problem: SubsetProblem
    consumers: tuple[ConsumerState, ...]
    kept: Tensor

    @classmethod
    def full(cls, problem: SubsetProblem) -> PivotState:
        """Factorize with every unit kept."""
        return cls.on_support(problem, torch.arange(problem.units, device=problem.device))

    @classmethod
    def on_support(cls, problem: SubsetProblem, support: Tensor) -> PivotState:
        """Factorize the rows of a support, (k,) int64; N, in half of its memory, and U stay."""
        kept = torch.zeros(problem.units, dtype=torch.bool, device=problem.device)
        kept[support] = True
        return cls(problem, tuple(ConsumerState(c, kept) for c in problem.consumers), kept)

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

    def part(self, units: Tensor) -> PivotState:
        """Return the state of some units, (u,) int64, alone, in which these may be exchanged."""
        parts = tuple(state.part(units) for state in self.consumers)
        return PivotState(self.problem, parts, self.kept[units])

    def drift(self) -> float:
        """Return the error of ``H_SS A = I`` on a few rows: rounding, as long as sweeps are few."""
        return max(state.drift() for state in self.consumers)

    def loss(self) -> float | None:
        """Return the loss of the refit, which a sound state holds, if it holds all columns."""
        losses = [state.loss() for state in self.consumers]
        known = [loss for loss in losses if loss is not None]
        return max(sum(known), 0.0) if len(known) == len(losses) else None

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
            total[side] += block_scores(sign * state.N_blocks[side], state.K_blocks[side])
        return total


def block_scores(A: Tensor, K: Tensor) -> Tensor:
    """Return ``tr(inv(A) K)`` for batches of positive definite (w, w) blocks; shape (...)."""
    if A.shape[-1] == 1:
        return (K / A)[..., 0, 0]
    solved = torch.cholesky_solve(K, torch.linalg.cholesky(A))
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1)


_PASS_ELEMENTS = 1 << 18
"""Elements of one intermediate in a pass over pairs; bounds the memory of the search."""

_PASS_ROWS = 64
"""But no fewer rows: products of few of them are slow."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """Units whose exchanges gain most, and what the best exchange gains.

    units: Those that may leave and as many that may enter, (u,) int64, the best of each side first:
        these two are the best exchange of all.  None where there is no pair.
    gain: By how much the loss falls; negative if it rises.
    """

    units: Tensor
    gain: float


def best_swap(state: PivotState) -> Exchange:
    """Return the exchange that lowers the loss most, over all pairs."""
    removed = state.removed
    best = none = Exchange(removed[:0], -torch.inf)
    for some, gains in _tiles(state):
        index = int(gains.argmax())
        gain = float(gains.view(-1)[index])
        if gain != gain:  # NaN of one block must not be passed over by another's number
            return replace(none, gain=gain)
        if gain > best.gain:
            row, column = divmod(index, len(removed))
            best = Exchange(torch.stack([some[row], removed[column]]), gain)
    return best


def candidates(state: PivotState, count: int) -> Exchange:
    """Return the units whose best exchanges, of all pairs, gain most: at most `count` a side."""
    removed = state.removed
    if count == 1 or not len(removed):
        return best_swap(state)
    leave = torch.full_like(state.kept, -torch.inf, dtype=torch.float64)
    enter = leave.clone()
    partner = torch.empty_like(state.kept, dtype=torch.int64)
    for some, gains in _tiles(state):
        leave[some], index = gains.max(1)
        partner[some] = removed[index]
        enter[removed] = torch.maximum(enter[removed], gains.amax(0))
    first, gain = int(leave.argmax()), float(leave.max())
    # Of many that gain the same, those chosen to leave need not be partners of those to enter.
    leave[first] = enter[partner[first]] = torch.inf
    count = min(count, len(removed), len(state.support))
    sides = (state.support, leave), (removed, enter)
    units = torch.cat([side[gains[side].topk(count).indices] for side, gains in sides])
    return Exchange(units, gain)


def _tiles(state: PivotState) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some units that may leave, and the gains of their pairs with all that may enter."""
    kept, removed = state.support, state.removed
    if len(removed) == 0:
        return
    block = max(consumer.width for consumer in state.consumers) ** 2
    step = max(1, _PASS_ROWS // block, _PASS_ELEMENTS // (len(removed) * block))
    for some in torch.split(kept, step):
        yield some, swap_gains(state, some, removed)


def swap_gains(state: PivotState, leave: Tensor, enter: Tensor) -> Tensor:
    """Return the gain of each pair, (len(leave), len(enter)), of units inside and outside."""

    def gains(consumer: ConsumerState) -> Tensor:
        if consumer.width == 1:
            return _scalar_gains(consumer, leave, enter)
        return _block_gains(consumer, leave, enter)

    first, *others = map(gains, state.consumers)
    return sum(others, first)


def _scalar_gains(state: ConsumerState, leave: Tensor, enter: Tensor) -> Tensor:
    # The formula of the text for numbers: (K_jj + 2 F K_ij + F^2 W2) / (N_jj + F^2 A) - W2 / A.
    N, K = state.N_blocks.flatten(), state.K_blocks.flatten()
    A, W2 = -N[leave, None], K[leave, None]
    F, numerator = state.pairs(leave, enter)
    F = F.div_(A)
    numerator = numerator.mul_(2).addcmul_(F, W2).mul_(F).add_(K[enter])
    denominator = F.square_().mul_(A).add_(N[enter])
    return numerator.div_(denominator).sub_(W2 / A)


def _block_gains(state: ConsumerState, leave: Tensor, enter: Tensor) -> Tensor:
    w, N, K = state.width, state.N_blocks, state.K_blocks
    factor = torch.linalg.cholesky(-N[leave])
    unit = torch.eye(w, dtype=N.dtype, device=N.device).expand_as(factor)
    root = torch.linalg.solve_triangular(factor, unit, upper=False)
    lost = (root.mT @ root * K[leave]).sum((-2, -1))
    N_ij, K_ij = (
        matrix.reshape(len(leave), w, len(enter), w).transpose(1, 2)
        for matrix in state.pairs(leave, enter)
    )
    # As a square it adds to N_jj whatever it rounds to, so that the sum stays definite.
    half = root[:, None] @ N_ij
    F = half.mT @ root[:, None]
    cross = F @ (K_ij + K[leave][:, None] @ (F.mT / 2))
    residual = K[enter] + cross + cross.mT
    return block_scores(N[enter] + half.mT @ half, residual).sub(lost[:, None])
