"""Where a walk stops: a group that all batches have reached, and how far its refit may go.

A refit has as many free weights as a layer, and calibration data have few tokens that are alike.
What it gains on them is in part noise, and the more so the fewer there are: bias against variance.
Two numbers hold it back: the damping, which pulls weights towards the dense ones, and the
correction weight s: how much of the earlier errors a target makes up for. Refits are linear in the
targets, ``W = W_0 + s W_1``, so that for a given damping the error on held-out samples, whose
targets have the corrections in full, is a parabola in s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from graph import CouplingGroup
from osscar.base.errors import warn_of
from osscar.consumers.consumer import LinearMap
from osscar.network.modules import device_of
from osscar.offload.on_disk import put_back
from osscar.walk.gram import Centred, GramAccumulator, pose, pulls
from solvers import SolutionRecord, SubsetProblem

DAMPS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What is tried; the error is flat around its least."""

DEFAULT_DAMP = 0.3
"""Where no samples are held out."""

_LEAST_DAMP = 1e-4
"""Of these refits, so that none is singular: weights of inputs that are hardly seen matter less
here than that there is an answer."""

_DIRECTIONS = 128
"""Of a layer's outputs that are looked at: random ones keep squared errors on average (Johnson and
Lindenstrauss), and the same ones serve all that is compared."""


def best_regularization(
    accumulators: Sequence[GramAccumulator],
    keep: int,
    damps: Sequence[float] = DAMPS,
    correction_weight: float | None = None,
) -> tuple[float, float]:
    """Return a damping, of those given, and the correction weight: what serves held-out samples.

    The correction weight may be given, too.  Consumers of which nothing was held out have no say.
    The units kept are those of the largest weights times inputs: what is best hardly depends on
    them.  The error of each layer counts relative to the energy of its output.
    """
    read = [(one, one.fitted.centred()) for one in accumulators]
    sizes = {one.linear_map.name: 0.0 for one in accumulators}
    for one, fitted in read if len(sizes) > 1 else ():
        W0 = one.linear_map.read_unit_weight()
        sizes[one.linear_map.name] += float((W0 * fitted.product(W0)).sum())
    sizes = {name: size if size > 0 else 1.0 for name, size in sizes.items()}
    parts = [
        _Part(one, fitted, rows, sizes[one.linear_map.name])
        for (one, fitted), rows in zip(read, _kept_rows(read, sizes, keep), strict=True)
        if one.held_out is not None
    ]
    default = DEFAULT_DAMP if DEFAULT_DAMP in damps else damps[0]
    best, least = (default, correction_weight or 0.0), math.inf
    # The default comes first: where all inputs are zero, no other is better.
    for damp in sorted(damps, key=lambda damp: damp != default):
        terms = [part.errors(damp) for part in parts]
        error, slope, curve = (float(sum(term)) for term in zip(*terms, strict=True))
        chosen = 0.0 if correction_weight is None else correction_weight
        if correction_weight is None and curve > 0:
            chosen = min(max(slope / curve, 0.0), 1.0)
        error += chosen * (chosen * curve - 2 * slope)
        if error < least:
            best, least = (damp, chosen), error
    return best


def _kept_rows(
    read: Sequence[tuple[GramAccumulator, Centred]], sizes: dict[str, float], keep: int
) -> list[Tensor]:
    """Return the rows, (r,) int64: the fixed ones that can change, and those of the units kept."""
    units = [one.linear_map.unit_rows for one, _ in read]
    scores = torch.zeros(len(units[0]), dtype=torch.float64)
    for (one, fitted), owned in zip(read, units, strict=True):
        W0 = one.linear_map.read_unit_weight()
        energies = (W0.square().sum(1) * fitted.diagonal).cpu()
        share = energies / sizes[one.linear_map.name]
        scores += share[owned].sum(1)
    best = scores.argsort(descending=True, stable=True)[:keep]
    found = []
    for (one, _), owned in zip(read, units, strict=True):
        taken = ~one.linear_map.vacant.cpu()
        taken[one.linear_map.fixed :] = False
        taken[owned[best]] = True
        found.append(torch.nonzero(taken).flatten())
    return found


