"""Whole experts: chosen and refitted mixture by mixture, each on the stream pruned so far."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch

import solvers
from graph import CouplingGroup
from osscar.allocation.widths import count_kept
from osscar.base.errors import RequestError
from osscar.base.printable import listed, pluralize
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.consumer import LinearMap
from osscar.preparation.experts import ExpertMixture
from osscar.preparation.prepare import Prepared
from osscar.pruning.feasibility import SkippedGroup
from osscar.pruning.groups import blaming_refits, held_out, replay, warn_of_refits
from osscar.pruning.result import LayerReport
from osscar.pruning.run_log import LayerRecord, RunLog
from osscar.request import PruningRequest, parse_keep
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.walk.expert_walk import ExpertStep, ExpertWalk, Losses, last_matrices
from osscar.walk.layer_step import DenseTensors, LayerStep, Refits
from osscar.walk.targets import Target

_NO_REFIT = "the last matrices of its experts are not seen, so that they cannot be refitted"


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
    skipped = []
    for mixture in _reached(prepared, request):
        group = mixture.group
        reason = group.frozen[0].reason if group.frozen else ""
        if not reason and last_matrices(prepared, mixture) is None:
            reason = _NO_REFIT
        if reason:
            skipped.append(SkippedGroup(group.name, str(group.kind), group.units, reason))
    none = len(skipped) == len(_reached(prepared, request))
    if none or (skipped and request.strict):
        reasons = listed([f"{one.name!r}: {one.reason}" for one in skipped], 8, "; ")
        raise RequestError(
            f"experts of {'no mixture' if none else pluralize(len(skipped), 'mixture')} can leave"
            f"{': ' if none else ' not: '}{reasons or 'this model has none'}"
        )
    if skipped:
        names = listed([repr(one.name) for one in skipped], 8)
        warnings.warn(
            f"experts stay whole in {names}; the report, or skipped of the result, says why",
            stacklevel=2,
        )
    return tuple(skipped)


def _reached(prepared: Prepared, request: PruningRequest) -> list[ExpertMixture]:
    """Return the mixtures that the request does not skip."""
    names = [one.group.name for one in prepared.mixtures]
    for pattern in request.skip:
        if not fnmatch.filter(names, pattern):
            raise RequestError(f"no mixture is called {pattern!r}, which --skip names")
    return [
        one
        for one in prepared.mixtures
        if not any(fnmatch.fnmatchcase(one.group.name, pattern) for pattern in request.skip)
    ]


def kept_experts(mixture: ExpertMixture, asked: Fraction | int) -> int:
    """Return how many experts of a mixture stay.

    Raises
    ------
    RequestError
        If the router could not choose among so many.
    """
    assert mixture.routing is not None
    name, units, rule = mixture.group.name, mixture.group.units, mixture.routing.rule
    count = asked if isinstance(asked, int) else count_kept(mixture.group, asked, 1)
    if count % rule.groups or not rule.fewest <= count <= units:
        raise RequestError(
            f"{name!r} would keep {count} of its {units} experts; its router, which sends each "
            f"token to {rule.top_k}, needs {rule.fewest} at least: {_possible(mixture)}"
        )
    return count


def _possible(mixture: ExpertMixture) -> str:
    """Say how many experts of a mixture can stay."""
    assert mixture.routing is not None
    rule, units = mixture.routing.rule, mixture.group.units
    if rule.groups == 1:
        return f"it can keep {rule.fewest} to {units}"
    counts = listed([*map(str, range(rule.fewest, units + 1, rule.groups))], 8, " or ")
    return f"it can keep {counts}, as many in each of {rule.groups} groups"


def prune_experts(
    prepared: Prepared,
    skipped: Sequence[SkippedGroup],
    request: PruningRequest,
    records: Sequence[LayerRecord],
    log: RunLog | None,
) -> tuple[PruningPlan, tuple[LayerReport, ...]]:
    """Choose which experts stay, and refit these; the model keeps its shape.

    Arguments are as of `osscar.pruning.groups.prune_groups`, and so is what is returned and raised.
    """
    assert request.experts is not None
    left, asked = {one.name for one in skipped}, parse_keep(request.experts)
    mixtures = {m.group.name: m for m in _reached(prepared, request) if m.group.name not in left}
    keep = {name: kept_experts(one, asked) for name, one in mixtures.items()}
    whole, mixtures = mixtures, {n: m for n, m in mixtures.items() if keep[n] < m.group.units}
    if not mixtures:
        name, one = next(iter(whole.items()))
        raise RequestError(
            "nothing would be removed: every mixture keeps all its experts; of the "
            f"{one.group.units} of {name!r}, {_possible(one)}"
        )
    done, dense = list(records), dict[str, DenseTensors]()
    with stage("pruning", total=len(mixtures)) as bar:
        for record in done:
            mixture = mixtures.pop(record.plan.name, None)
            group = None if mixture is None else mixture.group
            own = partial(_own_matrices, prepared, mixture, record.plan.kept)
            dense.update(replay(group, own, record, keep))
            bar.advance()
        kept = {record.plan.name: record.plan.kept for record in done}
        began = time.perf_counter()
        with timed(Stage.WALK):
            walked = ExpertWalk(
                prepared,
                list(mixtures.values()),
                Target(request.target),
                held_out(prepared, request),
                kept,
                dense,
            )
        for step in blaming_refits(walked, done):
            bar.describe(f"pruning {step.group.name}")
            done.append(_solved(step, keep[step.group.name], request, began))
            if log is not None:
                log.append(len(done) - 1, done[-1])
            bar.advance()
            began = time.perf_counter()
    reports = tuple(record.report for record in done)
    warn_of_refits(reports, prepared.model)
    return PruningPlan(tuple(record.plan for record in done)), reports


def _own_matrices(
    prepared: Prepared, mixture: ExpertMixture | None, kept: Sequence[int], _: CouplingGroup
) -> list[LinearMap]:
    """Return the last matrices of those experts of a mixture that are kept."""
    found = None if mixture is None else last_matrices(prepared, mixture)
    assert found is not None  # as of every mixture that is not skipped
    return [found[1][expert] for expert in kept]


def _solved(step: ExpertStep, keep: int, request: PruningRequest, began: float) -> LayerRecord:
    """Choose the experts of one mixture, and commit the refit of those that stay."""
    unreached = step.unreached
    if unreached:
        warnings.warn(
            f"no calibration token is sent to {pluralize(len(unreached), 'expert')} of "
            f"{step.group.name!r}: {listed([*map(str, unreached)], 8)}; give more samples",
            stacklevel=2,
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
