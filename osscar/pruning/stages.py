"""What each stage of a run takes, counted from what the probes have told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from graph import CouplingGroup
from osscar.capture.curvature import parts, small_batches
from osscar.capture.opened import Opened
from osscar.capture.targets import Target
from osscar.capture.walk import Walk, walk
from osscar.core.errors import OptionError
from osscar.core.json_files import STRICT
from osscar.core.memory import peak_memory, resident_memory
from osscar.core.on_disk import shelf_of
from osscar.core.phases import Clock, Phase
from osscar.core.timing import WORTHWHILE_SECONDS
from osscar.data.batches import ModelInputs, TensorInputs, TokenInputs
from osscar.pruning.allocation import allocate
from osscar.pruning.batch_norm import BatchNormMode, batch_norms, dense_statistics
from osscar.pruning.costs import Cost
from osscar.pruning.costs import count as count_cost
from osscar.pruning.curves import Curve, curve_samples
from osscar.pruning.fluctuation import measure_fluctuations
from osscar.pruning.groups import held_out
from osscar.pruning.latency import MOST_ROUNDS, round_passes, table_passes
from osscar.pruning.memory import Room, check_streamed, least_memory, put_out
from osscar.pruning.probes import (
    ForwardCosts,
    LayerCosts,
    Scaled,
    Sort,
    backward_seconds,
    first_samples,
    layer_costs,
    probed_samples,
    sorts,
    timed_pass,
)
from osscar.pruning.request import Allocation, PruningRequest
from osscar.pruning.widths import asked_groups
from osscar.shrinking.equivalence import finer_precision, has_cache, proof_outputs


@dataclass(frozen=True)
class StageEstimate:
    """What one stage of a run will take.

    Parameters
    ----------
    stage
        Its name, of `osscar.core.phases.Phase`.
    seconds, low, high
        Wall time, and between which it should be; `high` is None where nothing bounds it.
    peak_bytes
        The most memory of the process meanwhile; 0 where nothing is known.
    read_bytes, written_bytes
        Of files.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    stage: str
    seconds: float
    low: float
    high: float | None
    peak_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    @classmethod
    def of(
        cls, phase: Phase, takes: Scaled, peak: int = 0, read: int = 0, written: int = 0
    ) -> StageEstimate:
        """Return what a stage takes."""
        high = takes.high if math.isfinite(takes.high) else None
        return cls(str(phase), takes.seconds, takes.low, high, peak, read, written)


@dataclass(frozen=True)
class Expected:
    """What is known of a run before it begins.

    Parameters
    ----------
    stages
        What its stages take, without those that were measured as they came.
    passes
        How often the calibration data set out for the walk.
    limit, least
        Bytes that the run may take, and that it needs at least, where the weights stay on disk.
    sample_seconds
        A forward pass of one sample of the dense model.
    kept
        About what share of the model stays.
    opened_bytes
        Of the process, once the model was opened.
    """

    stages: tuple[StageEstimate, ...]
    passes: int
    limit: int | None
    least: int | None
    sample_seconds: float
    kept: float
    opened_bytes: int


def expected(ready: Opened, request: PruningRequest, clock: Clock) -> Expected:
    """Probe an opened model, and count what a run takes.

    Raises
    ------
    RequestError
        If what to keep makes no sense for this model, or a limit of memory cannot be kept.
    """
    held = held_out(ready, request)
    room = check_streamed(ready, request, max(1, held))
    opened_bytes = _resident()
    began = clock()
    keep = expected_keep(ready, request)
    allocating = clock() - began
    plan = _Plan.of(ready, request, keep, held, clock)
    time = _Time(ready, request, plan, clock)
    takes = {
        Phase.TRIAL: time.trial(),
        Phase.DENSE: time.dense(),
        **time.budget(allocating),
        Phase.WALK: time.walk(),
        Phase.GRAM: time.layers("gram"),
        Phase.DAMPING: time.layers("damping"),
        Phase.SOLVER: time.layers("solver"),
        Phase.PROOF: time.proof(),
        Phase.PRUNED: time.pruned(),
    }
    space = _Space.of(ready, request, plan, room, opened_bytes)
    stages = [
        StageEstimate.of(phase, seconds, space.peak(phase), space.read(phase), space.written(phase))
        for phase, seconds in takes.items()
    ]
    shelf = shelf_of(ready.model)
    return Expected(
        tuple(stages),
        passes=len(plan.walk.itinerary),
        limit=None if shelf is None else shelf.ceiling,
        least=None if room is None else least_memory(ready, request, max(1, held)),
        sample_seconds=plan.forward.few.seconds,
        kept=plan.kept,
        opened_bytes=opened_bytes,
    )


