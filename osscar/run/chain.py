"""The chain of a pruning run; runs, sweeps and quality targets all go through its two functions.

with prepare(model, calibration, request) as prepared:  # copy, trace, try, dense passes: once
    result = prune_prepared(prepared, request)          # widths, walk, shrink and prove
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from graph.tracing.preserve import cache_as
from osscar.allocation.allocate import Choosing, Measuring, allocate, measured_once
from osscar.allocation.limits import Allocated, Allowance, counted_again, goal
from osscar.allocation.measured import Curve, measured_curves
from osscar.allocation.serving import check_served
from osscar.allocation.task import PruningTask, SkippedGroup
from osscar.base.devices import resolve_device
from osscar.base.errors import EquivalenceError, ModelError, RequestError, gathered_warnings, warn
from osscar.base.memory import FOR_BATCHES, memory_for
from osscar.base.printable import in_bytes, listed
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, timed
from osscar.checkpoint.hf_config import adopt_config
from osscar.data.batches import as_inputs
from osscar.data.reader import Batch, to_model
from osscar.distance.distance import Distance, Reference
from osscar.network.modules import copied, count_parameters
from osscar.preparation import prepare as preparation
from osscar.preparation.prepare import Prepared
from osscar.proof.lineage import note_calibration, note_dense
from osscar.proof.plan import Form, PruningPlan
from osscar.request import PruningRequest
from osscar.run.feasibility import (
    feasible_groups,
    in_words,
    includes_program_only_groups,
    refused_widths,
    tell_lost,
)
from osscar.run.groups import prune_groups
from osscar.run.memory import MemoryNeeds, matrix_bytes
from osscar.run.result import PruningResult
from osscar.run.run_log import ALLOCATION, LayerRecord, RunLog, begun
from osscar.shrinking.shrink import Proof, rehearse, shrink
from osscar.shrinking.shrink_program import shrink_program
from osscar.walk.batch_norm import DenseStatistics, dense_statistics, renew_statistics


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A dense model prepared once, for one run or several."""

    dense: nn.Module
    """The caller's model."""
    calibration: Any
    """All of the caller's data."""
    task: PruningTask
    """What was asked for when it was prepared, with what was found on trial."""
    reference: Reference
    """What the dense model returns on held-out samples."""
    statistics: DenseStatistics | None
    """Those of its batch-norm layers; None if these keep their own."""
    log: RunLog | None
    committed: Sequence[LayerRecord]
    """What the log had of groups when the run began."""
    tell: Callable[[str], None]
    measuring: Measuring | None = None
    """Where loss curves come from, if they are not measured for each request alone."""


@contextmanager
def prepare(
    model: nn.Module,
    calibration: Any,
    request: PruningRequest,
    *,
    others: Sequence[PruningRequest] = (),
    pruned_on: Any = None,
    log: RunLog | None = None,
    ranks: Ranks = ALONE,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[PreparedRun]:
    """Do all that is done once: copy and trace the model, try what can follow, run it dense.

    The model may be pruned to several requests (`others`) by one set of loss curves, and
    refitted to a part of the data (`pruned_on`).
    """
    check_served(model, request)
    with (
        memory_for(f"{type(model).__name__}, of which pruning makes copies", FOR_BATCHES),
        preparation.prepare(
            model,
            calibration if pruned_on is None else pruned_on,
            device=resolve_device(request.device),
            batch_size=request.batch_size,
            heads=request.prunes_heads,
            programs=includes_program_only_groups(model, request),
            seed=request.seed,
            ranks=ranks,
        ) as prepared,
    ):
        every = prepared.inputs if pruned_on is None else as_inputs(model, calibration)
        with begun(log, dataclasses.replace(prepared, inputs=every), request) as committed:
            tasks = [PruningTask(prepared, one) for one in (request, *others)]
            bytes_left = max(map(matrix_bytes, tasks))
            with timed(Stage.TRIAL):
                found = ranks.broadcast("what can follow", lambda: feasible_groups(tasks[0]))
            task, *several = (
                dataclasses.replace(one, **vars(found), matrix_bytes=bytes_left) for one in tasks
            )
            with timed(Stage.DENSE):
                note_dense(prepared.model, model)
                last = prepared.inputs.part(-max(1, task.samples_held_out))
                batches = last.batches(1 if last.tokens else prepared.batch_size)
                distance = Distance.from_outputs(prepared.model, last, batches[0], request.distance)
                tell(f"distance: {distance.compared}")
                reference = Reference.from_run(distance, prepared.model, batches, ranks)
                statistics = None
                if request.batch_norm == "correct":
                    statistics = dense_statistics(prepared.model, prepared.batches(), ranks)
            with timed(Stage.ALLOCATION):
                measuring = measured_once(several)
            yield PreparedRun(
                model, calibration, task, reference, statistics, log, committed, tell, measuring
            )


@gathered_warnings()
def prune_prepared(
    run: PreparedRun, request: PruningRequest, *, copy: bool = True
) -> PruningResult:
    """Prune a prepared model, or a copy, to one of the requests that it was prepared for."""
    start = time.perf_counter()
    prepared = run.task.prepared
    if copy:
        prepared = dataclasses.replace(prepared, model=copied(prepared.model))
    task = dataclasses.replace(run.task, prepared=prepared, request=request)
    parameters, bfloat16 = count_parameters(prepared.model), task.in_bfloat16
    allocated = widths(run, task)
    task = dataclasses.replace(task, skipped=(*task.skipped, *allocated.skipped))
    records = prune_groups(task, allocated.keep, run.committed, run.log)
    plan = PruningPlan(tuple(record.plan for record in records))
    model, proof, batch_norms = shrunk(task, plan, run.statistics)
    budget = allocated.budget
    with timed(Stage.PRUNED):
        if budget is not None:
            budget = counted_again(task, budget, plan, model)
        distance = run.reference.distance
        scores = distance.measure == "nats"
        found = (run.reference.likeness if scores else run.reference.compared)(model)
    numbers = {(number.module, number.attribute) for number in proof.plan.integers}
    prepared.untouched.put_back(model, numbers)
    note_calibration(model, run.calibration)
    cache_as(model, run.dense)
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
        request=request,
        calibration=prepared.inputs.settings,
        skipped=task.skipped,
        folded=prepared.folded,
        bfloat16=bfloat16,
    )


