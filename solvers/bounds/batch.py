"""Bounds of many small problems at once: the nodes of a branch and bound.

The mathematics is that of `solvers.bounds.removal` and `solvers.bounds.quadratic`; the difference
is that one call of the linear algebra serves hundreds of nodes, so that what a node costs is
arithmetic and not overhead.  Nodes with fewer free units than others are padded with units that
are decoupled from all others, cost nothing, and never go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import combinations

import torch
from torch import Tensor

from solvers.bounds.quadratic import QuadraticBound
from solvers.bounds.removal import ConsumerRemoval, RemovalTerms
from solvers.certificates.certificate import LEAST_DIAGONAL, LEAST_SHARE
from solvers.certificates.tree_certificate import FREE, REMOVED
from solvers.linalg.descent import accelerated, project
from solvers.linalg.rounding import Rounding

_MARGIN = 1e-7
"""Exceeds ``n^2 eps``, to which the rounding of the eigenvalues and of the entries of Q amounts."""

_ROUNDING = 2.0**-24
"""Share of a number by which its float32 may be off."""

_NEVER = -1e6
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class TermsBatch:
    """The terms of the free units of b nodes; padding comes last.

    consumers: A, (b, n w, n w), and W, (b, n w, m), of each.
    constant: Loss with all units kept.
    rounding: What rounding can have done, here and where a claim is checked.
    units: The free units as the problem numbers them, (b, n) int64; arbitrary for padding.
    free: Which are no padding, (b, n) bool.
    spent: What the units that were removed already cost, (b,).
    removals: How many of the free units have to go, (b,) int64.
    """

    consumers: tuple[ConsumerRemoval, ...]
    constant: float
    rounding: Rounding
    units: Tensor
    free: Tensor
    spent: Tensor
    removals: Tensor

    @classmethod
    def of(cls, root: RemovalTerms, sides: Tensor) -> TermsBatch:
        """Condition all units of a problem on the sides, (b, n), that each node has decided."""
        free, removed = _Positions.of(sides == FREE), _Positions.of(sides == REMOVED)
        parts = [_condition(consumer, removed, free) for consumer in root.consumers]
        return cls(
            tuple(part for part, _ in parts),
            root.constant,
            root.rounding,
            free.index,
            free.valid,
            torch.stack([spent for _, spent in parts]).sum(0),
            root.removals - removed.valid.sum(1),
        )

    def __getitem__(self, some: Tensor) -> TermsBatch:
        """Return the terms of some nodes, given by a mask or by their places."""
        return replace(
            self,
            consumers=tuple(replace(c, A=c.A[some], W=c.W[some]) for c in self.consumers),
            units=self.units[some],
            free=self.free[some],
            spent=self.spent[some],
            removals=self.removals[some],
        )

    @property
    def log_supports(self) -> Tensor:
        """Logarithm of the number of supports that each node leaves open, (b,)."""
        n, r = self.free.sum(1).double(), self.removals.double()
        return torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)

    def certified(self, cost: Tensor) -> Tensor:
        """Turn lower bounds of the cost of the free units into ones of the exact loss, (b,)."""
        return self.rounding.certified(self.constant, self.spent + cost)

    def cost_reaching(self, loss: float) -> Tensor:
        """Return the least costs for which `certified` gives at least this loss, (b,)."""
        return self.rounding.cost_reaching(loss, self.constant) - self.spent

    def costs(self, chosen: Tensor) -> Tensor:
        """Return what removing the units at c choices of r places costs, (c, r) -> (b, c)."""
        return torch.stack([c.costs(chosen) for c in self.consumers]).sum(0)

    def cheapest(self, free: int, removals: int) -> tuple[Tensor, Tensor]:
        """Return the least cost, (b,), and its places, (b, r), of nodes with as many free units."""
        choices = torch.tensor(list(combinations(range(free), removals)), dtype=torch.int64)
        choices = choices.view(math.comb(free, removals), removals).to(self.units.device)
        if not removals:
            return torch.zeros_like(self.spent), choices.expand(len(self.spent), 0)
        costs, index = self.costs(choices).min(1)
        return costs, choices[index]


@dataclass(frozen=True, eq=False)
class _Positions:
    """The places of the true entries of each row of a mask, padded to the same number.

    index: (b, c) int64.
    valid: (b, c) bool; false for padding.
    """

    index: Tensor
    valid: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> _Positions:
        count = int(mask.sum(1).max())
        index = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        return cls(index, mask.gather(1, index))

    def rows(self, width: int) -> _Positions:
        """Return the places of the rows of units that are `width` rows each."""
        if width == 1:
            return self
        rows = self.index[..., None] * width + torch.arange(width, device=self.index.device)
        return _Positions(rows.flatten(1), self.valid.repeat_interleave(width, 1))


def _condition(
    consumer: ConsumerRemoval, removed: _Positions, free: _Positions
) -> tuple[ConsumerRemoval, Tensor]:
    """Return the terms of the free units of each node, and what its removed units cost, (b,)."""
    f, r = free.rows(consumer.width), removed.rows(consumer.width)
    A, W = _square(consumer.A, f), _entries(consumer.W[f.index], f.valid[:, :, None])
    if r.index.shape[1] == 0:
        return replace(consumer, A=A, W=W), A.new_zeros(len(A))
    # With A_RR = L L': what is left is A_FF - C'C and W_F - C'h for C = inv(L) A_RF and
    # h = inv(L) W_R, and |h|^2 is what the removed rows cost (`solvers.bounds.removal`).
    factor = torch.linalg.cholesky(_square(consumer.A, r))
    cross = consumer.A[r.index[:, :, None], f.index[:, None, :]]
    right = torch.cat([cross, consumer.W[r.index]], 2)
    right = _entries(right, r.valid[:, :, None])
    solved = torch.linalg.solve_triangular(factor, right, upper=False)
    columns, half = solved.split([A.shape[2], W.shape[2]], 2)
    columns = _entries(columns, f.valid[:, None, :])
    A = A.baddbmm_(columns.mT, columns, alpha=-1)
    W = W.baddbmm_(columns.mT, half, alpha=-1)
    return replace(consumer, A=A, W=W), half.square().sum((1, 2))


def _square(matrix: Tensor, places: _Positions) -> Tensor:
    """Return the principal blocks, with those of the unit matrix for padding."""
    index, valid = places.index, places.valid
    blocks = matrix[index[:, :, None], index[:, None, :]]
    if not bool(valid.all()):
        blocks *= valid[:, :, None] & valid[:, None, :]
        blocks.diagonal(dim1=1, dim2=2).add_((~valid).to(blocks))
    return blocks


def _entries(values: Tensor, valid: Tensor) -> Tensor:
    return values if bool(valid.all()) else values * valid


@dataclass(frozen=True, eq=False)
class BoundBatch:
    """Certified bounds of ``2 a'x - x'Q x`` in b nodes, as `QuadraticBound` has one.

    cost: The bounds, with what rounding can have done to them taken off, (b,).
    most: What they are below however many more steps `point` is moved, (b,).
    slopes, ordered: Reduced costs of the units and the same in order, (b, n); infinite for padding.
    q, point: Diagonal and point of the linearization, (b, n); points are float32 numbers, which is
        how a certificate keeps them.
    growth: q relative to ``shape * diag(Q)``, (b,); 1 where it is no multiple of that.
    """

    cost: Tensor
    most: Tensor
    slopes: Tensor
    ordered: Tensor
    q: Tensor
    point: Tensor
    growth: Tensor

    @classmethod
    def single(cls, bound: QuadraticBound) -> BoundBatch:
        """Return the bound of one node as a batch; it claims nothing if q does not dominate."""
        cost = bound.q.new_tensor([bound.value if bound.dominates else -math.inf])
        slopes = bound.slopes[None]
        ordered = slopes.sort(1).values
        growth = torch.ones_like(cost)
        return cls(cost, cost, slopes, ordered, bound.q[None], bound.point[None], growth)

    def __getitem__(self, some: Tensor) -> BoundBatch:
        """Return the bounds of some nodes, given by a mask or by their places."""
        return BoundBatch(*(getattr(self, field.name)[some] for field in fields(self)))

    def with_rows(self, some: Tensor, others: BoundBatch) -> BoundBatch:
        """Return the bounds with those of others in the places where a mask, (b,), is true."""
        pairs = ((getattr(self, f.name), getattr(others, f.name)) for f in fields(self))
        return BoundBatch(*(own.index_put((some,), other) for own, other in pairs))

    def if_removed(self, terms: TermsBatch) -> Tensor:
        """Return by how much the bound rises if each unit has to go, (b, n); or less."""
        return self.slopes - self.ordered.gather(1, terms.removals[:, None] - 1)

    def if_kept(self, terms: TermsBatch) -> Tensor:
        """Return by how much the bound rises if each unit has to stay, (b, n); or less."""
        return self.ordered.gather(1, terms.removals[:, None]) - self.slopes


def bound_nodes(
    terms: TermsBatch, share: Tensor, shape: Tensor, start: Tensor, steps: int
) -> BoundBatch:
    """Bound the cost of the free units of every node by common multipliers.

    terms: Nodes in which at least one unit is free to go and one to stay.
    share, shape: What the multipliers are computed from, (b, n); arbitrary for padding.
    start: Where the minimization over the polytope starts, (b, n), scaled to its sum; likewise.
    steps: The most gradient steps in that minimization.
    """
    free, r = terms.free, terms.removals
    share = torch.where(free, share, 1.0).clamp(min=LEAST_SHARE, max=1.0)
    shape = torch.where(free, shape, 1.0)
    parts = [c.aggregate(c.multipliers(share, shape)) for c in terms.consumers]
    a, Q, magnitudes = (sum(sums[1:], sums[0]) for sums in zip(*parts, strict=True))
    # Padding get the largest q, so that they bend no step; their x stays 0, their slope infinite.
    growth, q = dominating(Q, shape, max(_MARGIN, terms.rounding.margin(Q.shape[-1])))
    q = torch.where(free, q, q.amax(1, keepdim=True))
    start = torch.where(free, start.clamp(min=LEAST_SHARE), 0.0)
    start = (start * (r / start.sum(1))[:, None]).clamp_(max=1.0)

    def step(y: Tensor) -> Tensor:
        # As in `solvers.bounds.quadratic.minimize`.
        target = torch.where(free, (_times(Q, y) - a) / q + 0.5, _NEVER)
        return project(target, 1 / q, r)

    x = accelerated(start, step, q, steps, _TOLERANCE).float().double()
    Px = q * x - _times(Q, x)
    slopes = torch.where(free, 2 * (a + Px) - q, torch.inf)
    ordered = slopes.sort(1).values
    offset = (x * Px).sum(1) + magnitudes.lost(torch.where(free, q, 0.0), x)
    least = torch.arange(ordered.shape[1], device=r.device) < r[:, None]
    cost = torch.where(least, ordered, 0.0).sum(1) - offset
    # The value at a point of the polytope is such a limit.  x is one but for the rounding of its
    # entries, and slopes are the gradient.
    at = torch.where(free, slopes, 0.0) * x
    most = at.sum(1) + _ROUNDING * at.abs().sum(1) - offset
    return BoundBatch(cost, most, slopes, ordered, q, x, growth)


def dominating(Q: Tensor, shape: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return the least multiples of ``shape o diag(Q)`` that dominate Q by a margin.

    These are the factors, (b,), and q, (b, n).  Where bounds are close, a factor that is a few per
    cent too large takes a hundred times as many nodes.
    """
    d = Q.diagonal(dim1=1, dim2=2)
    largest = d.amax(1, keepdim=True)
    d = d.clamp(min=torch.where(largest > 0, LEAST_DIAGONAL * largest, 1.0)) * shape
    scale = d.rsqrt()
    values = torch.linalg.eigvalsh(Q * scale[:, :, None] * scale[:, None, :])
    growth = values[:, -1].clamp(min=1e-3) * (1 + margin)
    return growth, d * growth[:, None]


def _times(Q: Tensor, x: Tensor) -> Tensor:
    return (Q @ x[:, :, None])[:, :, 0]