def expected_keep(ready: Opened, request: PruningRequest) -> dict[str, int]:
    """Return what groups keep, as far as that is known before anything is measured.

    Curves are not known yet.  Each is taken to be the square of the share of units that leave, so
    that groups which cost most lose most: small ones in front of a network often keep all.

    Raises
    ------
    RequestError, FrozenGroupError
        As the run does.
    """
    if not request.has_budget:
        return dict(allocate(ready, request).keep)
    told = request
    if request.allocation == Allocation.FLUCTUATION:
        told = dataclasses.replace(told, allocation=str(Allocation.CURVATURE))
    if request.speedup is not None:
        told = dataclasses.replace(told, speedup=None, sparsity=1 - 1 / request.speedup)
    _, _, shared = asked_groups(ready, told)
    gone = {group.name: np.linspace(1.0, 0.0, group.units + 1) for group in shared}
    curves = {name: Curve(name, share**2) for name, share in gone.items()}
    return dict(allocate(ready, told, curves).keep)


def _resident() -> int:
    try:
        return resident_memory()
    except OptionError:  # a system that does not tell
        return peak_memory() or 0


# ---- what is probed ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the probes have told, and what the run will do.

    Parameters
    ----------
    groups, keep
        The groups that lose units, and what they keep.
    shared
        Those that share a budget by curvature.
    held
        Samples that are held out.
    walk
        The walk that the run makes.
    walk_seconds
        What it takes to plan that.
    forward
        What forward passes take.
    costs
        Each sort of group, with what one of them takes.
    seen
        How many samples the layers were probed on.
    """

    groups: tuple[CouplingGroup, ...]
    keep: Mapping[str, int]
    shared: tuple[CouplingGroup, ...]
    held: int
    walk: Walk
    walk_seconds: float
    forward: ForwardCosts
    costs: tuple[tuple[Sort, LayerCosts], ...]
    seen: int
    kept: float

    @classmethod
    def of(
        cls, ready: Opened, request: PruningRequest, keep: dict[str, int], held: int, clock: Clock
    ) -> _Plan:
        """Make both probes."""
        groups = tuple(g for g in ready.groups if keep.get(g.name, g.units) < g.units)
        by_curvature = request.has_budget and request.allocation == Allocation.CURVATURE
        shared = tuple(asked_groups(ready, request)[2]) if by_curvature else ()
        began = clock()
        planned = walk(ready, groups, target=Target(request.target), held=held)
        walk_seconds = clock() - began
        names = sorted(set(planned.calls))
        one = first_samples(ready, 1)
        every = sorts(ready, groups, keep, timed_pass(ready, one, names, (), clock)[0])
        kept = sorted({found.name for sort in every for found in sort.maps})
        few, seen = timed_pass(ready, one, names, kept, clock)
        many, count = few, probed_samples(ready, few)
        if count > 1:
            many, seen = timed_pass(ready, first_samples(ready, count), names, kept, clock)
        costs = tuple(
            (
                sort,
                layer_costs(
                    ready,
                    request,
                    sort,
                    seen,
                    samples=count,
                    held=held > 0,
                    curves=bool(shared),
                    clock=clock,
                ),
            )
            for sort in every
        )
        cost = count_cost(Cost.PARAMETERS, ready.model, ready.groups, ready.sample)
        return cls(
            groups, keep, shared, held, planned, walk_seconds, ForwardCosts(few, many), costs,
            count, cost.of(keep) / cost.dense,
        )  # fmt: skip


# ---- seconds -----------------------------------------------------------------------------


class _Time:
    """Seconds of each stage."""

    def __init__(self, ready: Opened, request: PruningRequest, plan: _Plan, clock: Clock) -> None:
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

    def budget(self, allocating: float) -> dict[Phase, Scaled]:
        """Return what it takes to share a budget out."""
        ready, request = self.ready, self.request
        if not request.has_budget:
            return {}
        takes = {Phase.ALLOCATION: Scaled.certain(allocating, 0.3)}
        if request.allocation == Allocation.FLUCTUATION:
            takes[Phase.ALLOCATION] = Scaled.certain(allocating + self._fluctuations(), 0.3)
        if request.speedup is not None:
            takes[Phase.ALLOCATION] = takes[Phase.ALLOCATION].plus(self._timings())
        if not self.plan.shared:
            return takes
        samples = min(ready.inputs.samples, curve_samples(ready))
        sums = sum(len(sort.groups) * costs.factors for sort, costs in self.plan.costs)
        sort, first = min(self.plan.costs, key=lambda one: self._order(one[0]))
        few = max(1, min(self.plan.seen, samples // 4))
        back = backward_seconds(ready, sort, few, first.factors, self.clock)
        rounds = len(list(parts(ready.model, self.plan.shared)))
        takes[Phase.CURVATURE] = Scaled.certain(samples * (rounds * back + sums), 0.25)
        takes[Phase.CURVES] = self.layers("curve")
        return takes

    def _order(self, sort: Sort) -> int:
        """Return when a sort is first read."""
        return min(self.plan.walk.calls.index(one.name) for one in sort.maps)

    def _fluctuations(self) -> float:
        """Return what the scores of FLAP take."""
        ready, few = self.ready, first_samples(self.ready, self.plan.seen)
        tokens = isinstance(ready.inputs, TokenInputs)
        fewer: ModelInputs
        fewer = TokenInputs(few["input_ids"]) if tokens else TensorInputs(few)
        began = self.clock()
        measure_fluctuations(
            dataclasses.replace(ready, inputs=fewer), asked_groups(ready, self.request)[2]
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
            proof_outputs(model, [small])
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


# ---- memory and disk ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Space:
    """Bytes of memory and of files, by stage."""

    base: int
    weights: int
    kept: float
    needs: Mapping[Phase, int]
    reads: Mapping[Phase, int]
    ceiling: int | None
    log: int

    @classmethod
    def of(
        cls,
        ready: Opened,
        request: PruningRequest,
        plan: _Plan,
        room: Room | None,
        opened_bytes: int,
    ) -> _Space:
        """Count what is held and read."""
        shelf = shelf_of(ready.model)
        weights = _weight_bytes(ready)
        held = max(1, plan.held)
        found = Room.of(ready, request, held) if room is None else room
        copies = 0 if shelf is not None else weights
        needs = {
            Phase.TRIAL: 2 * copies + found.proof,
            Phase.DENSE: found.logits,
            Phase.ALLOCATION: found.forward,
            Phase.WALK: found.batches + found.forward,
            Phase.GRAM: found.batches + found.forward,
            Phase.DAMPING: found.batches + found.matrices,
            Phase.SOLVER: found.batches + found.matrices,
            Phase.PROOF: round((1 + plan.kept) * copies) + found.proof,
            Phase.PRUNED: found.logits,
        }
        if plan.shared:
            factors, largest = _factor_bytes(ready, plan.shared)
            needs[Phase.CURVATURE] = factors + _saved_bytes(ready) + found.logits
            needs[Phase.CURVES] = factors + largest
        passes = {
            Phase.TRIAL: 6,
            Phase.DENSE: held,
            Phase.ALLOCATION: 2 if request.allocation == Allocation.FLUCTUATION else 0,
            Phase.WALK: len(plan.walk.itinerary),
            Phase.PROOF: 8,
            Phase.PRUNED: held,
        }
        fits = shelf is None or opened_bytes + weights + max(needs.values()) <= shelf.ceiling
        reads = {} if fits else {phase: count * weights for phase, count in passes.items()}
        log = sum(len(sort.groups) * sort.weight_bytes for sort, _ in plan.costs)
        ceiling = None if shelf is None else shelf.ceiling
        return cls(opened_bytes, weights, plan.kept, needs, reads, ceiling, log)

    def peak(self, phase: Phase) -> int:
        """Return the most memory of a stage."""
        most = self.base + self.needs.get(phase, 0)
        return most if self.ceiling is None else min(most + self.weights, self.ceiling)

    def read(self, phase: Phase) -> int:
        """Return what a stage reads."""
        return self.reads.get(phase, 0)

    def written(self, phase: Phase) -> int:
        """Return what a stage writes."""
        return self.log if phase is Phase.SOLVER else 0


def _weight_bytes(ready: Opened) -> int:
    """Return the bytes of a model's weights and buffers."""
    model = ready.model
    every = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(every.values())


def _factor_bytes(ready: Opened, groups: Sequence[CouplingGroup]) -> tuple[int, int]:
    """Return the bytes of the factors that are held at once, and of the largest problem of them."""
    held = largest = 0
    for part in parts(ready.model, groups):
        shapes = [one.read_weight().shape for _, maps in part for one in maps]
        held = max(held, sum(4 * (p * p + m * m) for p, m in shapes))
        largest = max(largest, *(8 * (4 * p * p + 2 * m * m) for p, m in shapes))
    return held, largest


def _saved_bytes(ready: Opened) -> int:
    """Return the bytes of what a forward pass keeps for the backward pass."""
    [batch, *_] = small_batches(ready, curve_samples(ready))
    first = next(iter(batch.values()))
    positions = first.numel() if isinstance(ready.inputs, TokenInputs) else len(first)
    return 4 * positions * sum(put_out(ready)[0])
