"""Backward elimination: remove one unit at a time, always the one that raises the loss least.

Only the diagonal blocks of ``A = inv(H_SS)`` and ``K = W W'`` are kept current.  What a removal
does to the rest is a low-rank term that stays pending; a column is brought up to date when its unit
leaves, and every so often all pending removals are swept at once.  One removal then costs O(p w b)
with b pending rows, and the matrix work is a few dense products (the lazy batched updates of
Frantar et al., GPTQ, ICLR 2023, applied to structured removal).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.pivot import ConsumerState, PivotState, block_scores

_PENDING_ROWS = 64
_SERIAL_ELEMENTS = 1 << 20
"""Below this size of the pending terms, waking threads costs more than they save."""


@dataclass(frozen=True)
class Removal:
    """One step of an elimination.

    Parameters
    ----------
    unit
        The unit that left.
    loss
        By how much the loss rose.
    """

    unit: int
    loss: float


def eliminate(state: PivotState, count: int) -> list[Removal]:
    """Remove `count` units from the support of `state`, one at a time, each the cheapest.

    The order and the losses are exact: those of a full update after each removal.

    Parameters
    ----------
    state
        Swept in place; at the end its support has `count` units fewer.
    count
        How many units to remove; less than the number kept.
    """
    removals: list[Removal] = []
    batch = max(1, _PENDING_ROWS // max(consumer.width for consumer in state.consumers))
    while len(removals) < count:
        steps = min(batch, count - len(removals))
        with _serial_if_small(state):
            removed = _remove_pending(state, steps)
        state.sweep([removal.unit for removal in removed])
        removals += removed
    return removals


def _remove_pending(state: PivotState, steps: int) -> list[Removal]:
    """Choose the next `steps` units to leave, without changing `state`."""
    pending = [_Pending(consumer, steps) for consumer in state.consumers]
    alive = state.kept.clone()
    removed: list[Removal] = []
    for _ in range(steps):
        losses = torch.stack([p.losses(alive) for p in pending]).sum(0)
        unit = int(torch.where(alive, losses, torch.inf).argmin())
        removed.append(Removal(unit, float(losses[unit])))
        alive[unit] = False
        for p in pending:
            p.remove(unit)
    return removed


@contextmanager
def _serial_if_small(state: PivotState) -> Iterator[None]:
    threads = torch.get_num_threads()
    small = max(len(c.N) * max(_PENDING_ROWS, c.width) for c in state.consumers) < _SERIAL_ELEMENTS
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Pending:
    """Removals of one consumer that its N and K do not show yet.

    On the rows still alive, ``A = -N - L L'`` and ``K_now = K - Z Q' - Q Z'``.
    """

    def __init__(self, state: ConsumerState, capacity: int) -> None:
        self.state = state
        self.filled = 0
        shape = (len(state.N), capacity * state.width)
        self.L, self.Z, self.Q = (state.N.new_empty(shape) for _ in range(3))
        self.A_blocks = state.blocks(state.N).neg_()
        self.K_blocks = state.blocks(state.K)

    def losses(self, alive: Tensor) -> Tensor:
        """Return the loss of removing each unit, (n,); meaningless for units not alive."""
        if self.state.width == 1:
            return (self.K_blocks / self.A_blocks).flatten()
        losses = self.K_blocks.new_zeros(len(alive))
        losses[alive] = block_scores(self.A_blocks[alive], self.K_blocks[alive])
        return losses

    def remove(self, unit: int) -> None:
        """Bring the columns of `unit` up to date, and add what its removal changes."""
        w, t = self.state.width, self.filled
        own = slice(unit * w, (unit + 1) * w)
        L, Z, Q = self.L[:, :t], self.Z[:, :t], self.Q[:, :t]
        # N and K are symmetric, and their rows are contiguous.
        A_columns = self.state.N[own].T.addmm(L, L[own].T, beta=-1, alpha=-1)
        K_columns = self.state.K[own].T.addmm(Z, Q[own].T, alpha=-1).addmm_(Q, Z[own].T, alpha=-1)
        factor = torch.linalg.cholesky(A_columns[own])
        L_new = torch.linalg.solve_triangular(factor.T, A_columns, upper=True, left=False)
        Z_new = torch.linalg.solve_triangular(factor, L_new, upper=False, left=False)
        Q_new = K_columns - Z_new @ (K_columns[own] / 2)
        new = slice(t, t + w)
        self.L[:, new], self.Z[:, new], self.Q[:, new] = L_new, Z_new, Q_new
        self.filled = t + w
        L_units, Z_units, Q_units = (x.view(-1, w, w) for x in (L_new, Z_new, Q_new))
        self.A_blocks -= L_units @ L_units.mT
        cross = Z_units @ Q_units.mT
        self.K_blocks -= cross + cross.mT