@timed(Stage.ALLOCATION)
def widths(run: PreparedRun, task: PruningTask) -> Allocated:
    """Allocate what groups keep, unless the log has it."""
    log = run.log
    noted: Allocated | None = task.prepared.ranks.broadcast(
        "what was allocated", lambda: None if log is None else log.read(ALLOCATION, Allocated)
    )
    if noted is not None:
        return noted
    curves: dict[str, Curve] = {}

    def within_reach(allowed: Sequence[Allowance]) -> None:
        needed = in_bytes(MemoryNeeds.from_task(task).least)
        run.tell(f"{goal(task, allowed)}; takes about {needed} of memory")

    def measuring(task: PruningTask, choose: Choosing) -> Mapping[str, Curve]:
        if not curves:
            curves.update((run.measuring or measured_curves)(task, choose))
        return curves

    dropped: tuple[SkippedGroup, ...] = ()
    while True:  # until code takes the widths that are chosen; fewer groups have a choice each time
        try:
            found = allocate(task, measuring, within_reach)
        except RequestError as error:
            also = f"; {in_words(task.skipped)}" if task.skipped else ""
            raise type(error)(f"{error}{also}") from error
        with timed(Stage.PROOF):
            late = task.prepared.ranks.broadcast(
                "what can follow", partial(refused_widths, task, found.keep)
            )
        if not late:
            break
        warn(f"{in_words(late)}, since their code does not take the widths chosen for them")
        task, dropped = replace(task, skipped=(*task.skipped, *late)), (*dropped, *late)
    found = replace(found, skipped=dropped)
    if log is not None:
        log.write(ALLOCATION, found)
    return found


# ---- the smaller model -------------------------------------------------------------------


_COMPARED = 3
"""So many sizes of samples of which no program tells are named, and their outputs compared."""


def shrunk(
    task: PruningTask, plan: PruningPlan, dense: DenseStatistics | None
) -> tuple[nn.Module, Proof, int]:
    """Return the smaller model, its proof, and how many batch norms have new statistics."""
    prepared, request = task.prepared, task.request
    work = prepared.model
    inputs = prepared.inputs.proofs(request.seed)

    def renew(plan: PruningPlan) -> int:
        with timed(Stage.PRUNED):
            return renew_statistics(work, plan, prepared.batches(), dense, prepared.ranks)

    # A budget may take nothing of what only the program can lose; one of bytes counted the program.
    optional = request.form == "auto" and request.size is None
    if task.form is Form.EXPORTED and not (optional and _goes_in_modules(prepared, plan, inputs)):
        # A program has no batch norms to observe; the model computes the same without the units.
        batch_norms = renew(PruningPlan(()))
        prepared.untouched.put_back(work)
        with timed(Stage.PROOF):
            made = shrink_program(work, plan, inputs, prepared.example)
        tell_lost(work, request)
        return made.model, made.proof, batch_norms
    with timed(Stage.PROOF):
        others = _unproved_sizes(prepared)
        some = [to_model(one, work) for one in list(others.values())[:_COMPARED]]
        proof = shrink(work, plan, [*inputs, *some], programs=prepared.programs)
        structure = proof.certificate.structure
        if structure is not None and others:
            warn(
                f"the proof holds for {'; or '.join(structure.sizes)}, and samples of the data "
                f"have {listed([*others], _COMPARED, '; ')}, for which nothing is proved; give two "
                "of these to osscar.prove(result.model, model, inputs)"
            )
    batch_norms = renew(proof.plan)
    if isinstance(work, PreTrainedModel):
        adopt_config(work)
    return work, proof, batch_norms


def _unproved_sizes(prepared: Prepared) -> dict[str, Mapping[str, Tensor]]:
    """Return samples of the data whose sizes no dense program takes, by these sizes in words."""
    given = prepared.inputs
    others = dict[str, Mapping[str, Tensor]]()
    for one in given.apart or (given.tensors,):
        sample = one if given.alone else {name: x[:2][[0, -1]] for name, x in one.items()}
        if not any(it.traced.standalone.takes(sample) for it in prepared.programs.programs):
            others[", ".join(f"{n} {tuple(x.shape[1:])}" for n, x in sample.items())] = sample
    return others


def _goes_in_modules(prepared: Prepared, plan: PruningPlan, inputs: Sequence[Batch]) -> bool:
    """Whether modules can lose what a plan removes, if not all that they might have lost."""
    if any(group.name in prepared.in_programs for group in plan.groups):
        return False
    with timed(Stage.TRIAL), suppress(EquivalenceError, ModelError):
        rehearse(prepared.model, plan, inputs[:1], prepared.programs)
        return True
    return False
