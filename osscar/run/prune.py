"""Pruning in one shot, as Algorithm 1 of the paper (Meng et al., OSSCAR, ICML 2024) has it.

prepare     copy the model, trace it, find its groups of coupled units
dense       try which groups can lose units; run the dense model
widths      choose how many units each group keeps
groups      group by group: measure on the stream that everything before has shaped, solve,
refit, commit
shrunk      cut the units out, and prove that the smaller model computes the same
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graph import UnitKind
from graph.tracing.preserve import cache_as
from osscar.allocation.divergence import Distance, Reference
from osscar.base.devices import resolve_device
from osscar.base.memory import FOR_BATCHES, memory_for
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, profiled, timed
from osscar.data.loaders import read_once
from osscar.network.modules import count_parameters
from osscar.offload.on_disk import weight_cache
from osscar.preparation.prepare import Prepared, prepare
from osscar.proof.lineage import note_calibration, note_dense
from osscar.proof.plan import PruningPlan
from osscar.request import PruningRequest, by_keywords
from osscar.run.feasibility import Feasible, feasible_groups, includes_program_only_groups
from osscar.run.groups import prune_groups, samples_held_out
from osscar.run.memory import forecast
from osscar.run.result import PruningResult
from osscar.run.run_log import LayerRecord, RunLog, begun
from osscar.run.shrunk import put_back, shrunk
from osscar.run.widths import widths
from osscar.walk.batch_norm import DenseStatistics, dense_statistics


def prune_as_asked(
    model: nn.Module,
    calibration: Any,
    request: PruningRequest,
    log: RunLog | None = None,
    ranks: Ranks = ALONE,
    tell: Callable[[str], None] = lambda line: None,
) -> PruningResult:
    """Prune a model in one shot; the model that comes in is not changed.

    Parameters
    ----------
    model
        A language model that takes ``input_ids``, or any model whose inputs are tensors.
    calibration
        Token windows, (samples, seqlen) int64, or a `CalibrationSet`; an `ImageSet`; a tensor, or a
        mapping of tensors by argument name, whose first dimension is the sample; a `SampleList`
        where it is not, as of graphs; or a loader, a data set or a list of batches, which are read
        as by `osscar.load_batches`, with a warning that tells what was left out.
    request
        What is asked for.  `osscar.prune` takes its fields as keywords: `PruningRequest` describes
        them.
    log
        Keeps what is committed, so that a run which was killed goes on where it stopped; of several
        ranks, the first has it.
    ranks
        The processes that are asked for the same, and share out the work.
    tell
        Is told in a line what will be kept and removed, once that is known.

    Returns
    -------
    PruningResult
        The smaller model, and a report for each layer.

    Raises
    ------
    RequestError
        If what to keep makes no sense for this model.
    NonFiniteError
        If weights or activations are not finite.
    DataError
        If the model cannot read the calibration data, or its batches do not run alike.
    ModelError
        If it has no weights, cannot be copied, or a consumer cannot be refitted.
    graph.GraphError
        If the model cannot be traced.
    EquivalenceError
        If the shrunk model does not compute what the masked one computes, no group can follow, or
        the request is strict and one cannot.
    JournalError
        If the log is not of this model and request.
    RanksError
        If another rank fails, or is asked for something else.

    Examples
    --------
    >>> import osscar
    >>> loaded = osscar.load_model("demo")
    >>> calibration = loaded.calibration(samples=4, seqlen=64)
    >>> result = osscar.prune(loaded.model, calibration, sparsity=0.5)
    >>> result.parameters_after < result.parameters_before
    True
    """
    start = time.perf_counter()
    calibration = read_once(model, calibration)
    with (
        torch.inference_mode(False),  # in which there are no gradients
        memory_for(f"{type(model).__name__}, of which pruning makes copies", FOR_BATCHES),
        profiled() as spent,
        prepare_for(model, calibration, request, ranks) as prepared,
        begun(log, prepared, request) as committed,
    ):
        dense = run_dense(prepared, request)
        result = prune_prepared(prepared, request, dense, log, committed, tell)
    note_origin(result, model, calibration)
    seconds = time.perf_counter() - start
    return dataclasses.replace(result, seconds=seconds, stages=spent.of(seconds))


prune = by_keywords(PruningRequest, prune_as_asked)


def prune_prepared(
    prepared: Prepared,
    request: PruningRequest,
    dense: Dense,
    log: RunLog | None = None,
    committed: Sequence[LayerRecord] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> PruningResult:
    """Prune a prepared model, which becomes the smaller one; as `prune_as_asked` does."""
    start, before = time.perf_counter(), count_parameters(prepared.model)
    allocated = widths(prepared, request, dense.feasible, log, tell)
    records = prune_groups(prepared, allocated.keep, request, committed, log)
    plan = PruningPlan(tuple(record.plan for record in records))
    model, proof, batch_norms = shrunk(
        prepared, plan, request, dense.feasible.form, dense.statistics
    )
    with timed(Stage.PRUNED):
        likeness = None if dense.reference is None else dense.reference.likeness(model)
    put_back(prepared, model, proof.plan)
    return PruningResult(
        model=model,
        plan=proof.plan,
        layers=tuple(record.report for record in records),
        parameters_before=before,
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
    """Prepare a model as a request needs it; see `osscar.preparation.prepare.prepare`."""
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
    """Set how many bytes the cache of weights on disk leaves free for the matrices of a layer."""
    if weight_cache(prepared.model) is None:
        return prepared
    needs = forecast(prepared, request, max(1, samples_held_out(prepared, request)))
    return dataclasses.replace(prepared, matrix_bytes=needs.matrices)


@dataclass(frozen=True, eq=False)
class Dense:
    """What is known of the dense model, whatever becomes of it.

    Parameters
    ----------
    feasible
        The groups that cannot lose units, and whether modules or the program are to be shrunk.
    reference
        Its predictions on held-out samples; None if it puts out no logits.
    statistics
        Those of its batch-norm layers; see `osscar.walk.batch_norm`.
    """

    feasible: Feasible
    reference: Reference | None
    statistics: DenseStatistics


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
    """Note in the smaller model what it was made of, and let it cache as the dense one does."""
    note_calibration(pruned.model, calibration, pruned.calibration)
    note_dense(pruned.model, model)
    cache_as(pruned.model, model)
