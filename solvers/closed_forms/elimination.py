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

import torch
from torch import Tensor

from solvers.closed_forms.aligned import Aligned, unit_rows
from solvers.closed_forms.pivot import block_scores, solve_spd
from solvers.problem import Consumer, SubsetProblem

_PENDING_ROWS = 64
_SERIAL_ELEMENTS = 1 << 20
"""Below this size of the pending terms, waking threads costs more than they save."""

_CACHED = 2
"""Units whose rows are at hand for a batch of removals, relative to those that will leave."""

_MORE = 16
"""Units whose rows are read along with those of one that leaves against expectation."""

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


def eliminate(problem: SubsetProblem, count: int) -> Removals:
    """Remove `count` units from the full support, one at a time, each the cheapest.

    The order and the losses are exact: those of a fresh factorization after each removal.

    problem: The problem; what it wants to keep plays no role.
    count: How many units to remove; less than all.
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
        self._parts = [_ConsumerElimination(consumer, units) for consumer in problem.consumers]
        self._tolerance = max(_DRIFT_TOLERANCE, 100 * self._drift())

    @property
    def units(self) -> Tensor:
        """The units that are left, sorted."""
        return self._units[self._penalty == 0]

    def remove(self, steps: int) -> Removals:
        """Let the cheapest units leave, one after the other."""
        removed: Removals = []
        for part in self._parts:
            part.begin(steps, self._penalty > 0)
        count = min(_CACHED * steps, int((self._penalty == 0).sum()))
        likely = self._losses().topk(count, largest=False, sorted=False).indices
        for part in self._parts:
            part.cache_rows(likely)
        with _serial(max(part.elements for part in self._parts) < _SERIAL_ELEMENTS):
            for _ in range(steps):
                losses = self._losses()
                index = int(losses.argmin())
                removed.append((int(self._units[index]), float(losses[index])))
                for part in self._parts:
                    if not part.is_cached(index):
                        part.cache_more([index, *self._cheapest(losses, min(_MORE, count))])
                    part.remove(index)
                self._penalty[index] = torch.inf
        for part in self._parts:
            part.apply()
        self._compact()
        return removed

    def _cheapest(self, losses: Tensor, count: int) -> list[int]:
        """Return the places of some units that are left, of which there may be fewer."""
        found = losses.topk(count, largest=False).indices
        # What has left must not be read: its place goes to another unit once rows are compacted.
        places: list[int] = found[self._penalty[found] == 0].tolist()
        return places

    def _losses(self) -> Tensor:
        return sum((part.losses() for part in self._parts), start=self._penalty)

    def _compact(self) -> None:
        left = torch.nonzero(self._penalty == 0).flatten()
        if len(left) <= _COMPACT_AT * len(self._units):
            for part in self._parts:
                part.keep_only(left)
            self._units, self._penalty = self._units[left], self._penalty[left]

    def drifted(self) -> bool:
        """Return whether the updates have lost too many digits to go on from here."""
        return not self._drift() <= self._tolerance

    def _drift(self) -> float:
        left = torch.nonzero(self._penalty == 0).flatten()
        probes = torch.linspace(0, len(left) - 1, _PROBES, device=left.device).long()
        return max(part.drift(left[probes]) for part in self._parts)


@contextmanager
def _serial(small: bool) -> Iterator[None]:
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
        self.width = consumer.width
        self.terms = Aligned(consumer)
        self.rows = unit_rows(units, self.width)
        self.A, G = self.terms.gram(self.rows), self.terms.responses(self.rows)
        self.signs = _signs(G)
        self.G_signs = G @ self.signs
        self.A.factorize()
        self.W = self._refit(G)
        self.A.invert()
        self.K_blocks = self._diagonal()
        self.cache = self._read(units[:0])
        self.slot: dict[int, int] = {}

    def _refit(self, G: Tensor) -> Tensor:
        """Return the refit, in the place of G; A holds its factor."""
        consumer, whole = self.terms.consumer, len(self.rows) == len(self.terms)
        if whole and consumer.fits and G.shape[1] == consumer.G.shape[1]:
            return self.terms.W0(self.rows, out=G)
        self.A.forward(G)
        self.A.backward(G)
        return G

    @property
    def elements(self) -> int:
        """Size of the terms that one removal reads."""
        return len(self.W) * max(_PENDING_ROWS, self.width)

    def begin(self, steps: int, gone: Tensor) -> None:
        """Make room for `steps` removals; `gone` marks the units that left before."""
        w, shape = self.width, (steps * self.width, len(self.W))
        self.Z, self.Q, self.a = (self.W.new_empty(shape) for _ in range(3))
        self.V = self.W.new_empty(steps * w, self.W.shape[1])
        self.filled = 0
        unscored = torch.eye(w, dtype=torch.float64, device=self.W.device)
        self.K_blocks = self._diagonal()
        if w == 1:
            self.unscored, self.A_blocks = unscored[0, 0], self.A.diagonal()
        else:
            self.unscored, self.A_blocks = unscored, self.A.diagonal_blocks(w)
        # Units that are gone count no more; this keeps their scores finite.
        self.A_blocks[gone] = self.unscored

    def _diagonal(self) -> Tensor:
        """Return the diagonal blocks of K, (n,) or (n, w, w)."""
        if self.width == 1:
            sizes: Tensor = torch.linalg.vector_norm(self.W, dim=1).square_()
            return sizes
        blocks = self.W.view(len(self.W) // self.width, self.width, -1)
        return blocks @ blocks.mT

    def cache_rows(self, units: Tensor) -> None:
        """Have the rows, pending removals left out, of units that are likely to leave."""
        known = torch.nonzero(torch.isin(self.cache.units, units)).flatten()
        new = units[~torch.isin(units, self.cache.units)].sort().values
        self.cache = self.cache.only(known, self.width).joined(self._read(new))
        self.slot = {unit: place for place, unit in enumerate(self.cache.units.tolist())}

    def is_cached(self, unit: int) -> bool:
        """Return whether the rows of a unit are at hand."""
        return unit in self.slot

    def cache_more(self, units: Sequence[int]) -> None:
        """Have the rows of some more units, since to read them W is gone through once."""
        new = [unit for unit in dict.fromkeys(units) if not self.is_cached(unit)]
        first = len(self.cache.units)
        self.cache = self.cache.joined(self._read(self.cache.units.new_tensor(new)))
        self.slot |= {unit: first + place for place, unit in enumerate(new)}

    def _read(self, units: Tensor) -> _RowCache:
        """Return the rows of some units."""
        rows = unit_rows(units, self.width)
        W = self.W[rows]
        sizes = W.square().sum(1).view(-1, self.width).sum(1)
        return _RowCache(units, sizes, self.A.rows(rows), W @ self.W.T)

    def losses(self) -> Tensor:
        """Return the loss of removing each unit, (units,); meaningless for those removed.

        ``tr(W_i' inv(A_ii) W_i) = tr(inv(A_ii) K_ii)``, as of optimal brain surgeons (Hassibi and
        Stork, NeurIPS 1992), a block at a time.
        """
        if self.width == 1:
            scores: Tensor = self.K_blocks / self.A_blocks
            return scores
        return block_scores(self.A_blocks, self.K_blocks)

    def remove(self, index: int) -> None:
        """Bring the rows of a unit up to date, and add what its removal changes."""
        w, t = self.width, self.filled
        own, new = slice(index * w, (index + 1) * w), slice(t, t + w)
        Z, Q, a, V = self.Z[:t], self.Q[:t], self.a[:t], self.V[:t]
        A_rows, K_rows = self._stale_rows(index)
        # Bring the unit's own rows up to date: A_J - (Z'a)_J, and K_J - (Z'Q)_J - (Q'Z)_J.
        A_rows = torch.addmm(A_rows, a[:, own].T, Z, alpha=-1)
        K_rows = torch.addmm(K_rows, Z[:, own].T, Q, alpha=-1)
        K_rows.addmm_(Q[:, own].T, Z, alpha=-1)
        Z_new = solve_spd(A_rows[:, own], A_rows)
        Q_new = K_rows.addmm_(K_rows[:, own].clone(), Z_new, alpha=-0.5)
        torch.addmm(self.W[own], Z[:, own].T, V, alpha=-1, out=self.V[new])
        self.Z[new], self.Q[new], self.a[new] = Z_new, Q_new, A_rows
        self.filled = t + w
        self._update_blocks(Z_new, Q_new, A_rows)
        self.A_blocks[index] = self.unscored

    def _stale_rows(self, index: int) -> tuple[Tensor, Tensor]:
        place, w = self.slot.pop(index), self.width
        return self.cache.A[place * w : (place + 1) * w], self.cache.K[place * w : (place + 1) * w]

    def _update_blocks(self, Z: Tensor, Q: Tensor, a: Tensor) -> None:
        w = self.width
        if w == 1:
            self.A_blocks.addcmul_(Z[0], a[0], value=-1)
            self.K_blocks.addcmul_(Z[0], Q[0], value=-2)
            return
        Z, Q, a = (x.view(w, -1, w).transpose(0, 1) for x in (Z, Q, a))
        self.A_blocks -= Z.mT @ a
        cross = Z.mT @ Q
        self.K_blocks -= cross + cross.mT

    def apply(self) -> None:
        """Apply the pending removals; what is left in the removed rows is rounding."""
        w = self.width
        Z, Q, a, V = (x[: self.filled] for x in (self.Z, self.Q, self.a, self.V))
        self.A.subtract(Z.T, a)
        self.W.addmm_(Z.T, V, alpha=-1)
        # Rows at hand stay so for the next batch, but those whose K has cancelled: what is left of
        # them is the rounding of what was there.
        waiting = torch.tensor([*self.slot.values()], dtype=torch.int64, device=self.W.device)
        sizes = self._sizes()[self.cache.units]
        largest = torch.maximum(self.cache.sizes, sizes)
        sound = sizes >= _CANCELS_AT * largest
        self.cache = replace(self.cache, sizes=largest).only(waiting[sound[waiting]], w)
        own = unit_rows(self.cache.units, w)
        self.cache.A.addmm_(a[:, own].T, Z, alpha=-1)
        self.cache.K.addmm_(Z[:, own].T, Q, alpha=-1).addmm_(Q[:, own].T, Z, alpha=-1)

    def _sizes(self) -> Tensor:
        """Return the traces of the blocks of K, (n,)."""
        blocks = self.K_blocks.view(-1, self.width, self.width)
        traces: Tensor = blocks.diagonal(dim1=1, dim2=2).sum(1)
        return traces

    def keep_only(self, left: Tensor) -> None:
        """Drop all rows but those of the units at the places `left`."""
        rows = unit_rows(left, self.width)
        self.A.keep_only(rows, width=self.width)
        self.W, self.rows, self.K_blocks = self.W[rows], self.rows[rows], self.K_blocks[left]
        self.G_signs = self.G_signs[rows]
        cache = self.cache
        self.cache = _RowCache(
            torch.searchsorted(left, cache.units), cache.sizes, cache.A[:, rows], cache.K[:, rows]
        )

    def drift(self, units: Tensor) -> float:
        """Return the error of ``H A = I``, ``W = A G`` and ``K = W W'``, on rows of some units.

        Updates subtract what A and K had of the units that left; near a singular H most of both is
        subtracted, and the rounding of what was there stays.  A residual with H, which never
        changes, tells how much: of A one row of each unit probed, (16, n w), which is independent
        of all updates; of W the same rows in 4 random directions of its columns, instead of all m;
        and of K the first 4 units at hand, as its rows are held nowhere else.

        Rows of W that are nothing but rounding, as those of weights that are zero, have no digits
        to lose.
        """
        some = units * self.width
        A = self.A.rows(some)
        error = self.terms.H(self.rows[some], self.rows) @ A.T
        error -= (some[:, None] == some).to(error)
        W, sizes = self.W[some], self._sizes().clamp(min=0.0).sqrt()
        sizes = sizes.clamp(min=float(_NO_DIGITS * sizes.max()) or 1e-150)
        lost = torch.linalg.vector_norm(W @ self.signs - A @ self.G_signs, dim=1) / _DIRECTIONS**0.5
        worst = [error.abs().max(), (lost / sizes[units]).max()]
        cached = self.cache.units[:_DIRECTIONS]
        if len(cached):
            found = self.cache.K[: self.width * len(cached) : self.width]
            scale = sizes[cached][:, None] * sizes.repeat_interleave(self.width)
            exact = self.W[cached * self.width] @ self.W.T
            worst.append(((found - exact) / scale).abs().max())
        return float(torch.stack(worst).max())


@dataclass(frozen=True, eq=False)
class _RowCache:
    """Rows of A and of K, pending removals left out, of some units.

    units: (u,) int64.
    sizes: The traces of their blocks of K when these were multiplied out, (u,).
    A, K: Their rows, (u w, n w).
    """

    units: Tensor
    sizes: Tensor
    A: Tensor
    K: Tensor

    def only(self, places: Tensor, width: int) -> _RowCache:
        """Return those at some places."""
        rows = unit_rows(places, width)
        return _RowCache(self.units[places], self.sizes[places], self.A[rows], self.K[rows])

    def joined(self, other: _RowCache) -> _RowCache:
        """Return these and others."""
        return _RowCache(
            torch.cat([self.units, other.units]),
            torch.cat([self.sizes, other.sizes]),
            torch.cat([self.A, other.A]),
            torch.cat([self.K, other.K]),
        )


def _signs(G: Tensor) -> Tensor:
    """Return directions of all columns of G alike, (m, 4), the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (G.shape[1], _DIRECTIONS), generator=generator)
    return (2 * signs - 1).to(G)
