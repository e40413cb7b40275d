"""The steps of a pruning run, which runs, sweeps and quality targets share.

They are, in order, `prepare_for`, `tried`, `run_dense`, `widths`, `prune_groups` and `shrunk`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from graph.tracing.preserve import cache_as
from osscar.allocation.allocate import allocate
from osscar.allocation.budget import Allocated, Budget
from osscar.allocation.costs import Cost, count
from osscar.allocation.divergence import Distance, Reference
from osscar.allocation.limits import counted_again
from osscar.allocation.task import PruningTask
from osscar.base.devices import resolve_device
from osscar.base.errors import EquivalenceError, ModelError, RequestError, gathered_warnings
from osscar.base.memory import FOR_BATCHES, memory_for
from osscar.base.printable import engineering, in_bytes, share
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, timed
from osscar.checkpoint.hf_config import adopt_config
from osscar.data.batches import Batch
from osscar.network.modules import count_parameters
from osscar.offload.on_disk import weight_cache
from osscar.preparation.prepare import Prepared, prepare
from osscar.proof.lineage import note_calibration, note_dense
from osscar.proof.plan import Form, PruningPlan
from osscar.request import BudgetKind, PruningRequest, parse_keep
from osscar.run.feasibility import (
    feasible_groups,
    in_words,
    includes_program_only_groups,
    tell_lost,
)
from osscar.run.groups import prune_groups
from osscar.run.memory import MemoryNeeds, forecast
from osscar.run.result import PruningResult
from osscar.run.run_log import LayerRecord, RunLog
from osscar.shrinking.shrink import Proof, rehearse, shrink
from osscar.shrinking.shrink_program import shrink_program
from osscar.walk.batch_norm import DenseStatistics, dense_statistics, renew_statistics


@gathered_warnings()
def prune_prepared(
    task: PruningTask,
    dense: Dense,
    log: RunLog | None = None,
    committed: Sequence[LayerRecord] = (),
    tell: Callable[[str], None] = lambda line: None,
    before: Budget | None = None,
) -> PruningResult:
    """Prune a prepared model, which becomes the smaller one; start with the curves of `before`."""
    prepared = task.prepared
    start, parameters = time.perf_counter(), count_parameters(prepared.model)
    bfloat16 = task.in_bfloat16
    allocated = widths(task, log, tell, before)
    records = prune_groups(task, allocated.keep, committed, log)
    plan = PruningPlan(tuple(record.plan for record in records))
    model, proof, batch_norms = shrunk(task, plan, dense.statistics)
    budget = allocated.budget
    with timed(Stage.PRUNED):
        if budget is not None:
            budget = counted_again(task, budget, plan, model)
        distance = dense.reference.distance
        scores = distance.measure == "nats"
        found = (dense.reference.likeness if scores else dense.reference.compared)(model)
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
        budget=budget,
        distance=distance.compared.measured(found.distance),
        divergence=found.distance if scores else None,
        agreement=found.agreement if scores else None,
        held_out=task.samples_held_out,
        seconds=time.perf_counter() - start,
        request=task.request,
        calibration=prepared.inputs.settings,
        skipped=task.feasible.skipped,
        folded=prepared.folded,
        bfloat16=bfloat16,
    )


@contextmanager
def prepare_for(
    model: nn.Module, calibration: Any, request: PruningRequest, ranks: Ranks = ALONE
) -> Iterator[PruningTask]:
    """Prepare a model as a request needs it."""
    with (
        memory_for(f"{type(model).__name__}, of which pruning makes copies", FOR_BATCHES),
        prepare(
            model,
            calibration,
            device=resolve_device(request.device),
            batch_size=request.batch_size,
            heads=request.prunes_heads,
            programs=includes_program_only_groups(model, request),
            seed=request.seed,
            ranks=ranks,
        ) as prepared,
    ):
        yield within_memory(PruningTask(prepared, request))


def within_memory(task: PruningTask) -> PruningTask:
    """Have the cache of weights on disk leave room for the matrices of a layer."""
    if weight_cache(task.prepared.model) is None:
        return task
    return dataclasses.replace(task, matrix_bytes=forecast(task).matrices)


@dataclass(frozen=True, eq=False)
class Dense:
    """What is measured of a dense model, for all runs on it."""

    reference: Reference
    """What it puts out on held-out samples."""
    statistics: DenseStatistics | None
    """Those of its batch-norm layers; None if these keep their own."""


@timed(Stage.TRIAL)
def tried(task: PruningTask) -> PruningTask:
    """Return a task that knows which groups can lose units, and in which form of the model."""
    ranks = task.prepared.ranks
    feasible = ranks.broadcast("what can follow", lambda: feasible_groups(task))
    return dataclasses.replace(task, feasible=feasible)


@timed(Stage.DENSE)
def run_dense(task: PruningTask, tell: Callable[[str], None] = lambda line: None) -> Dense:
    """Run the dense model on the samples that are held out, and for its batch norms on all.

    How distances are measured is told in a line.
    """
    prepared = task.prepared
    model, ranks = prepared.model, prepared.ranks
    last = prepared.inputs.part(-max(1, task.samples_held_out))
    batches = last.batches(model, 1)
    distance = Distance.of(model, last, batches[0], task.request.distance)
    tell(f"distance: {distance.compared}")
    reference = Reference.of(distance, model, batches, ranks)
    corrected = task.request.batch_norm == "correct"
    statistics = dense_statistics(model, prepared.batches(), ranks) if corrected else None
    return Dense(reference, statistics)


def note_origin(pruned: PruningResult, model: nn.Module, calibration: Any) -> None:
    """Note in the smaller model what it was made of; it caches as the dense one does."""
    note_calibration(pruned.model, calibration, pruned.calibration)
    note_dense(pruned.model, model)
    cache_as(pruned.model, model)


@timed(Stage.ALLOCATION)
def widths(
    task: PruningTask,
    log: RunLog | None,
    tell: Callable[[str], None],
    before: Budget | None = None,
) -> Allocated:
    """Allocate what groups keep, unless the log has it; start with the curves of `before`."""
    noted: Allocated | None = task.prepared.ranks.broadcast(
        "what was allocated", lambda: None if log is None else log.allocation()
    )
    if noted is not None:
        return noted
    try:

        def within_reach() -> None:
            tell(f"{goal(task)}; takes about {in_bytes(MemoryNeeds.of(task).least)} of memory")

        found = allocate(task, before, within_reach)
    except RequestError as error:
        skipped = task.feasible.skipped
        also = f"; {in_words(skipped)}" if skipped else ""
        raise type(error)(f"{error}{also}") from error
    if log is not None:
        log.note_allocation(found)
    return found


def goal(task: PruningTask) -> str:
    """Say what the run is to keep and to remove."""
    prepared, request, keep = task.prepared, task.request, task.keep
    left = {group.name: 0 for group in task.shared}

    def told(budget: BudgetKind | None) -> str:
        asked: Any = None if budget is None else getattr(request, budget)
        match budget:
            case BudgetKind.SPEEDUP:
                return f"is to be {asked:g} times as fast as the dense model"
            case BudgetKind.FLOPS:
                return f"keeps {share(asked)} of the operations, removes {share(1 - asked)}"
            case BudgetKind.SIZE:
                return f"keeps {asked} of the bytes that the weights take on disk"
            case BudgetKind.MEMORY:
                return f"keeps {asked} of the memory that serving takes"
        cost = count(Cost.PARAMETERS, prepared, task.counted)
        dense, kept = cost.dense, cost.of(keep)
        if budget is BudgetKind.SPARSITY:
            kept -= asked * (kept - cost.of({**keep, **left}))
        elif budget is BudgetKind.PARAMS:
            wanted = parse_keep(asked)
            kept = float(wanted if isinstance(wanted, int) else wanted * Fraction(int(dense)))
        return (
            f"keeps {engineering(kept)} of {engineering(dense)} parameters, removes "
            f"{engineering(dense - kept)}"
        )

    return "; ".join(map(told, request.budgets or (None,)))


def shrunk(
    task: PruningTask, plan: PruningPlan, dense: DenseStatistics | None
) -> tuple[nn.Module, Proof, int]:
    """Return the smaller model, its proof, and how many batch norms have new statistics."""
    prepared, request = task.prepared, task.request
    work = prepared.model
    inputs = prepared.inputs.proofs(work, request.seed)

    def renew(plan: PruningPlan) -> int:
        with timed(Stage.PRUNED):
            return renew_statistics(work, plan, prepared.batches(), dense, prepared.ranks)

    # A budget may take nothing of what only the program can lose; one of bytes counted the program.
    optional = request.form == "auto" and request.size is None
    if task.feasible.form is Form.EXPORTED and not (
        optional and _goes_in_modules(prepared, plan, inputs)
    ):
        # A program has no batch norms to observe; the model computes the same without the units.
        batch_norms = renew(PruningPlan(()))
        prepared.untouched.put_back(work)
        with timed(Stage.PROOF):
            made = shrink_program(work, plan, inputs, prepared.example)
        tell_lost(work, request)
        return made.model, made.proof, batch_norms
    prepared.untouched.put_back(work)
    with timed(Stage.PROOF):
        proof = shrink(work, plan, inputs, programs=prepared.programs)
    batch_norms = renew(proof.plan)
    if isinstance(work, PreTrainedModel):
        adopt_config(work)
    return work, proof, batch_norms


def _goes_in_modules(prepared: Prepared, plan: PruningPlan, inputs: Sequence[Batch]) -> bool:
    """Whether modules can lose what a plan removes, if not all that they might have lost."""
    if any(group.name in prepared.in_programs for group in plan.groups):
        return False
    with timed(Stage.TRIAL), suppress(EquivalenceError, ModelError):
        prepared.untouched.put_back()
        rehearse(prepared.model, plan, inputs[:1], prepared.programs)
        return True
    return False