class _Part:
    """One consumer on r rows, its outputs, (m,), seen in q directions; its error is over a size."""

    def __init__(self, one: GramAccumulator, fitted: Centred, rows: Tensor, size: float) -> None:
        assert one.held_out is not None
        held_out, W0 = one.held_out.centred(about=one.fitted), one.linear_map.read_unit_weight()
        m = W0.shape[1]
        if m <= _DIRECTIONS:
            seen = torch.eye(m, dtype=W0.dtype, device=W0.device)
        else:
            drawn = torch.Generator().manual_seed(0)
            seen = torch.randn(m, _DIRECTIONS, generator=drawn, dtype=W0.dtype).to(W0.device)
            seen /= math.sqrt(_DIRECTIONS)
        W0 = W0 @ seen
        corrections, held_out_corrections = fitted.corrections(seen), held_out.corrections(seen)
        energies = fitted.diagonal.masked_fill(one.linear_map.vacant, 0.0)
        held_out_G = held_out.product(W0)
        if held_out_corrections is not None:
            held_out_G += held_out_corrections
        self.H, self.held_out_H, self.size = fitted.part(rows), held_out.part(rows), size
        self.W0, self.plain, self.held_out_G = W0[rows], fitted.product(W0)[rows], held_out_G[rows]
        self.corrections = None if corrections is None else corrections[rows]
        self.pulls = pulls(energies, one.rows, one.linear_map.fixed)[rows]

    def errors(self, damp: float) -> tuple[float, float, float]:
        """Return a, b, c of the held-out error ``a - 2bs + cs^2``, but for a constant."""
        added = max(damp, _LEAST_DAMP) * self.pulls
        factor = self.H.copy()
        factor.add_diagonal(torch.where(added > 0, added, 1.0))
        factor.factorize()
        base = self.plain + added[:, None] * self.W0
        factor.forward(base)
        factor.backward(base)
        seen = self.held_out_H.product(base)
        error = float((base * (seen - 2 * self.held_out_G)).sum())
        if self.corrections is None:
            return error / self.size, 0.0, 0.0
        step = self.corrections.clone()
        factor.forward(step)
        factor.backward(step)
        slope = float((step * (self.held_out_G - seen)).sum())
        curve = float((step * self.held_out_H.product(step)).sum())
        return error / self.size, slope / self.size, curve / self.size


# ---- where the walk stops -----------------------------------------------------------------


GROWN = 100.0
"""How many times as large as the largest dense weight of a layer that of a refit may be, without
anybody being told: 26 times are seen where all is well."""

DenseTensors: TypeAlias = Mapping[str, Tensor]
"""Parameters of one module, or a weight of products, as the dense model has them, by name."""


def dense_tensors(consumers: Iterable[LinearMap]) -> dict[str, DenseTensors]:
    """Return copies of what commits of these consumers change, by what holds it."""
    found: dict[str, dict[str, Tensor]] = {}
    for one in consumers:
        own = found.setdefault(one.holder, {})
        for name in one.parameters:
            if name not in own:
                own[name] = getattr(one.module, name).detach().clone()
    return dict(found)


@dataclass(frozen=True)
class Refits:
    """The weights that a group's consumers get, each found no worse than to leave it unrefitted."""

    weights: tuple[Tensor, ...] = field(repr=False)
    """One matrix (p, m) for each consumer that is `known`."""
    unrefitted: tuple[str, ...]
    growth: float
    held_out: int
    """These three as `osscar.LayerReport` has them."""


@dataclass(frozen=True, eq=False)
class Solved:
    """A group that was solved, and whose refit was committed."""

    record: SolutionRecord
    layer: LayerStep
    refits: Refits
    damp: float
    dead: int
    """How many units nothing was known of."""
    measured: float
    """When the problem was posed, by `time.perf_counter`."""
    refitted_loss: float | None = None
    choosing: int | None = None


