"""Backward elimination: remove one unit at a time, always the one that raises the loss least.

Only ``A = inv(H_SS)``, in half of its memory, and the refit W of the kept rows are held; of A and
of ``K = W W'`` only the diagonal blocks are kept current.  What a removal does to the rest is a
low-rank term that stays pending; a row of A and of K is brought up to date when its unit leaves,
and every so often all pending removals are applied at once, and removed rows dropped.  Rows of
units that are likely to leave are multiplied out together, and stay at hand while they are.
One removal then costs O(p w b) with b pending rows, and the matrix work is a few dense products
(the lazy batched updates of Frantar et al., GPTQ, ICLR 2023, applied to structured removal).

Near a singular H, updates of the inverse cancel: every batch is checked against H itself, and one
that has lost its digits is done again from a fresh factorization, in smaller steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from solvers.closed_forms.row_blocks import gram_on, narrowed, unit_rows
from solvers.problem import Consumer, SubsetProblem

_PENDING_ROWS = 64
_SERIAL_ELEMENTS = 1 << 20
"""Below this size of the pending terms, waking threads costs more than they save."""

_CACHED, _CACHED_ON_CARD = 2, 4
"""Units whose rows are at hand for a batch of removals, relative to those that will leave."""

_MORE = 16
"""Units whose rows are read along with those of one that leaves against expectation."""

_AT_ONCE, _AT_ONCE_ON_CARD = 8, 64
"""Units that leave before anybody looks which: a card is waited for once in so many removals, and
all of them leave anew where the rows of one were not at hand."""

_CANCELS_AT = 1e-2
"""Share of a unit's K below which its row is multiplied out anew: two digits have cancelled."""

_COMPACT_AT = 0.8
"""Share of rows still in use below which the others are dropped; doing so costs a copy."""

_PROBES = 16
_DIRECTIONS = 4
"""In which a refit is compared with another: its errors point in all."""

_DRIFT_TOLERANCE = 1e-8
_NO_DIGITS = 1e-4
"""Of the largest row of W: errors of smaller rows count as if they were so large."""


Removals = list[tuple[int, float]]
"""The units that left, one after the other, and by how much the loss rose with each."""

_Mark: TypeAlias = tuple[Tensor, int, Tensor]


