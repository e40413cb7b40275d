"""Whole experts: chosen and refitted mixture by mixture, each on the stream pruned so far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch

import solvers
from graph import CouplingGroup
from osscar.allocation.widths import asked_groups
from osscar.base.errors import RequestError
from osscar.base.messages import warn
from osscar.base.printable import listed, pluralize
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.experts.find import ExpertMixture, mixtures_of
from osscar.experts.last_layers import last_matrices
from osscar.experts.walk import ExpertStep, ExpertWalk, Losses
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.consumer import LinearMap
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import GroupPlan
from osscar.pruning.feasibility import SkippedGroup
from osscar.pruning.groups import Committed, blaming_refits, held_out, replay, warn_of_refits
from osscar.pruning.result import LayerReport
from osscar.pruning.run_log import LayerRecord, RunLog
from osscar.request import PruningRequest
from osscar.shrinking.follow import is_list
from osscar.walk.layer_step import DenseTensors, LayerStep, Refits, dense_tensors
from osscar.walk.targets import Target

_NO_REFIT = "the last matrices of its experts are not seen, so that they cannot be refitted"

_NO_LINEAR = (
    f"{_NO_REFIT}: no torch.nn.Linear with a plain weight puts out what an expert does; let one do "
    "so, and remove weight norm (remove_parametrizations or remove_weight_norm of torch) from it"
)


def skipped_mixtures(prepared: Prepared, request: PruningRequest) -> tuple[SkippedGroup, ...]:
    """Return the mixtures whose experts cannot leave, and why.

    Raises
    ------
    RequestError
        If there is no other, or the request is strict and there is one.
    """
    if not prepared.ranks.alone:
        raise RequestError("experts are chosen by one process; run it without ranks")
    if is_on_disk(prepared.model):
        raise RequestError("experts are chosen in memory; leave --max-memory away")
    skipped, asked = [], {group.name for group in asked_groups(prepared, request)[0]}
    reached = [one for one in mixtures_of(prepared) if one.group.name in asked]
    for mixture in reached:
        group = mixture.group
        reason = group.frozen[0].reason if group.frozen else ""
        if not reason and last_matrices(prepared, mixture) is None:
            reason = _NO_REFIT if mixture.listed is None else _NO_LINEAR
        if reason:
            skipped.append(SkippedGroup(group.name, str(group.kind), group.units, reason))
    inside = _inside_lists(prepared, [one for one in reached if one.group.prunable])
    none = len(skipped) == len(reached)
    if none or (skipped and request.strict):
        reasons = listed([f"{one.name!r}: {one.reason}" for one in skipped], 8, "; ")
        missing = "all are left out (--skip)" if mixtures_of(prepared) else "this model has none"
        raise RequestError(
            f"experts of {'no mixture' if none else pluralize(len(skipped), 'mixture')} can leave"
            f"{': ' if none else ' not: '}{reasons or missing}"
        )
    if skipped:
        names = listed([repr(one.name) for one in skipped], 8)
        warn(f"experts stay whole in {names}; the report, or skipped of the result, says why")
    return (*skipped, *inside)


def _inside_lists(
    prepared: Prepared, mixtures: Sequence[ExpertMixture]
) -> tuple[SkippedGroup, ...]:
    """Return the groups of single experts: which of these stay is not known before they leave."""
    lists = [slot.module for one in mixtures for slot in one.group.slots if is_list(slot)]
    return tuple(
        SkippedGroup(group.name, str(group.kind), group.units, f"its expert of {name!r} may leave")
        for group in prepared.groups
        for name in lists
        if group.prunable and all(slot.tensor.startswith(f"{name}.") for slot in group.slots)
    )


def prune_experts(
    prepared: Prepared,
    keep: Mapping[str, int],
    request: PruningRequest,
    records: Sequence[LayerRecord],
    log: RunLog | None,
) -> Committed:
    """Choose which experts stay, and refit these; the model keeps its shape.

    Arguments are as of `osscar.pruning.groups.prune_groups`, and so is what is returned and raised.
    """
    mixtures = {one.group.name: one for one in mixtures_of(prepared) if one.group.name in keep}
    if not mixtures:
        return Committed()
    done, dense = list(records), dict[str, DenseTensors]()
    with stage("pruning", total=len(mixtures)) as bar:
        for record in records:
            mixture = mixtures.pop(record.plan.name, None)
            group = None if mixture is None else mixture.group
            own = partial(_matrices, prepared, mixture, record.plan.kept)
            dense.update(replay(group, own, record, keep))
            bar.advance()
        began = time.perf_counter()
        with timed(Stage.WALK):
            walked = ExpertWalk(
                prepared,
                list(mixtures.values()),
                Target(request.target),
                held_out(prepared, request),
                kept_in(records),
                dense,
            )
        for step in blaming_refits(walked, done):
            bar.describe(f"pruning {step.group.name}")
            if not request.experts_alone:  # whose walk passes the dense weights once more
                every = range(step.group.units)
                dense.update(dense_tensors(_matrices(prepared, step.mixture, every)))
            done.append(_solved(step, keep[step.group.name], request, began))
            if log is not None:
                log.append(len(done) - 1, done[-1])
            bar.advance()
            began = time.perf_counter()
    warn_of_refits([record.report for record in done], prepared.model)
    return Committed(tuple(done), dense)


def kept_in(records: Iterable[LayerRecord]) -> dict[str, tuple[int, ...]]:
    """Return which units stay of each group, by name."""
    return {record.plan.name: record.plan.kept for record in records}


def _matrices(
    prepared: Prepared,
    mixture: ExpertMixture | None,
    experts: Iterable[int],
    _: CouplingGroup | None = None,
) -> list[LinearMap]:
    """Return the last matrices of some experts of a mixture."""
    found = None if mixture is None else last_matrices(prepared, mixture)
    assert found is not None  # as of every mixture that is not skipped
    return [found[1][expert] for expert in experts]


def _solved(step: ExpertStep, keep: int, request: PruningRequest, began: float) -> LayerRecord:
    """Choose the experts of one mixture, and commit the refit of those that stay."""
    unreached = step.unreached
    if unreached:
        warn(
            f"no calibration token is sent to {pluralize(len(unreached), 'expert')} of "
            f"{step.group.name!r}: {listed([*map(str, unreached)], 8)}; give more samples"
        )
    with timed(Stage.GRAM):
        problem = step.problem(keep)
    measured = time.perf_counter()
    with timed(Stage.SOLVER):
        solution = solvers.solve_experts(problem, request.chosen_expert_backend())
        record = solution.record(solution.verify())
    choosing = sum(len(block.energy) for block in problem.tokens)
    del problem, solution
    step.commit(record.support)
    with timed(Stage.WALK):
        before = step.losses()
        refitted = step.refit()
    with timed(Stage.DAMPING):
        damp, refitted.correction_weight = _regularization(refitted, request)
    refits, after = _refitted(step, refitted, damp, before)
    report = LayerReport(
        **{**vars(record), "relative_loss": before.fitted},
        name=step.group.name,
        kind=str(step.group.kind),
        units=step.group.units,
        kept=keep,
        dead=len(unreached),
        damp=damp,
        correction_weight=refitted.correction_weight,
        positions=refitted.positions,
        unread=len(refitted.unread),
        held=refits.held,
        unrefitted=refits.unrefitted,
        tied=refits.tied,
        fixed=0,
        fixed_dense=0,
        growth=refits.growth,
        measure_seconds=measured - began,
        solve_seconds=time.perf_counter() - measured,
        refitted_loss=after.fitted,
        choosing=choosing,
    )
    written = (one.to(each.number_format) for each in refitted.consumers for one in each.read())
    return LayerRecord(GroupPlan.of(step.group, record.support), report, tuple(written))


def _refitted(
    step: ExpertStep, refitted: LayerStep, damp: float, before: Losses
) -> tuple[Refits, Losses]:
    """Commit the refit of those that stay, unless the mixture as a whole does worse with it.

    Each expert is fitted, and judged, alone: what is no worse for each can be for their sum.
    """
    units = range(step.neurons.units)
    with timed(Stage.SOLVER):
        fit = refitted.problem(len(units), damp)
        refits = refitted.refits(solvers.refit(fit, torch.tensor(units))[0], units)
        del fit
    with timed(Stage.WALK), refitted.tried(refits.weights, units):
        after = step.losses()
    if after.telling <= before.telling:
        refitted.commit(refits.weights, units)
        return refits, after
    labels = tuple(gram.linear_map.label for gram in refitted.known)
    return dataclasses.replace(refits, unrefitted=labels, growth=1.0), before


def _regularization(step: LayerStep, request: PruningRequest) -> tuple[float, float]:
    """Return damping and correction weight, as asked or as they serve held-out samples best.

    Targets are what was lost with the experts, and are fitted in full where nothing is held out.
    """
    weight = request.correction_weight
    if weight is None and not any(gram.held_rows for gram in step.known):
        weight = 1.0
    return step.regularization(step.group.units, request.damp, weight)
