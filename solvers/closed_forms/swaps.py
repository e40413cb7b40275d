"""Exchanges of one kept unit for one removed unit: the exact gain of every pair.

For a state on support S, removing unit i first turns the Schur complement of unit j into
``s + F A_ii F'`` and its residual into ``R_j + F W_i`` with ``F = N_ji inv(A_ii)``, so that the
exchange lowers the loss by

    tr(inv(s + F A_ii F') (R_j + F W_i)(R_j + F W_i)')  -  tr(inv(A_ii) W_i W_i')

summed over the consumers.  Only N and K enter, so all k (n - k) pairs cost a few dense passes.

These gains are rounded, and near a singular H a pair that gains could look like one that does not.
To factorize the rows of a support T is to change H by a share of about ``p eps`` of ``D D``, where
``D = sqrt(diag(H))``, and with it the loss by that share of ``|D W|^2``, W being the refit on T
(Higham, "Accuracy and Stability of Numerical Algorithms", 2002, theorem 10.3, in norms instead of
its worst case element by element; in exact arithmetic, gains near a singular H are found to be off
by a twentieth of it).  N and K bound ``|D W|`` for each pair as well: `possible_gain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.closed_forms.pivot import ConsumerState, PivotState, block_scores

_EPS = torch.finfo(torch.float64).eps

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
    return _most(state, lambda leave, enter: swap_gains(state, leave, enter))


def candidates(state: PivotState, count: int) -> Exchange:
    """Return the units whose best exchanges, of all pairs, gain most: at most `count` a side."""
    removed = state.removed
    if count == 1 or not len(removed):
        return best_swap(state)
    leave = torch.full_like(state.kept, -torch.inf, dtype=torch.float64)
    enter = leave.clone()
    partner = torch.empty_like(state.kept, dtype=torch.int64)
    for some, gains in _tiles(state, lambda leave, enter: swap_gains(state, leave, enter)):
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


def possible_gain(state: PivotState) -> float:
    """Return by how much some exchange may lower the loss, with what rounding can hide of it.

    state: A state as sound as one just factorized on its support; not changed.
    """
    reaches = [_Reach.of(part) for part in state.consumers]
    return _most(state, lambda leave, enter: _total(r.gains(leave, enter) for r in reaches)).gain


def _most(state: PivotState, gains_of: Callable[[Tensor, Tensor], Tensor]) -> Exchange:
    """Return the exchange of the largest gain, computed for some units that leave at a time."""
    removed = state.removed
    best = none = Exchange(removed[:0], -torch.inf)
    for some, gains in _tiles(state, gains_of):
        index = int(gains.argmax())
        gain = float(gains.view(-1)[index])
        if gain != gain:  # NaN of one block must not be passed over by another's number
            return replace(none, gain=gain)
        if gain > best.gain:
            row, column = divmod(index, len(removed))
            best = Exchange(torch.stack([some[row], removed[column]]), gain)
    return best


def _tiles(
    state: PivotState, gains_of: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some units that may leave, and the gains of their pairs with all that may enter."""
    kept, removed = state.support, state.removed
    if len(removed) == 0:
        return
    block = max(consumer.width for consumer in state.consumers) ** 2
    step = max(1, _PASS_ROWS // block, _PASS_ELEMENTS // (len(removed) * block))
    for some in torch.split(kept, step):
        yield some, gains_of(some, removed)


def swap_gains(state: PivotState, leave: Tensor, enter: Tensor) -> Tensor:
    """Return the gain of each pair, (len(leave), len(enter)).

    leave, enter: Units inside and outside of its support, int64.
    """

    def gains(consumer: ConsumerState) -> Tensor:
        if consumer.width == 1:
            return _scalar_gains(consumer, leave, enter)
        pairs = _Pairs.of(consumer, leave, enter)
        return block_scores(pairs.Schur, pairs.residual) - pairs.loss[:, None]

    return _total(map(gains, state.consumers))


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    return sum(others, start=first)


def _scalar_gains(state: ConsumerState, leave: Tensor, enter: Tensor) -> Tensor:
    # The formula of the text for numbers: (K_jj + 2 F K_ij + F^2 W2) / (N_jj + F^2 A) - W2 / A.
    N, K = state.N_blocks.flatten(), state.K_blocks.flatten()
    A, W2 = -N[leave, None], K[leave, None]
    F, numerator = state.pairs(leave, enter)
    F = F.div_(A)
    numerator = numerator.mul_(2).addcmul_(F, W2).mul_(F).add_(K[enter])
    denominator = F.square_().mul_(A).add_(N[enter])
    return numerator.div_(denominator).sub_(W2 / A)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The blocks of the text above, for l units that leave and e that enter.

    Schur, residual: ``s + F A_ii F'`` and ``(R_j + F W_i)(R_j + F W_i)'``, (l, e, w, w) each.
    half: ``B N_ij``, (l, e, w, w), for an ``inv(A_ii) = B'B``.
    inverse: ``inv(A_ii)``, (l, w, w).
    loss: What it costs that each unit leaves, (l,).
    """

    Schur: Tensor
    residual: Tensor
    half: Tensor
    inverse: Tensor
    loss: Tensor

    @classmethod
    def of(cls, state: ConsumerState, leave: Tensor, enter: Tensor) -> _Pairs:
        w, N, K = state.width, state.N_blocks, state.K_blocks
        factor = torch.linalg.cholesky(-N[leave])
        unit = torch.eye(w, dtype=N.dtype, device=N.device).expand_as(factor)
        root = torch.linalg.solve_triangular(factor, unit, upper=False)
        inverse = root.mT @ root
        N_ij, K_ij = (
            matrix.reshape(len(leave), w, len(enter), w).transpose(1, 2)
            for matrix in state.pairs(leave, enter)
        )
        # As a square it adds to N_jj whatever it rounds to, so that the sum stays definite.
        half = root[:, None] @ N_ij
        Schur = N[enter] + half.mT @ half
        F = half.mT @ root[:, None]
        cross = F @ (K_ij + K[leave][:, None] @ (F.mT / 2))
        residual = K[enter] + cross + cross.mT
        return cls(Schur, residual, half, inverse, (inverse * K[leave]).sum((-2, -1)))


@dataclass(frozen=True, eq=False)
class _Reach:
    """How large an exchange can make the refit W of one consumer, each row scaled by D.

    state: N and K.
    size: ``|D W|`` before the exchange.
    columns: Blocks of ``N_:S D D N_S:``, (n, w, w): what a unit's column of N moves.
    own: The largest entry of D in the rows of each unit, (n,).
    root: Root of the loss of the empty support, which no ``|G_i|`` exceeds, scaled by D.
    unit: Rounding, relative to squares of the size.
    """

    state: ConsumerState
    size: float
    columns: Tensor
    own: Tensor
    root: float
    unit: float

    @classmethod
    def of(cls, state: ConsumerState) -> _Reach:
        consumer = state.terms.consumer
        D = state.terms.diagonal().sqrt().view(-1, state.width)
        kept = torch.where(state.kept[:, None], D, 0.0)
        squares = state.K_blocks.diagonal(dim1=1, dim2=2)
        size = float((kept.square() * squares).sum().sqrt())
        columns = state.column_sizes(kept.flatten())
        unit = _EPS * (int(state.kept.sum()) * state.width + consumer.G.shape[1])
        return cls(state, size, columns, D.amax(1), math.sqrt(consumer.e), unit)

    def gains(self, leave: Tensor, enter: Tensor) -> Tensor:
        """Return the gain of each pair with what rounding may have taken off, (l, e)."""
        pairs = _Pairs.of(self.state, leave, enter)
        inverse = _inverse(pairs.Schur)
        won = (inverse * pairs.residual).sum((-2, -1)).clamp(min=0.0)
        # The unit that leaves takes D A_:i inv(A_ii) W_i along; the one that enters has weights u
        # with |u|^2 <= won tr(inv(Schur)), and moves the others by N_:j u, less what left with i.
        leaves = (pairs.inverse * self.columns[leave]).sum((-2, -1)).clamp(min=0.0).sqrt()[:, None]
        moves = self.columns[enter].diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() + self.own[enter]
        moves = moves + leaves * pairs.half.square().sum((-2, -1)).sqrt()
        entering = (won * inverse.diagonal(dim1=-2, dim2=-1).sum(-1)).sqrt()
        lost = pairs.loss[:, None].clamp(min=0.0)
        size = self.size + leaves * lost.sqrt() + moves * entering
        rounded = self.unit * (size.square() + 2 * size * self.root + won + lost)
        return won - lost + rounded


def _inverse(A: Tensor) -> Tensor:
    """Return ``inv(A)`` for batches of positive definite (w, w) blocks."""
    if A.shape[-1] == 1:
        return 1 / A
    return torch.cholesky_inverse(torch.linalg.cholesky(A))