def eliminate(problem: SubsetProblem, count: int) -> Removals:
    """Remove `count` units, less than all, from the full support, one at a time, each the cheapest.

    The order and the losses are exact: those of a fresh factorization after each removal.
    """
    removals: Removals = []
    front = _Elimination(problem, torch.arange(problem.units, device=problem.device))
    most = batch = max(1, _PENDING_ROWS // problem.width)
    while len(removals) < count:
        steps, before = min(batch, count - len(removals)), front.units
        try:
            removed, lost = front.remove(steps), front.drifted()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if steps == 1:
                raise
            lost = True
        if not lost:
            batch = min(2 * batch, most)
        elif steps > 1:
            front, batch = _Elimination(problem, before), max(1, steps // 8)
            continue
        else:
            # One step from a sound state is as good as arithmetic gets; the next starts afresh.
            front = _Elimination(problem, front.units)
        removals += removed
    return removals


def support_after(removals: Removals, problem: SubsetProblem) -> Tensor:
    """Return the units that are left after some removals from the full support, sorted."""
    kept = torch.ones(problem.units, dtype=torch.bool, device=problem.device)
    kept[[unit for unit, _ in removals]] = False
    return torch.nonzero(kept).flatten()


class _Elimination:
    """The units that are left, and what a removal costs."""

    def __init__(self, problem: SubsetProblem, units: Tensor) -> None:
        self._units = units
        # Added to the losses: infinite for units that left since the rows were last compacted.
        self._penalty = torch.zeros(len(units), dtype=torch.float64, device=units.device)
        self._left = torch.arange(len(units), device=units.device)
        """The places of those that are left."""
        on_card = units.device.type != "cpu"
        self._cached = _CACHED_ON_CARD if on_card else _CACHED
        self._at_once = _AT_ONCE_ON_CARD if on_card else _AT_ONCE
        self._parts = [_ConsumerElimination(consumer, units) for consumer in problem.consumers]
        self._tolerance = max(_DRIFT_TOLERANCE, 100 * self._drift())

    @property
    def units(self) -> Tensor:
        """The units that are left, sorted."""
        return self._units[self._left]

    def remove(self, steps: int) -> Removals:
        """Let the cheapest units leave, one after the other."""
        removed: Removals = []
        for part in self._parts:
            part.begin(steps, self._penalty > 0)
        count = min(self._cached * steps, len(self._left))
        likely = self._losses().topk(count, largest=False, sorted=False).indices
        for part in self._parts:
            part.cache_rows(likely)
        with serial(max(part.elements for part in self._parts) < _SERIAL_ELEMENTS):
            while len(removed) < steps:
                left = len(self._left) - len(removed)
                more = min(_MORE, count, left)
                removed += self._some(min(self._at_once, steps - len(removed)), more)
        for part in self._parts:
            part.apply()
        self._compact(len(self._left) - steps)
        return removed

    def _some(self, steps: int, more: int) -> Removals:
        """Let a few units leave, and look afterwards whether the rows of all were at hand.

        If not, they come back, the missing rows are read, with those of the next `more` units, and
        they leave once more.
        """
        while True:
            penalty, marks = self._penalty.clone(), [part.mark() for part in self._parts]
            losses, places = [], []
            for _ in range(steps):
                loss, index = self._losses().min(0)
                losses.append(loss)
                places.append(index[None])
                for part in self._parts:
                    part.remove(places[-1])
                self._penalty.index_fill_(0, places[-1], torch.inf)
            at, lost = torch.cat(places), torch.stack(losses)
            ready = torch.stack([part.at_hand[at] for part in self._parts]).all(0)
            failed = torch.stack([part.failed for part in self._parts]).any().expand(steps)
            told = torch.stack([at, self._units[at], lost, ready, failed]).tolist()  # the one wait
            missing = [int(index) for index, hand in zip(told[0], told[3], strict=True) if not hand]
            if not missing:
                break
            self._penalty = penalty
            for part, mark in zip(self._parts, marks, strict=True):
                part.go_back(mark)
            following = self._losses().topk(more, largest=False).indices.tolist()
            for part in self._parts:
                part.cache_more([missing[0], *following])
        if any(told[4]):
            raise torch.linalg.LinAlgError("a block of the inverse is not positive definite")  # type: ignore[attr-defined]
        for part in self._parts:
            part.at_hand.index_fill_(0, at, False)
        return [(int(unit), loss) for unit, loss in zip(told[1], told[2], strict=True)]

    def _losses(self) -> Tensor:
        losses = self._penalty
        for part in self._parts:
            losses = part.add_losses(losses)
        return losses

    def _compact(self, count: int) -> None:
        places = torch.arange(len(self._units), device=self._units.device)
        self._left = left = _first(self._penalty > 0, places, count)
        if len(left) <= _COMPACT_AT * len(self._units):
            for part in self._parts:
                part.keep_only(left)
            self._units, self._penalty = self._units[left], self._penalty[left]
            self._left = torch.arange(len(left), device=left.device)

    def drifted(self) -> bool:
        """Return whether the updates have lost too many digits to go on from here."""
        return not self._drift() <= self._tolerance

    def _drift(self) -> float:
        left = self._left
        probes = torch.linspace(0, len(left) - 1, _PROBES, device=left.device).long()
        return max(part.drift(left[probes]) for part in self._parts)


@contextmanager
def serial(small: bool) -> Iterator[None]:
    """Compute in one thread while the block runs, if waking others costs more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _ConsumerElimination:
    """A and W of one consumer on the units that are left, and removals that they lack.

    When unit J leaves, block elimination on ``A = inv(H_SS)``, ``W = A G_S`` and ``K = W W'`` gives

        Z = inv(A_JJ) A_J:,    A -= A_:J Z,    W -= Z' W_J,    K -= Z' Q + Q' Z,
        Q = K_J: - K_JJ Z / 2,

    Q holding half of the square term ``Z' K_JJ Z`` of ``(W - Z' W_J)(W - Z' W_J)'``.  None of these
    products is made at once.  The blocks Z, Q, ``a = A_J:`` and ``V = W_J`` are written below those
    of the removals before, as *pending rows*, t of them; the matrices that are held are *stale*,
    and the current ones are ``A - Z'a``, ``K - Z'Q - Q'Z`` and ``W - Z'V``.  To choose a unit takes
    the diagonal blocks alone, which are kept current; to remove it takes its rows of A and K, which
    are its stale rows less those of three thin products, (w, t) by (t, n w).  `apply` then makes
    the pending products of a whole batch in one pass, at the speed of a matrix product.
    """

    def __init__(self, consumer: Consumer, units: Tensor) -> None:
        self.consumer, self.width = consumer, consumer.width
        self.rows = consumer.rows[units].flatten()
        self.A, G = gram_on(consumer, self.rows), narrowed(consumer.G[self.rows])
        generator = torch.Generator().manual_seed(0)  # directions of all columns of G alike
        signs = torch.randint(0, 2, (G.shape[1], _DIRECTIONS), generator=generator)
        self.signs = (2 * signs - 1).to(G)
        self.G_signs = G @ self.signs
        self.A.factorize()
        self.W = self._refit(G)
        self.A.invert()
        self.blocks = self._diagonal()
        """The diagonal blocks of K, halved, and of A."""
        self.cache = self._read(units[:0])
        self.at_hand = torch.zeros(len(units), dtype=torch.bool, device=units.device)
        """Which units have rows in the cache, and have not left."""
        self.failed = self.at_hand.new_zeros(())
        """Whether a block that is to be positive definite was not."""

    def _refit(self, G: Tensor) -> Tensor:
        """Return the refit, in the place of G; A holds its factor."""
        if self.consumer.fits and G.shape == self.consumer.G.shape:
            return torch.index_select(self.consumer.W0, 0, self.rows, out=G)
        self.A.forward(G)
        self.A.backward(G)
        return G

    @property
    def elements(self) -> int:
        """Size of the terms that one removal reads."""
        return len(self.W) * max(_PENDING_ROWS, self.width)

    def begin(self, steps: int, gone: Tensor) -> None:
        """Make room for `steps` removals; `gone` marks the units that left before."""
        w = self.width
        self.pending = self.W.new_empty(3, steps * w, len(self.W))
        self.left: list[Tensor] = []
        self.failed = torch.zeros_like(self.failed)
        self.blocks = self._diagonal()
        # Units that are gone count no more; this keeps their scores finite.
        self.unscored = torch.eye(w, dtype=torch.float64, device=self.W.device).view(
            self.blocks[1, :1].shape
        )
        gone = gone.view(-1, *(1 for _ in self.blocks.shape[2:]))
        self.blocks[1] = torch.where(gone, self.unscored, self.blocks[1])

    def _diagonal(self) -> Tensor:
        """Return the diagonal blocks of K, halved, and of A: (2, n) or (2, n, w, w)."""
        if self.width == 1:
            sizes = torch.linalg.vector_norm(self.W, dim=1).square_()
            return torch.stack([sizes.div_(2), self.A.diagonal()])
        blocks = self.W.view(len(self.W) // self.width, self.width, -1)
        return torch.stack([(blocks @ blocks.mT).div_(2), self.A.diagonal_blocks(self.width)])

    def cache_rows(self, units: Tensor) -> None:
        """Have the rows, pending removals left out, of units that are likely to leave."""
        known = torch.nonzero(torch.isin(self.cache.units, units)).flatten()
        new = _first(torch.isin(units, self.cache.units), units, len(units) - len(known))
        new = new.sort().values
        self.cache = self.cache.only(known, self.width).joined(self._read(new))
        self.at_hand = torch.zeros_like(self.rows[:: self.width], dtype=torch.bool)
        self._find(self.cache.units)

    def cache_more(self, units: Sequence[int]) -> None:
        """Have the rows of some more units, since to read them W is gone through once."""
        wanted = self.cache.units.new_tensor([*dict.fromkeys(units)])
        new = wanted[~self.at_hand[wanted]]
        self.cache = self.cache.joined(self._read(new))
        self._find(new)

    def _find(self, new: Tensor) -> None:
        """Note where the rows of each unit are, of which some are new."""
        self.place = torch.zeros_like(self.at_hand, dtype=torch.int64)
        self.place[self.cache.units] = torch.arange(len(self.cache.units), device=new.device)
        self.at_hand[new] = True

    def _read(self, units: Tensor) -> _RowCache:
        """Return the rows of some units."""
        rows = unit_rows(units, self.width)
        W = self.W[rows]
        sizes = W.square().sum(1).view(-1, self.width).sum(1)
        return _RowCache(units, sizes, torch.stack([W @ self.W.T, self.A.rows(rows)]))

    def add_losses(self, losses: Tensor) -> Tensor:
        """Add the loss of removing each unit to others, (units,); meaningless for those removed.

        ``tr(W_i' inv(A_ii) W_i) = tr(inv(A_ii) K_ii)``, as of optimal brain surgeons (Hassibi and
        Stork, NeurIPS 1992), a block at a time.
        """
        if self.width == 1:
            return torch.addcdiv(losses, *self.blocks, value=2)
        solved = self._solved(self.blocks[1], self.blocks[0])
        return losses.add(solved.diagonal(dim1=-2, dim2=-1).sum(-1), alpha=2)

    def _solved(self, A: Tensor, B: Tensor) -> Tensor:
        """Return ``inv(A) B`` of blocks, (..., w, w); whether all are definite is noted."""
        factor, info = torch.linalg.cholesky_ex(A)
        self.failed = self.failed | (info > 0).any()
        return torch.cholesky_solve(B, factor)

    def mark(self) -> _Mark:
        """Return what removals change until they are applied."""
        return self.blocks.clone(), len(self.left), self.failed

    def go_back(self, mark: _Mark) -> None:
        """Take back what was removed since a mark."""
        self.blocks, count, self.failed = mark
        del self.left[count:]

    def remove(self, index: Tensor) -> None:
        """Bring the rows of a unit, (1,) int64, that is `at_hand` up to date, and let it leave."""
        w, t = self.width, len(self.left) * self.width
        own, new = unit_rows(index, w), slice(t, t + w)
        before = self.pending[:, :t]  # Q, Z and a of what left earlier
        columns = before.index_select(2, own).mT
        stale = self.cache.rows.index_select(1, unit_rows(self.place[index], w))
        # K_J - (Z'Q)_J and A_J - (a'Z)_J at once, in the places of Q and a; K also lacks (Q'Z)_J.
        rows = torch.baddbmm(stale, columns[1:], before[:2], alpha=-1, out=self.pending[::2, new])
        Q_new, Z_new, a_new = self.pending[:, new]
        Q_new.addmm_(columns[0], before[1], alpha=-1)
        K_own, A_own = rows.index_select(2, own)
        if w == 1:
            torch.div(a_new, A_own, out=Z_new)
        else:
            Z_new.copy_(self._solved(A_own, a_new))
        Q_new.addmm_(K_own, Z_new, alpha=-0.5)
        self.left.append(own)
        if w == 1:
            self.blocks.addcmul_(Z_new, rows[:, 0], value=-1)
        else:
            Z, Q, a = (x.view(w, -1, w).transpose(0, 1) for x in (Z_new, Q_new, a_new))
            cross = Z.mT @ Q
            self.blocks[0] -= (cross + cross.mT).div_(2)
            self.blocks[1] -= Z.mT @ a
        self.blocks[1].index_copy_(0, index, self.unscored)

    def apply(self) -> None:
        """Apply the pending removals; what is left in the removed rows is rounding."""
        w, gone = self.width, torch.cat(self.left)
        Q, Z, a = self.pending[:, : len(gone)]
        self.A.subtract(Z.T, a)
        # Each V is W_J less what the removals before it have taken: V_J = W_J - sum (Z'V)_J.
        step = torch.arange(len(gone), device=gone.device) // w
        before = torch.where(step[:, None] > step, Z.index_select(1, gone).T, 0.0)
        V = torch.linalg.solve_triangular(before, self.W[gone], upper=False, unitriangular=True)
        self.W.addmm_(Z.T, V, alpha=-1)
        # Rows at hand stay so for the next batch, but those whose K has cancelled: what is left of
        # them is the rounding of what was there.
        sizes = self._sizes()[self.cache.units]
        largest = torch.maximum(self.cache.sizes, sizes)
        sound = self.at_hand[self.cache.units] & (sizes >= _CANCELS_AT * largest)
        self.cache = replace(self.cache, sizes=largest).only(torch.nonzero(sound).flatten(), w)
        own = unit_rows(self.cache.units, w)
        K, A = self.cache.rows
        A.addmm_(a[:, own].T, Z, alpha=-1)
        K.addmm_(Z[:, own].T, Q, alpha=-1).addmm_(Q[:, own].T, Z, alpha=-1)

    def _sizes(self) -> Tensor:
        """Return the traces of the blocks of K, (n,)."""
        blocks = self.blocks[0].view(-1, self.width, self.width)
        return 2 * blocks.diagonal(dim1=1, dim2=2).sum(1)

    def keep_only(self, left: Tensor) -> None:
        """Drop all rows but those of the units at the places `left`."""
        rows = unit_rows(left, self.width)
        self.A.keep_only(rows, width=self.width)
        self.W, self.rows, self.blocks = self.W[rows], self.rows[rows], self.blocks[:, left]
        self.G_signs = self.G_signs[rows]
        cache = self.cache
        self.cache = _RowCache(
            torch.searchsorted(left, cache.units), cache.sizes, cache.rows[:, :, rows]
        )

    def drift(self, units: Tensor) -> float:
        """Return the error of ``H A = I``, ``W = A G`` and ``K = W W'``, on rows of some units.

        Near a singular H updates subtract most of A and K, and the rounding of what was there
        stays; a residual with H, which never changes, tells how much.  Probed are a row of A of
        each unit, the same of W in 4 random directions of its columns, and 4 units of K at hand.
        Rows of W that are nothing but rounding have no digits to lose.
        """
        some = units * self.width
        A = self.A.rows(some)
        error = self.consumer.hessian.entries(self.rows[some], self.rows) @ A.T
        error -= (some[:, None] == some).to(error)
        W, sizes = self.W[some], self._sizes().clamp(min=0.0).sqrt()
        sizes = sizes.maximum((_NO_DIGITS * sizes.max()).clamp(min=1e-150))
        lost = torch.linalg.vector_norm(W @ self.signs - A @ self.G_signs, dim=1) / _DIRECTIONS**0.5
        worst = [error.abs().max(), (lost / sizes[units]).max()]
        cached = self.cache.units[:_DIRECTIONS]
        if len(cached):
            found = self.cache.rows[0, : self.width * len(cached) : self.width]
            scale = sizes[cached][:, None] * sizes.repeat_interleave(self.width)
            exact = self.W[cached * self.width] @ self.W.T
            worst.append(((found - exact) / scale).abs().max())
        return float(torch.stack(worst).max())


@dataclass(frozen=True, eq=False)
class _RowCache:
    """Rows of A and of K, pending removals left out, of some units.

    units: (u,) int64.
    sizes: The traces of their blocks of K when these were multiplied out, (u,).
    rows: Their rows of K and of A, (2, u w, n w).
    """

    units: Tensor
    sizes: Tensor
    rows: Tensor

    def only(self, places: Tensor, width: int) -> _RowCache:
        """Return those at some places."""
        rows = unit_rows(places, width)
        return _RowCache(self.units[places], self.sizes[places], self.rows[:, rows])

    def joined(self, other: _RowCache) -> _RowCache:
        """Return these and others."""
        return _RowCache(
            torch.cat([self.units, other.units]),
            torch.cat([self.sizes, other.sizes]),
            torch.cat([self.rows, other.rows], 1),
        )


def _first(marked: Tensor, of: Tensor, count: int) -> Tensor:
    """Return those, as many as is known without a look at a card, that are not marked."""
    return of[marked.argsort(stable=True)[:count]]
