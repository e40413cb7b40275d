"""Exchanges of one kept unit for one removed unit: the exact gain of every pair.

For a state on support S, removing unit i first turns the Schur complement of unit j into
``s + F A_ii F'`` and its residual into ``R_j + F W_i`` with ``F = N_ji inv(A_ii)``, so that the
exchange lowers the loss by

    tr(inv(s + F A_ii F') (R_j + F W_i)(R_j + F W_i)')  -  tr(inv(A_ii) W_i W_i')

summed over the consumers.  Only N and K enter, so all k (n - k) pairs cost a few dense passes.

These gains are rounded: near a singular H they are found to be off by a twentieth of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.closed_forms.pivot import ConsumerState, PivotState, block_scores

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