@dataclass(eq=False)
class LayerStep:
    """A group whose consumers all batches have reached: it can be solved, and committed."""

    group: CouplingGroup
    grams: tuple[GramAccumulator, ...] = field(repr=False)
    """What its consumers read, summed over all batches."""
    correction_weight: float = 1.0
    """Of the corrections in the targets."""
    committed: bool = False
    _committing: Callable[[LayerStep], None] = field(default=lambda step: None, repr=False)

    @property
    def consumers(self) -> tuple[LinearMap, ...]:
        """What reads the group, as matrices."""
        return tuple(gram.linear_map for gram in self.grams)

    @property
    def known(self) -> tuple[GramAccumulator, ...]:
        """Of the consumers that read anything, or of all where none did."""
        read = {gram.linear_map.name for gram in self.grams if gram.rows}
        return tuple(g for g in self.grams if g.rows or g.linear_map.name not in read)

    @property
    def unread(self) -> tuple[str, ...]:
        """The labels of the other consumers."""
        return tuple(gram.linear_map.label for gram in self.grams if gram not in self.known)

    @property
    def positions(self) -> int:
        """At how many positions weights are fitted, of the consumer that reads at the fewest."""
        return min(gram.rows for gram in self.known)

    def problem(self, keep: int, damp: float) -> SubsetProblem:
        """Pose the group's problem, once: the sums become its matrices."""
        if self.unread:
            warn_of(
                "no calibration token is sent to {}, whose weights stay as they are, but for the "
                "units that leave; give more samples",
                *self.unread,
            )
        return pose(self.known, keep, self.group.name, damp, self.correction_weight)

    def regularization(
        self, keep: int, damp: float | None = None, correction_weight: float | None = None
    ) -> tuple[float, float]:
        """Return damping and correction weight, as asked or as they serve held-out samples best."""
        if not any(gram.held_out is not None for gram in self.known):
            return DEFAULT_DAMP if damp is None else damp, correction_weight or 0.0
        damps = DAMPS if damp is None else (damp,)
        return best_regularization(self.known, keep, damps, correction_weight)

    def all_rows(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return what to commit, (p, m) each: the weights of a solution, after the fixed rows."""
        return [gram.all_rows(W) for gram, W in zip(self.known, weights, strict=True)]

    def refits(
        self, weights: Sequence[Tensor], kept: Sequence[int], *, more: bool = False
    ) -> Refits:
        """Return what to commit: refits, where these do no worse than dense weights of what stays.

        What reads an input that never varied keeps its dense weights.  A layer of which nothing was
        held out gets its refit.  What was held out is let go, unless `more` refits are to come.
        """
        chosen: list[Tensor] = []
        unrefitted: list[str] = []
        growth, held_out = 0.0, min(gram.held_out_rows for gram in self.known)
        for gram, refitted in zip(self.known, self.all_rows(weights), strict=True):
            dense, plain = gram.linear_map.read_weight(), self._without(gram.linear_map, kept)
            rows = _rows(gram.linear_map, kept)
            silent = rows[(refitted[rows] == 0).all(1)]
            W = refitted.index_copy(0, silent, dense[silent]) if len(silent) else refitted
            if gram.held_out_rows and not gram.held_out_rise(dense, plain, W) <= 0:
                # What is no number is no improvement.
                unrefitted.append(gram.linear_map.label)
                W = plain
            largest = float(dense.abs().max())
            growth = max(growth, float(W.abs().max()) / largest if largest else 0.0)
            chosen.append(W)
            if not more:
                gram.held_out = None
        return Refits(tuple(chosen), tuple(unrefitted), growth, held_out)

    def commit(self, weights: Sequence[Tensor], kept: Sequence[int] | None = None) -> None:
        """Write one refitted matrix (p, m) for each `known` consumer; a bias takes up means."""
        with self._written():
            self._write(weights, kept)

    @contextmanager
    def tried(self, weights: Sequence[Tensor], kept: Sequence[int]) -> Iterator[None]:
        """Have the weights that `commit` would write in the model while the block runs."""
        dense = dense_tensors(self.consumers)
        modules = {one.holder: one.module for one in self.consumers}
        try:
            self._write(weights, kept)
            torch.clear_autocast_cache()
            yield
        finally:
            for name, tensors in dense.items():
                put_back(modules[name], tensors)
            torch.clear_autocast_cache()

    def _write(self, weights: Sequence[Tensor], kept: Sequence[int] | None) -> None:
        for gram, W in zip(self.known, weights, strict=True):
            change = gram.bias(W)
            gram.linear_map.write_weight(W)
            if change is not None:
                gram.linear_map.write_bias(gram.linear_map.read_bias() + change)
        if kept is not None:
            for consumer in (gram.linear_map for gram in self.grams if gram not in self.known):
                consumer.write_weight(self._without(consumer, kept))

    def _without(self, consumer: LinearMap, kept: Sequence[int]) -> Tensor:
        """Return the weights as they are, (p, m), but zero for the units that leave."""
        W = consumer.read_weight()
        W[_rows(consumer, set(range(self.group.units)) - set(kept))] = 0
        return W

    def adopt(self, written: Iterable[Tensor]) -> None:
        """Write what another rank has committed, as `LinearMap.read` returns it."""
        tensors = iter(written)
        with self._written():
            for consumer in self.consumers:
                consumer.write(tensors)

    @contextmanager
    def _written(self) -> Iterator[None]:
        self._committing(self)
        yield
        torch.clear_autocast_cache()  # which may hold the old weight in half precision
        self.committed = True


def _rows(consumer: LinearMap, units: Iterable[int]) -> Tensor:
    """Return the rows, (r,) int64, that units own."""
    return consumer.unit_rows[[*units]].flatten().to(device_of(consumer.module))
