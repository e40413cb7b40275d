"""Pruning in one shot: try; allocate; measure, solve and refit group by group; shrink and prove.

This is Algorithm 1 of the paper (Meng et al., OSSCAR, ICML 2024) over coupling groups: each group
is measured on the stream that everything pruned before it has shaped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from graph import UnitKind
from graph.tracing.preserve import cache_as
from osscar.allocation.allocate import allocate
from osscar.allocation.budget import Allocated
from osscar.allocation.divergence import Distance, Reference
from osscar.allocation.widths import reached_groups
from osscar.base.devices import resolve_device
from osscar.base.errors import JournalError, RequestError, warn
from osscar.base.memory import FOR_BATCHES, memory_for
from osscar.base.printable import pluralize
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, profiled, timed
from osscar.data.loaders import read_once
from osscar.network.modules import count_parameters
from osscar.offload.on_disk import weight_cache
from osscar.preparation.prepare import Prepared, prepare
from osscar.proof.lineage import note_calibration, note_dense
from osscar.proof.plan import Form, PruningPlan
from osscar.request import PruningRequest, by_keywords
from osscar.run.feasibility import SkippedGroup, feasible_groups, named, reaches_further
from osscar.run.goal import goal
from osscar.run.groups import held_out, prune_groups
from osscar.run.memory import forecast
from osscar.run.result import PruningResult
from osscar.run.run_log import LayerRecord, RunLog, run_manifest
from osscar.run.shrunk import put_back, shrunk
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
    what = f"{type(model).__name__}, of which pruning makes copies"
    with (
        torch.inference_mode(False),  # in which there are no gradients
        memory_for(what, FOR_BATCHES),
        profiled() as spent,
        prepare_for(model, calibration, request, ranks) as prepared,
    ):
        prepared = within_memory(prepared, request)
        with _begun(log, prepared, request) as records:
            facts = dense_facts(prepared, request)
            result = prune_prepared(prepared, request, facts, log, records, tell)
    finish(result, model, calibration, prepared)
    seconds = time.perf_counter() - start
    return dataclasses.replace(result, seconds=seconds, stages=spent.of(seconds))


def prepare_for(
    model: nn.Module, calibration: Any, request: PruningRequest, ranks: Ranks = ALONE
) -> AbstractContextManager[Prepared]:
    """Prepare a model as a request needs it; see `osscar.preparation.prepare.prepare`."""
    return prepare(
        model,
        calibration,
        device=resolve_device(request.device),
        batch_size=request.batch_size,
        heads=request.reach(UnitKind.HEADS),
        programs=reaches_further(model, request),
        ranks=ranks,
    )


def within_memory(prepared: Prepared, request: PruningRequest) -> Prepared:
    """Return the same with what is to be left free in memory, should its weights lie on disk."""
    if weight_cache(prepared.model) is None:
        return prepared
    needs = forecast(prepared, request, max(1, held_out(prepared, request)))
    return dataclasses.replace(prepared, matrix_bytes=needs.matrices)


@dataclass(frozen=True, eq=False)
class _DenseFacts:
    """What is known of the dense model, whatever becomes of it.

    Parameters
    ----------
    form
        What of it is to be shrunk: modules or program.
    skipped
        Groups that keep all their units, since they cannot follow, in the order of the model.
    reference
        What it predicts; None if it puts out no logits.
    statistics
        Of its batch-norm layers; see `osscar.walk.batch_norm`.
    """

    form: Form
    skipped: tuple[SkippedGroup, ...]
    reference: Reference | None
    statistics: DenseStatistics

    @property
    def skipped_names(self) -> frozenset[str]:
        """The names of the groups that cannot follow."""
        return frozenset(group.name for group in self.skipped)


def dense_facts(prepared: Prepared, request: PruningRequest) -> _DenseFacts:
    """Try what can follow, and run the dense model."""
    ranks = prepared.ranks
    with timed(Stage.TRIAL):
        form, skipped = ranks.broadcast(
            "what can follow", lambda: feasible_groups(prepared, request)
        )
    with timed(Stage.DENSE):
        model, last = prepared.model, prepared.inputs.part(-max(1, held_out(prepared, request)))
        batches = last.batches(model, 1)
        distance = Distance.of(model, last, batches[0])
        scores = distance.measure == "nats"
        reference = Reference.of(distance, model, batches, ranks) if scores else None
        statistics = dense_statistics(prepared.model, prepared.batches(), request.batch_norm, ranks)
    return _DenseFacts(form, skipped, reference, statistics)


def prune_prepared(
    prepared: Prepared,
    request: PruningRequest,
    facts: _DenseFacts,
    log: RunLog | None = None,
    records: Sequence[LayerRecord] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> PruningResult:
    """Prune a prepared model, which becomes the smaller one; as `prune_as_asked` does."""
    start, before = time.perf_counter(), count_parameters(prepared.model)
    widths = _widths(prepared, request, facts, log, tell)
    committed = prune_groups(prepared, widths.keep, request, records, log)
    plan = PruningPlan(tuple(record.plan for record in committed))
    smaller, proof, batch_norms = shrunk(prepared, plan, request, facts.form, facts.statistics)
    with timed(Stage.PRUNED):
        reference = facts.reference
        likeness = None if reference is None else reference.likeness(smaller)
    return PruningResult(
        model=smaller,
        plan=proof.plan,
        layers=tuple(record.report for record in committed),
        parameters_before=before,
        parameters_after=count_parameters(smaller),
        certificate=proof.certificate,
        batch_norms=batch_norms,
        budget=widths.budget,
        divergence=None if likeness is None else likeness.distance,
        agreement=None if likeness is None else likeness.agreement,
        held_out=held_out(prepared, request),
        seconds=time.perf_counter() - start,
        request=request,
        calibration=prepared.inputs.settings,
        skipped=facts.skipped,
        folded=prepared.folded,
    )


def finish(pruned: PruningResult, model: nn.Module, calibration: Any, prepared: Prepared) -> None:
    """Leave the smaller model as its user would have it: noted down, and put back."""
    note_calibration(pruned.model, calibration, pruned.calibration)
    note_dense(pruned.model, model)
    put_back(prepared, pruned.model, pruned.plan)
    cache_as(pruned.model, model)


prune = by_keywords(PruningRequest, prune_as_asked)


@timed(Stage.ALLOCATION)
def _widths(
    prepared: Prepared,
    request: PruningRequest,
    facts: _DenseFacts,
    log: RunLog | None,
    tell: Callable[[str], None],
) -> Allocated:
    """Decide what groups keep; a run that goes on has decided it."""
    noted: Allocated | None = prepared.ranks.broadcast(
        "what was allocated", lambda: None if log is None else log.allocation()
    )
    if noted is not None:
        _check_noted(noted, prepared, request, facts)
        return noted
    try:
        tell(goal(prepared, request, facts.skipped_names))
        known = allocate(prepared, request, facts.skipped_names, facts.form)
    except RequestError as error:
        also = f"; {named(facts.skipped)}" if facts.skipped else ""
        raise type(error)(f"{error}{also}") from error
    if log is not None:
        log.note_allocation(known)
    return known


def _check_noted(
    noted: Allocated, prepared: Prepared, request: PruningRequest, facts: _DenseFacts
) -> None:
    """Refuse what a log says that groups keep where it cannot be."""
    budget = noted.budget
    units = {
        group.name: group.units
        for group in reached_groups(prepared, request)
        if group.prunable and group.name not in facts.skipped_names
    }
    curves = {} if budget is None else budget.curves
    sound = all(0 < kept < units.get(name, 0) for name, kept in noted.keep.items()) and all(
        len(losses) == units.get(name, -1) + 1 for name, losses in curves.items()
    )
    if not sound:
        raise JournalError(
            "the log of the run says what groups keep that this model does not have, or not fewer "
            "units than they have; begin anew with --restart"
        )


@contextmanager
def _begun(
    log: RunLog | None, prepared: Prepared, request: PruningRequest
) -> Iterator[tuple[LayerRecord, ...]]:
    """Begin the run, or go on with one, on all ranks."""
    ranks = prepared.ranks
    if log is None and ranks.alone:
        yield ()
        return
    manifest = run_manifest(request, prepared.model, prepared.inputs, prepared.batch_size)
    manifest.check_alike(ranks)
    batches = len(prepared.batches())
    if batches < ranks.size:
        warn(
            f"{ranks.size} ranks share out {pluralize(batches, 'batch', 'batches')}, and some "
            "have nothing to do; give a smaller --batch-size, or launch fewer"
        )
    with nullcontext(()) if log is None else log.begun(manifest) as records:
        done = ranks.broadcast("how many groups are done", lambda: len(records))
        yield tuple(
            ranks.broadcast("a group that is done", partial(records.__getitem__, index))
            for index in range(done)
        )
