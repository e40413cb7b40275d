"""Where a walk stops: a group whose consumers all batches have reached."""

from __future__ import annotations

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
from osscar.walk.gram import GramAccumulator, pose
from osscar.walk.regularization import DAMPS, DEFAULT_DAMP, best_regularization
from solvers import SolutionRecord, SubsetProblem

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
    tied: tuple[str, ...] = ()
    """These four as `osscar.LayerReport` has them."""


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
        tied: list[str] = []
        growth, held_out = 0.0, min(gram.held_out_rows for gram in self.known)
        for gram, refitted in zip(self.known, self.all_rows(weights), strict=True):
            dense, plain = gram.linear_map.read_weight(), self._without(gram.linear_map, kept)
            rows = _rows(gram.linear_map, kept)
            silent = rows[(refitted[rows] == 0).all(1)]
            W = refitted.index_copy(0, silent, dense[silent]) if len(silent) else refitted
            if gram.linear_map.tied:
                tied.append(gram.linear_map.label)
                W = plain
            elif gram.held_out_rows and not gram.held_out_rise(dense, plain, W) <= 0:
                # What is no number is no improvement.
                unrefitted.append(gram.linear_map.label)
                W = plain
            largest = float(dense.abs().max())
            growth = max(growth, float(W.abs().max()) / largest if largest else 0.0)
            chosen.append(W)
            if not more:
                gram.held_out = None
        return Refits(tuple(chosen), tuple(unrefitted), growth, held_out, tuple(tied))

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
    owned, device = consumer.unit_rows, device_of(consumer.module)
    return torch.tensor(
        [row for unit in units for row in owned[unit]], dtype=torch.int64, device=device
    )
