"""What consumers read, summed while the calibration data flow through, and posed as a problem.

Targets are ``Y = X W0 + s D`` with a correction weight s (see `osscar.walk.targets`).  Sums of
held-out samples are kept apart: no weight is fitted to them, and they choose s.  Sums of several
processes are added up once a group is measured, which changes the last of 53 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osscar.base.errors import warn_of
from osscar.base.printable import pluralize
from osscar.base.ranks import Ranks
from osscar.consumers.consumer import LinearMap
from osscar.walk.sums import Sums, inner
from solvers import Consumer, SubsetProblem
from solvers.closed_forms.fixed_rows import FixedRows, eliminate_fixed
from solvers.linalg.symmetric import Symmetric

_UNSEEN = 0.1
"""How many positions of mean energy an input may have hidden behind those that were seen: a share q
of all positions is missed by n of them with probability ``(1 - q)^n``, nine times in ten where
``q = 0.1 / n``."""

_FIXED_PULL = 10.0
"""Fixed rows have good weights already, and many of them are fitted to few samples: pulled no more
than others, they lower the losses of layers, and raise the divergence on fresh images."""

_LEAST_DAMP = 1e-6
"""Where fixed rows are eliminated: what they do not explain of a unit is no rounding then."""

_ROUNDING = 1e-12
"""Share of all that is to be explained by which rounding may miss what fixed rows leave of it: that
may be next to nothing, and no loss is negative."""


class GramAccumulator:
    """Sums of one consumer over all positions seen so far, and of those that are held out."""

    def __init__(
        self, linear_map: LinearMap, *, held_out: bool = False, corrections: bool = False
    ) -> None:
        self.linear_map = linear_map
        self.fitted = Sums(linear_map, corrections=corrections)
        self.held_out = Sums(linear_map, corrections=corrections) if held_out else None
        self._fixed: FixedRows | None = None
        """What gives fixed rows back, once the problem is posed."""

    @property
    def parts(self) -> tuple[Sums, ...]:
        """What weights are fitted to, and what is held out."""
        return (self.fitted,) if self.held_out is None else (self.fitted, self.held_out)

    @property
    def rows(self) -> int:
        """At how many positions, of those weights are fitted to, the consumer reads anything."""
        return self.fitted.rows

    @property
    def held_out_rows(self) -> int:
        """The same of the positions that were held out."""
        return 0 if self.held_out is None else self.held_out.rows

    def add_call(self, x: Any, D: Tensor | None, *, held_out: bool = False) -> None:
        """Add what the consumer reads in a call, with corrections in the shape of its output."""
        corrections = None if D is None else self.linear_map.read_corrections(D, x)
        self.parts[held_out].positions += self.linear_map.passed_over(x)
        done = 0
        for X in self.linear_map.read_inputs(x):
            D_part = None if corrections is None else corrections[done : done + len(X)]
            self.add(X, D_part, held_out=held_out)
            done += len(X)

    def add(self, X: Tensor, D: Tensor | None = None, *, held_out: bool = False) -> None:
        """Add inputs, (positions, p), and corrections of the targets, (positions, m)."""
        self.parts[held_out].add(X, D)

    def held_out_rise(self, W0: Tensor, before: Tensor, after: Tensor) -> float:
        """Return by how much the held-out error rises from one W, (p, m), to another."""
        assert self.held_out is not None
        return self.held_out.centred(about=self.fitted).rise(W0, before, after)

    def consumer(self, damp: float, correction_weight: float = 1.0) -> Consumer:
        """Return the quadratic terms of the problem to reproduce the targets on these inputs.

        The sums that weights are fitted to are given up for its Hessian.  Fixed rows are
        eliminated, and pulled towards no change; losses stay relative to what is lost without any
        unit.
        """
        W0, units = self.linear_map.read_unit_weight(), self.linear_map.unit_rows
        fixed, n = self.linear_map.fixed, self.rows
        H, targets = self.fitted.given_up(W0, correction_weight)
        if not fixed:
            return damped_by_input(H, W0, targets=targets, units=units, damp=damp, positions=n)
        # Squares of what is nearly zero vanish in float32 before its products with others do.
        silent = self.linear_map.vacant | (H.diagonal() == 0)
        H.clear(silent)
        G, e = (H.product(W0), None) if targets is None else targets
        G[silent] = 0
        added = max(damp, _LEAST_DAMP) * pulls(H.diagonal(), n, fixed)
        e = (inner(W0, G) if e is None else e) + float(added @ W0.square().sum(1))
        G.addcmul_(added[:, None], W0)
        silent[fixed:] = False  # `Consumer` knows what to do with those of units
        H.add_diagonal(added + silent.to(added))
        self._fixed, H, G, least = eliminate_fixed(H, G, e, fixed)
        return Consumer.from_gram(
            H,
            W0[fixed:].clone(),
            G=None if targets is None else G,
            e=None if targets is None else least + _ROUNDING * e,
            units=[[row - fixed for row in own] for own in units],
            damp=0.0,
            scale=e,
            overwrite=True,
        )

    def all_rows(self, W: Tensor) -> Tensor:
        """Return the weights of all rows, (p, m), given those of the problem."""
        if self._fixed is None:
            return W
        found, fixed = self.linear_map.read_weight(), self.linear_map.fixed
        found[:fixed] += self._fixed.refit(W)
        found[fixed:] = W
        return found

    def bias(self, W: Tensor) -> Tensor | None:
        """Return by how much the bias, if any, changes with new weights, (p, m)."""
        if self.linear_map.bias is None:
            return None
        x, d = self.fitted.means()
        return (self.linear_map.read_weight() - W).T @ x + d


def all_reduce(accumulators: Sequence[GramAccumulator], ranks: Ranks, name: str) -> None:
    """Add up over the ranks what each has measured of the consumers of one group, in place."""
    parts = [part for accumulator in accumulators for part in accumulator.parts]
    scalars = torch.tensor([[p.positions, p.rows, p.energy] for p in parts], dtype=torch.float64)
    ranks.all_reduce(
        f"Gram matrices of {name!r}", [scalars, *(x for p in parts for x in p.tensors)]
    )
    for part, (positions, rows, energy) in zip(parts, scalars.tolist(), strict=True):
        part.positions, part.rows, part.energy = int(positions), int(rows), energy


def pulls(energies: Tensor, positions: int, fixed: int = 0) -> Tensor:
    """Return what damping is relative to, (p,): each input's energy, and no less than a floor.

    No input counts for less than if it had the mean energy at `_UNSEEN` positions more: else one
    that is nearly zero on all data that were seen could take any weight, by which fresh data are
    multiplied.  Inputs that were zero throughout have no weights to hold back.  The first rows are
    fixed, and pulled by `_FIXED_PULL` times as much.
    """
    varies = energies > 0
    mean = energies.sum() / varies.sum().clamp(min=1)
    floor = mean * (_UNSEEN / max(positions, 1))
    found = torch.where(varies, energies.maximum(floor), energies)
    found[:fixed] *= _FIXED_PULL
    return found


def damped_by_input(
    H: Symmetric,
    W0: Tensor,
    *,
    targets: tuple[Tensor, float] | None = None,
    units: Sequence[Sequence[int]],
    damp: float,
    positions: int,
) -> Consumer:
    """Return a consumer that is pulled towards its dense weights, input by input.

    The proximal term is ``sum_j damp s_j |W_j - W0_j|^2`` with s as of `pulls`.  Relative to the
    mean of the diagonal it would swamp ordinary inputs wherever a few tokens with massive
    activations carry most of the trace.  The tensors become those of the consumer.
    """
    added = damp * pulls(H.diagonal(), positions)
    G = e = None
    if targets is not None:
        G = targets[0].addcmul_(added[:, None], W0)
        e = targets[1] + float(added @ torch.linalg.vector_norm(W0, dim=1).square())
    H.add_diagonal(added)
    return Consumer.from_gram(H, W0, G=G, e=e, units=units, damp=0.0, overwrite=True)


def pose(
    accumulators: Sequence[GramAccumulator],
    keep: int,
    name: str,
    damp: float,
    correction_weight: float = 1.0,
) -> SubsetProblem:
    """Return the problem of one group, whose loss is the sum over the layers that read it.

    Each of several layers counts relative to its loss without any unit, as otherwise the one with
    the largest outputs would choose alone.  All groups of a convolution are one layer, and all
    experts of a mixture.  A warning names layers that read fewer positions than they have inputs.
    """
    layers = [accumulator.linear_map.name for accumulator in accumulators]
    for layer in dict.fromkeys(layers):
        own = [one for one in accumulators if one.linear_map.name == layer]
        few = [one for one in own if 0 < one.rows < one.linear_map.rows]
        if few:
            least = min(few, key=lambda one: one.rows)
            more = f", and too few at {len(few) - 1} more of the {len(own)}" if few[1:] else ""
            warn_of(
                "the Gram matrix is rank-deficient, and only damping makes up for it, of {}; use "
                "more samples or larger ones",
                f"{least.linear_map.label} ({pluralize(least.rows, 'calibration position')} for "
                f"{pluralize(least.linear_map.rows, 'input')}{more})",
            )
    consumers = [accumulator.consumer(damp, correction_weight) for accumulator in accumulators]
    totals = dict.fromkeys(layers, 0.0)
    for layer, consumer in zip(layers, consumers, strict=True):
        totals[layer] += consumer.e if consumer.scale is None else consumer.scale
    if len(totals) > 1:
        for place, layer in enumerate(layers):
            # One after the other: what is divided makes way for what comes of it.
            consumers[place] = consumers[place].divided(totals[layer] or 1.0)
    return SubsetProblem(tuple(consumers), keep, name)
