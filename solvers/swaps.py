"""Exchanges of one kept unit for one removed unit: the exact gain of every pair.

For a state on support S, removing unit i first turns the Schur complement of unit j into
``s + F A_ii F'`` and its residual into ``R_j + F W_i`` with ``F = N_ji inv(A_ii)``, so that the
exchange lowers the loss by

    tr(inv(s + F A_ii F') (R_j + F W_i)(R_j + F W_i)')  -  tr(inv(A_ii) W_i W_i')

summed over the consumers.  Only N and K enter, so all k (n - k) pairs cost a few dense passes, and
"no pair gains" is a certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.pivot import ConsumerState, PivotState, block_scores

_PASS_ELEMENTS = 1 << 20
"""Elements of one intermediate in a pass over pairs; bounds the memory of the search."""


@dataclass(frozen=True)
class Swap:
    """An exchange and what it gains.

    Parameters
    ----------
    leave, enter
        The unit that leaves the support and the one that enters; -1 where there is no pair.
    gain
        By how much the loss falls; negative if it rises.
    """

    leave: int
    enter: int
    gain: float


def best_swap(state: PivotState) -> Swap:
    """Return the exchange that lowers the loss most, over all pairs.

    Parameters
    ----------
    state
        A state; not changed.
    """
    kept, removed = state.support, state.removed
    best = Swap(-1, -1, -torch.inf)
    if len(removed) == 0:
        return best
    block = max(consumer.width for consumer in state.consumers) ** 2
    step = max(1, _PASS_ELEMENTS // (len(removed) * block))
    for some in torch.split(kept, step):
        gains = swap_gains(state, some, removed)
        index = int(gains.argmax())
        gain = float(gains.view(-1)[index])
        if gain > best.gain:
            row, column = divmod(index, len(removed))
            best = Swap(int(some[row]), int(removed[column]), gain)
    return best


def swap_gains(state: PivotState, leave: Tensor, enter: Tensor) -> Tensor:
    """Return the gain of each pair, (len(leave), len(enter)).

    Parameters
    ----------
    state
        A state; not changed.
    leave, enter
        Units inside and outside of its support, int64.
    """
    gains = [
        (_scalar_gains if consumer.width == 1 else _block_gains)(consumer, leave, enter)
        for consumer in state.consumers
    ]
    return torch.stack(gains).sum(0) if len(gains) > 1 else gains[0]


def _scalar_gains(state: ConsumerState, leave: Tensor, enter: Tensor) -> Tensor:
    # The formula of the text for numbers: (K_jj + 2 F K_ij + F^2 W2) / (N_jj + F^2 A) - W2 / A.
    A = -state.N.diagonal()[leave, None]
    W2 = state.K.diagonal()[leave, None]
    pairs = leave[:, None], enter
    F = state.N[pairs].div_(A)
    numerator = state.K[pairs].mul_(2).addcmul_(F, W2).mul_(F).add_(state.K.diagonal()[enter])
    denominator = F.square_().mul_(A).add_(state.N.diagonal()[enter])
    return numerator.div_(denominator).sub_(W2 / A)


def _block_gains(state: ConsumerState, leave: Tensor, enter: Tensor) -> Tensor:
    w = state.width
    N, K = (
        matrix.view(-1, w, len(matrix) // w, w).transpose(1, 2) for matrix in (state.N, state.K)
    )
    A_inverse, root = _inverse_root(-N[leave, leave])
    N_ij, K_ij = N[leave[:, None], enter], K[leave[:, None], enter]
    # As a square it adds to N_jj whatever it rounds to, so that the sum stays definite.
    half = root[:, None] @ N_ij
    Schur = N[enter, enter] + half.mT @ half
    F = half.mT @ root[:, None]
    cross = F @ (K_ij + K[leave, leave][:, None] @ (F.mT / 2))
    residual = K[enter, enter] + cross + cross.mT
    loss = (A_inverse * K[leave, leave]).sum((-2, -1))
    return block_scores(Schur, residual) - loss[:, None]


def _inverse_root(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``inv(A) = B'B`` and B for batches of positive definite (w, w) blocks."""
    factor = torch.linalg.cholesky(A)
    unit = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    root: Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
    return root.mT @ root, root
