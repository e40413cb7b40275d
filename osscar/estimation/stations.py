"""What each stage of a run takes, timed by running it: on few samples, and on one layer of a class.

The stations of the run are called on the prepared model with some of the calibration samples: the
trial, the passes of the dense model, curvature, the walk, and for one group of each layer class its
problem, from the damping to the commit.  What all samples and all groups take follows by counting.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

import solvers
from graph import CouplingGroup
from osscar.allocation.allocate import MEASURED, allocate
from osscar.allocation.costs import Cost, count
from osscar.allocation.curvature import curvature, held_batches, small_batches
from osscar.allocation.curves import Curve, curve_samples, elimination_curve
from osscar.allocation.measured import compared_samples
from osscar.allocation.speedup import MOST_MODELS
from osscar.allocation.widths import asked_groups
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.timing import WORTHWHILE_SECONDS, Clock, Stage, profiled, timed
from osscar.estimation.values import LayerClass, Span, together
from osscar.network.modules import forward
from osscar.offload.on_disk import room_for
from osscar.preparation.prepare import Prepared
from osscar.pruning.groups import held_out, solved
from osscar.pruning.memory import Room
from osscar.pruning.prune import dense_facts
from osscar.request import PruningRequest
from osscar.shrinking.plan import Form
from osscar.walk.batch_norm import batch_norms
from osscar.walk.regularization import DEFAULT_DAMP
from osscar.walk.targets import Target
from osscar.walk.walk import walk

_CHEAP_SECONDS = 0.5
"""For so long, more samples than are needed may run."""

_SHARE = 32
"""One in so many samples is needed."""

_MOST_ROWS = 2048
"""Inputs of a layer that is solved whatever its class; larger ones are where a class has many."""

_MANY = 10


class Timed(NamedTuple):
    """What the stations have told: seconds of each stage of the run, but for its opening.

    `keep` is what groups keep, as far as that is known, `shared` are those that share a budget by
    curvature, `passes` is how often the calibration data set out through the model,
    `sample_seconds` a forward pass of one sample, and `kept_share` about what share of the
    parameters stays.
    """

    stages: dict[Stage, Span]
    classes: tuple[LayerClass, ...]
    keep: Mapping[str, int]
    shared: tuple[CouplingGroup, ...]
    passes: int
    sample_seconds: float
    kept_share: float


def timed_stations(
    prepared: Prepared, request: PruningRequest, held: int, room: Room | None, clock: Clock
) -> Timed:
    """Run each station on little, and tell what the run takes in seconds."""
    sample = prepared.sample
    one = min(_seconds(lambda: forward(prepared.model, sample), clock) for _ in range(2))
    few = _few(prepared, one)
    with profiled(clock) as profile:
        facts = dense_facts(few, request)
        with timed(Stage.ALLOCATION):
            keep = expected_keep(prepared, request, facts.skipped_names, facts.form)
    trial, allocating = (profile.seconds[stage] for stage in (Stage.TRIAL, Stage.ALLOCATION))
    cost = count(Cost.PARAMETERS, prepared.model, prepared.groups, sample)
    kept = cost.of(keep) / cost.dense
    if batch_norms(prepared.model):  # all samples pass, for their statistics
        dense = profile.seconds[Stage.DENSE] * prepared.inputs.samples / few.inputs.samples
        pruned = dense
    else:
        dense = profile.seconds[Stage.DENSE] * max(1, held) / max(1, held_out(few, request))
        pruned = kept * dense
    stages = {
        Stage.TRIAL: Span.about(trial),
        Stage.DENSE: Span.about(dense, 0.3),
        Stage.PROOF: Span(0.3 * trial, 0.8 * trial, 1.5 * trial),  # shrinks and compares as it does
        Stage.PRUNED: Span.about(pruned, 0.4),
    }
    shared: tuple[CouplingGroup, ...] = ()
    if request.has_budget:
        shared = tuple(asked_groups(prepared, request, facts.skipped_names)[2])
        stages |= _of_budget(prepared, few, request, shared, allocating, one, clock)
        if request.allocation in MEASURED and facts.reference is not None:
            stages[Stage.MEASURED] = _of_measuring(prepared, few, shared, one, clock)
    groups = [g for g in prepared.groups if keep.get(g.name, g.units) < g.units]
    classes = layer_classes(prepared, groups)
    walked, passes = _of_walk(
        prepared, few, request, keep, groups, classes, min(held, 1), room, clock
    )
    by_curvature = shared if Stage.CURVES in stages else ()
    return Timed(stages | walked, classes, keep, by_curvature, passes, one, kept)


def _seconds(function: Any, clock: Clock) -> float:
    began = clock()
    with torch.no_grad():
        function()
    return clock() - began


def _few(prepared: Prepared, one: float) -> Prepared:
    """Return the model with a few of its samples: two at least, more if they are quickly run."""
    inputs, most = prepared.inputs, max(2, prepared.batch_size)
    needed = max(2, -(-inputs.samples // _SHARE), int(_CHEAP_SECONDS / max(one, 1e-9)))
    number = min(needed, most, inputs.samples)
    return dataclasses.replace(prepared, inputs=inputs.part(0, number))


def expected_keep(
    prepared: Prepared,
    request: PruningRequest,
    left: Collection[str] = (),
    form: Form = Form.EAGER,
) -> dict[str, int]:
    """Return what groups keep, as far as that is known before anything is measured.

    Curves are not known yet.  Each is taken to be the square of the share of units that leave, so
    that groups which cost most lose most: small ones in front of a network often keep all.
    """
    if not request.has_budget:
        return dict(allocate(prepared, request, None, left, form).keep)
    told = request
    if request.speedup is not None:
        told = dataclasses.replace(told, speedup=None, sparsity=1 - 1 / request.speedup)
    _, _, shared = asked_groups(prepared, told, left)
    gone = {group.name: np.linspace(1.0, 0.0, group.units + 1) for group in shared}
    curves = {name: Curve(name, share**2) for name, share in gone.items()}
    return dict(allocate(prepared, told, curves, left, form, measure=False).keep)


# ---- one layer of each class -------------------------------------------------------------


def layer_classes(prepared: Prepared, groups: Sequence[CouplingGroup]) -> tuple[LayerClass, ...]:
    """Part groups by the size of their problem; choose for each class the group to be solved.

    That is the first of them, or, where they are large and few, the one that was chosen for the
    next smaller class: it would take too large a share of the run.
    """
    found: dict[tuple[Any, ...], list[CouplingGroup]] = {}
    for group in groups:
        maps = prepared.linear_maps(group)
        forms = tuple((type(m.module), m.rows, m.fixed, m.outputs, m.number_format) for m in maps)
        found.setdefault((max(m.rows for m in maps), group.units, forms), []).append(group)
    classes: list[LayerClass] = []
    for (rows, *_), some in sorted(found.items(), key=lambda item: item[0][:2]):
        names = tuple(group.name for group in some)
        solve = not classes or rows <= _MOST_ROWS or len(some) >= _MANY
        source, size = (names[0], rows) if solve else (classes[-1].source, classes[-1].source_rows)
        classes.append(LayerClass(names, rows, source, size))
    return tuple(classes)


def over_classes(classes: Sequence[LayerClass], seconds: Mapping[str, float]) -> Span:
    """Return what all groups take, of the seconds of those that were solved.

    A problem with p inputs takes between p^2 and p^3: all of it is products, factorizations and
    sweeps of matrices with p rows.  Which power is expected, the two largest that were solved tell.
    """
    expected = _power(classes, seconds)
    spans = []
    for one in classes:
        growth, took = one.rows / one.source_rows, seconds.get(one.source, 0.0)
        spread = 0.2 if growth == 1 else 0.3
        low, middle, high = (took * growth**power for power in (2, expected, 3))
        span = low * (1 - spread), middle, high * (1 + spread)
        spans.append(Span(*(len(one.groups) * each for each in span)))
    return together(*spans)


def _power(classes: Sequence[LayerClass], seconds: Mapping[str, float]) -> float:
    """Return the power of p between the two largest problems that were solved, from 2 to 3."""
    found = {one.source_rows: seconds.get(one.source, 0.0) for one in classes}
    sizes = sorted(size for size, took in found.items() if took > 0)[-2:]
    if len(sizes) < 2:
        return 2.5
    small, large = sizes
    slope = math.log(found[large] / found[small]) / math.log(large / small)
    return min(max(slope, 2.0), 3.0)


def _of_walk(
    prepared: Prepared,
    few: Prepared,
    request: PruningRequest,
    keep: Mapping[str, int],
    groups: Sequence[CouplingGroup],
    classes: Sequence[LayerClass],
    held: int,
    room: Room | None,
    clock: Clock,
) -> tuple[dict[Stage, Span], int]:
    """Walk a few samples past all groups in one pass, and solve one group of each class."""
    target = Target(request.target)
    began = clock()
    planned = walk(few, groups, target=target, held=held)
    planning = clock() - began
    solve = {one.source: one.groups for one in classes}
    damping: dict[str, float] = {}
    solving: dict[str, float] = {}
    with profiled(clock) as profile, _silent():
        for step in walk(few, groups, in_turn=False, target=target, held=held):
            name = step.group.name
            if name not in solve:
                continue
            step.final = False  # nobody measures what comes after the commit
            stays = round(sum(keep[g] for g in solve[name]) / len(solve[name]))
            with (
                profiled(clock) as own,
                room_for(few.model, 0 if room is None else room.matrices),
                memory_for(f"the problem of {name!r}", FOR_MATRICES),
            ):
                solved(step, min(stays, step.group.units - 1), request, 0.0)
            step.committed = False  # else batches that have passed it would end
            damping[name] = own.seconds[Stage.DAMPING]
            solving[name] = own.seconds[Stage.SOLVER]
    times, took = prepared.inputs.samples / few.inputs.samples, profile.seconds
    reach = sum((last + 1) / len(planned.calls) for last in planned.pass_ends)
    solver = over_classes(classes, solving)
    exact = request.certify or request.chosen_backend().kind is solvers.BackendKind.EXACT
    if exact and any(one.extrapolated for one in classes):  # layers have searches of their own
        solver = Span(0.0, solver.seconds, math.inf)
    stages = {
        Stage.WALK: Span.about(planning + reach * times * took[Stage.WALK], 0.2),
        Stage.GRAM: Span.about(times * took[Stage.GRAM], 0.2),
        Stage.DAMPING: over_classes(classes, damping),
        Stage.SOLVER: solver,
    }
    return stages, len(planned.pass_ends)


@contextmanager
def _silent() -> Iterator[None]:
    """Leave out the warnings that few samples alone give rise to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


