"""Seconds of each stage of a run, counted from what the probes have told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from osscar.allocation.curvature import held_batches, parts, small_batches
from osscar.allocation.curves import curve_samples
from osscar.allocation.fluctuation import measure_fluctuations
from osscar.allocation.latency import MOST_ROUNDS, round_passes, table_passes
from osscar.allocation.widths import asked_groups
from osscar.base.timing import WORTHWHILE_SECONDS, Clock, Stage
from osscar.estimation.forward_probe import first_samples
from osscar.estimation.layer_probe import Sort, backward_seconds
from osscar.estimation.probed import Probed
from osscar.estimation.scaled import Scaled
from osscar.preparation.opened import Opened
from osscar.request import Allocation, PruningRequest
from osscar.shrinking.equivalence import finer_precision, has_cache, in_format_of, proof_outputs
from osscar.walk.batch_norm import BatchNormMode, batch_norms, dense_statistics
from osscar.walk.targets import Target


class Seconds:
    """Seconds of each stage."""

    def __init__(self, ready: Opened, request: PruningRequest, plan: Probed, clock: Clock) -> None:
        self.ready, self.request, self.plan, self.clock = ready, request, plan, clock
        self._finer, self._conversion = self._in_finer_precision()
        self._statistics = self._of_statistics()

    @property
    def _sizes(self) -> list[int]:
        """Samples of each batch of the walk, of which none is held out in part."""
        samples, size = self.ready.inputs.samples, self.ready.batch_size
        fitted = samples - self.plan.held
        sizes = [min(size, samples - start) for start in range(0, samples, size)]
        parted, done = [], 0
        for count in sizes:
            cut = min(max(fitted - done, 0), count)
            parted += [part for part in (cut, count - cut) if part]
            done += count
        return parted

    def walk(self) -> Scaled:
        """Return what all passes of the walk take, but for the Gram matrices."""
        plan, corrected = self.plan, Target(self.request.target).needs_dense
        batches = sum(map(plan.forward.seconds, self._sizes))
        seconds = plan.walk_seconds
        for last in plan.walk.itinerary:
            share = sum(plan.forward.until(last)) if corrected else plan.forward.share(last)
            seconds += share * batches
        return Scaled.certain(seconds, 0.2)

    def layers(self, what: str) -> Scaled:
        """Return what one thing takes of all groups."""
        found = Scaled.certain(0.0)
        for sort, costs in self.plan.costs:
            one = getattr(costs, what)
            one = one if isinstance(one, Scaled) else Scaled.certain(one, 0.2)
            found = found.plus(one.times(len(sort.groups)))
        return found

    def budget(self, allocating: float) -> dict[Stage, Scaled]:
        """Return what it takes to share a budget out."""
        ready, request = self.ready, self.request
        if not request.has_budget:
            return {}
        takes = {Stage.ALLOCATION: Scaled.certain(allocating, 0.3)}
        if request.allocation == Allocation.FLUCTUATION:
            takes[Stage.ALLOCATION] = Scaled.certain(allocating + self._fluctuations(), 0.3)
        if request.speedup is not None:
            takes[Stage.ALLOCATION] = takes[Stage.ALLOCATION].plus(self._timings())
        if not self.plan.shared:
            return takes
        samples = min(ready.inputs.samples, curve_samples(ready))
        sums = sum(len(sort.groups) * costs.factors for sort, costs in self.plan.costs)
        sort, first = min(self.plan.costs, key=lambda one: self._order(one[0]))
        few = max(1, min(self.plan.seen, samples // 4))
        back = backward_seconds(ready, sort, few, first.factors, self.clock)
        apart = held_batches(ready, small_batches(ready, samples))
        rounds = len(list(parts(ready.model, self.plan.shared, copies=2 if apart else 1)))
        takes[Stage.CURVATURE] = Scaled.certain(samples * (rounds * back + sums), 0.25)
        curves = self.layers("curve")
        takes[Stage.CURVES] = curves.times(2) if apart else curves  # once more for the damping
        return takes

    def _order(self, sort: Sort) -> int:
        """Return when a sort is first read."""
        return min(self.plan.walk.calls.index(one.name) for one in sort.maps)

    def _fluctuations(self) -> float:
        """Return what the scores of FLAP take."""
        ready, few = self.ready, first_samples(self.ready, self.plan.seen)
        began = self.clock()
        measure_fluctuations(
            dataclasses.replace(ready, inputs=ready.inputs.only(few)),
            asked_groups(ready, self.request)[2],
        )
        return (self.clock() - began) * ready.inputs.samples / self.plan.seen

    def _timings(self) -> Scaled:
        """Return what timing models of several widths takes; a table that is kept spares some."""
        one = self.plan.forward.seconds(self._sizes[0])
        table, again = table_passes() * one, max(WORTHWHILE_SECONDS, round_passes() * one)
        return Scaled(table + 2 * again, again, table + MOST_ROUNDS * again)

    # ---- outputs, statistics and proofs --------------------------------------------------

    def dense(self) -> Scaled:
        """Return what the dense model's predictions and statistics take."""
        corrects = self.request.batch_norm == BatchNormMode.CORRECT
        predictions = max(1, self.plan.held) * self.plan.forward.few.seconds
        return Scaled.certain(predictions + corrects * self._statistics, 0.3)

    def pruned(self) -> Scaled:
        """Return what the same of the smaller model takes."""
        renews = self.request.batch_norm != BatchNormMode.KEEP
        predictions = max(1, self.plan.held) * self.plan.forward.few.seconds
        return Scaled.certain(self.plan.kept * predictions + renews * self._statistics, 0.4)

    def _of_statistics(self) -> float:
        """Return what one pass for the statistics of batch-norm layers takes."""
        model = self.ready.model
        if not batch_norms(model) or self.request.batch_norm == BatchNormMode.KEEP:
            return 0.0
        batch = first_samples(self.ready, self.plan.seen)
        began = self.clock()
        dense_statistics(model, [batch], BatchNormMode.CORRECT)
        return (self.clock() - began) * self.ready.inputs.samples / self.plan.seen

    def _in_finer_precision(self) -> tuple[float, float]:
        """Return the seconds of the smaller input of the proof, and of changing formats."""
        model = self.ready.model
        *_, small = self.ready.inputs.proofs(model, self.request.seed)
        began = self.clock()
        with finer_precision(model, small):
            entered = self.clock()
            proof_outputs(model, [in_format_of(small, model)])
            took = self.clock() - entered
        return took, max(self.clock() - began - 2 * took, 0.0)

    def _proved(self, runs: Sequence[tuple[int, int]]) -> float:
        """Return what some runs of inputs of the proof take, given as pairs (which, how often)."""
        inputs = self.ready.inputs.proofs(self.ready.model, self.request.seed)
        sizes = [next(iter(one.values())).numel() for one in inputs]
        times = sum(count * sizes[which] for which, count in runs) / sizes[-1]
        return self._conversion + times * self._finer

    def trial(self) -> Scaled:
        """Return what the trial takes where all groups can follow; it takes more where not."""
        cached = 2 * has_cache(self.ready.model)
        seconds = self._proved([(0, 3 + cached)])
        return Scaled(seconds, 0.7 * seconds, 4 * seconds)

    def proof(self) -> Scaled:
        """Return what the proof takes."""
        cached = 2 * has_cache(self.ready.model)
        return Scaled.certain(self._proved([(0, 2 + cached), (1, 2)]), 0.3)
