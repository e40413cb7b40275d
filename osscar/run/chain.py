"""The steps of a pruning run, which runs, sweeps, dry runs and quality targets share.

- `prepare_for`: copy the model, trace it, and find its groups of coupled units.
- `run_dense`: try which groups can lose units, and run the dense model.
- `widths`: choose how many units each group keeps.
- `prune_groups`: group by group measure its inputs in the model as pruned so far, solve, refit,
  and commit.
- `shrunk`: cut the units out, and prove that the smaller model computes the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from graph import UnitKind
from graph.tracing.preserve import cache_as
from osscar.allocation.budget import Budget
from osscar.allocation.divergence import Distance, Reference
from osscar.base.devices import resolve_device
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, timed
from osscar.network.modules import count_parameters
from osscar.offload.on_disk import weight_cache
from osscar.preparation.prepare import Prepared, prepare
from osscar.proof.lineage import note_calibration, note_dense
from osscar.proof.plan import Form, PruningPlan
from osscar.request import PruningRequest
from osscar.run.feasibility import Feasible, feasible_groups, includes_program_only_groups
from osscar.run.groups import prune_groups, samples_held_out
from osscar.run.memory import forecast
from osscar.run.result import PruningResult
from osscar.run.run_log import LayerRecord, RunLog
from osscar.run.shrunk import shrunk
from osscar.run.widths import widths
from osscar.walk.batch_norm import DenseStatistics, dense_statistics


def prune_prepared(
    prepared: Prepared,
    request: PruningRequest,
    dense: Dense,
    log: RunLog | None = None,
    committed: Sequence[LayerRecord] = (),
    tell: Callable[[str], None] = lambda line: None,
    before: Budget | None = None,
) -> PruningResult:
    """Prune a prepared model, which becomes the smaller one; curves of `before` count."""
    start, parameters = time.perf_counter(), count_parameters(prepared.model)
    allocated = widths(prepared, request, dense.feasible, log, tell, before)
    records = prune_groups(prepared, allocated.keep, request, committed, log)
    plan = PruningPlan(tuple(record.plan for record in records))
    model, proof, batch_norms = shrunk(
        prepared, plan, request, dense.feasible.form, dense.statistics
    )
    with timed(Stage.PRUNED):
        likeness = None if dense.reference is None else dense.reference.likeness(model)
    if proof.plan.form is Form.EAGER:  # a program writes nothing in its passes
        numbers = {(number.module, number.attribute) for number in proof.plan.integers}
        prepared.untouched.put_back(model, numbers)
    return PruningResult(
        model=model,
        plan=proof.plan,
        layers=tuple(record.report for record in records),
        parameters_before=parameters,
        parameters_after=count_parameters(model),
        certificate=proof.certificate,
        batch_norms=batch_norms,
        budget=allocated.budget,
        divergence=None if likeness is None else likeness.distance,
        agreement=None if likeness is None else likeness.agreement,
        held_out=samples_held_out(prepared, request),
        seconds=time.perf_counter() - start,
        request=request,
        calibration=prepared.inputs.settings,
        skipped=dense.feasible.skipped,
        folded=prepared.folded,
    )


@contextmanager
def prepare_for(
    model: nn.Module, calibration: Any, request: PruningRequest, ranks: Ranks = ALONE
) -> Iterator[Prepared]:
    """Prepare a model as a request needs it."""
    with prepare(
        model,
        calibration,
        device=resolve_device(request.device),
        batch_size=request.batch_size,
        heads=request.reach(UnitKind.HEADS),
        programs=includes_program_only_groups(model, request),
        ranks=ranks,
    ) as prepared:
        yield within_memory(prepared, request)


def within_memory(prepared: Prepared, request: PruningRequest) -> Prepared:
    """Have the cache of weights on disk leave room for the matrices of a layer."""
    if weight_cache(prepared.model) is None:
        return prepared
    return dataclasses.replace(prepared, matrix_bytes=forecast(prepared, request).matrices)


@dataclass(frozen=True, eq=False)
class Dense:
    """What all runs on a dense model share."""

    feasible: Feasible
    reference: Reference | None
    """Its predictions on held-out samples; None if it puts out no logits."""
    statistics: DenseStatistics
    """Those of its batch-norm layers."""


def run_dense(prepared: Prepared, request: PruningRequest) -> Dense:
    """Try which groups can lose units, and run the dense model."""
    model, ranks = prepared.model, prepared.ranks
    with timed(Stage.TRIAL):
        feasible = ranks.broadcast("what can follow", lambda: feasible_groups(prepared, request))
    with timed(Stage.DENSE):
        last = prepared.inputs.part(-max(1, samples_held_out(prepared, request)))
        batches = last.batches(model, 1)
        distance = Distance.of(model, last, batches[0])
        scores = distance.measure == "nats"
        reference = Reference.of(distance, model, batches, ranks) if scores else None
        statistics = dense_statistics(model, prepared.batches(), request.batch_norm, ranks)
    return Dense(feasible, reference, statistics)


def note_origin(pruned: PruningResult, model: nn.Module, calibration: Any) -> None:
    """Note in the smaller model what it was made of; it caches as the dense one does."""
    note_calibration(pruned.model, calibration, pruned.calibration)
    note_dense(pruned.model, model)
    cache_as(pruned.model, model)