# ---- a budget ----------------------------------------------------------------------------


def _of_budget(
    prepared: Prepared,
    few: Prepared,
    request: PruningRequest,
    shared: Sequence[CouplingGroup],
    allocating: float,
    one: float,
    clock: Clock,
) -> dict[Stage, Span]:
    """Return what it takes to share a budget out."""
    samples = few.inputs.samples
    allocation = Span.about(allocating, 0.3)
    if request.speedup is not None:  # models are timed until one is fast enough
        passes = 20 * one * min(prepared.batch_size, prepared.inputs.samples)
        again = max(WORTHWHILE_SECONDS, passes)
        allocation = together(allocation, Span(again, 3 * again, MOST_MODELS * again))
    stages = {Stage.ALLOCATION: allocation}
    if request.allocation != "curvature":
        return stages
    most = min(prepared.inputs.samples, curve_samples(prepared))
    classes = layer_classes(prepared, shared)
    solve = {one.source for one in classes}
    curves: dict[str, float] = {}
    with profiled(clock) as profile, _silent():
        measured = curvature(few, shared, samples=samples, seed=request.seed)
        while True:
            with timed(Stage.CURVATURE):
                found = next(measured, None)
            if found is None:
                break
            if found.group.name in solve:
                began = clock()
                elimination_curve(found.problem(DEFAULT_DAMP))
                curves[found.group.name] = clock() - began
    if held_batches(prepared, small_batches(prepared, most)):  # once more, for the damping
        curves = {name: 2 * seconds for name, seconds in curves.items()}
    passes = profile.seconds[Stage.CURVATURE] * most / min(samples, most)
    return stages | {
        Stage.CURVATURE: Span.about(passes, 0.25),
        Stage.CURVES: over_classes(classes, curves),
    }


def _of_measuring(
    prepared: Prepared, few: Prepared, shared: Sequence[CouplingGroup], one: float, clock: Clock
) -> Span:
    """Return what it takes to prune each group by itself, and to compare predictions.

    A pass that starts at a group's block takes half of a whole one in the mean; a second round is
    of no group, or of all.
    """
    classes = layer_classes(prepared, shared)
    sources = {one.source for one in classes}
    seconds: dict[str, float] = {}
    with _silent():
        for step in walk(few, [g for g in shared if g.name in sources], in_turn=False):
            began = clock()
            elimination_curve(step.problem(1, DEFAULT_DAMP))
            seconds[step.group.name] = clock() - began
    removing = over_classes(classes, seconds)
    walking = one * min(prepared.inputs.samples, curve_samples(prepared))
    passes = one * compared_samples(prepared) * len(shared)
    return together(
        Span(0.5 * removing.low, removing.seconds, 2 * removing.high),
        Span(walking, 2 * walking, 4 * walking),
        Span(0.3 * passes, 0.7 * passes, 1.5 * passes),
    )
