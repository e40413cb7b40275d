"""The groups of a model, solved one after the other where the walk stops."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import solvers
from graph import CouplingGroup
from osscar.allocation.task import PruningTask
from osscar.base.errors import warn, warn_of
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.printable import listed, pluralize
from osscar.base.timing import Stage, progress_bar, timed
from osscar.offload.on_disk import room_for, values_of
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import GroupPlan
from osscar.request import PruningRequest
from osscar.run.run_log import LayerRecord, RunLog
from osscar.walk.expert_walk import ExpertStep, ExpertWalk, without
from osscar.walk.layer_report import LayerReport
from osscar.walk.layer_step import GROWN, DenseTensors, LayerStep, Solved, dense_tensors
from osscar.walk.targets import Target
from osscar.walk.walk import Walk
from solvers.exact.branch_and_bound import BranchAndBound

_EXACT_UNITS = 32
"""Up to so many units a bound comes from branch and bound, which mostly closes the gap."""

_EXACT_SECONDS = 10.0
"""How long branch and bound may take for one bound; what it has by then is valid."""


def prune_groups(
    task: PruningTask,
    keep: Mapping[str, int],
    records: Sequence[LayerRecord],
    log: RunLog | None,
) -> tuple[LayerRecord, ...]:
    """Solve and refit each group in `keep` where a walk stops, experts first.

    What was committed (`records`) is written again; the log keeps what is committed now.
    """
    groups = [group for group in task.groups if group.name in keep]
    run, experts = _Run(task, keep, log), [group for group in groups if group.kind.routed]
    others, names = [g for g in groups if g not in experts], {group.name for group in experts}
    known = [record for record in records if record.plan.name in names]
    rest = [record for record in records if record.plan.name not in names]
    with without(task.prepared, _kept_in(known)) as prepared:
        run.prune(prepared, experts, known, ExpertWalk, last=not others)
    with without(task.prepared, _kept_in(run.done)) as prepared:
        run.prune(prepared, others, rest, Walk)
    return tuple(run.done)


def _kept_in(records: Iterable[LayerRecord]) -> dict[str, tuple[int, ...]]:
    """Return which units stay of each group, by name."""
    return {record.plan.name: record.plan.kept for record in records}


@dataclass(eq=False)
class _Run:
    """The records of a run so far, and the dense tensors of what they were written to, by name."""

    task: PruningTask
    keep: Mapping[str, int]
    log: RunLog | None
    done: list[LayerRecord] = field(default_factory=list)
    dense: dict[str, DenseTensors] = field(default_factory=dict)

    def prune(
        self,
        prepared: Prepared,
        groups: Sequence[CouplingGroup],
        records: Sequence[LayerRecord],
        walk: Callable[..., Iterable[LayerStep | ExpertStep]],
        *,
        last: bool = True,
    ) -> None:
        """Write records again, and solve the others; before the `last` keep dense tensors."""
        if not groups and not records:
            return
        left, before = {group.name: group for group in groups}, len(self.done)
        with progress_bar("pruning", total=len(left)) as bar:
            for record in records:
                maps = prepared.linear_maps(left.pop(record.plan.name))
                self.dense = dense_tensors(maps) | self.dense  # of two groups, the first found it
                written = iter(record.weights)
                for consumer in maps:
                    consumer.write(written)
                self.done.append(record)
                bar.advance()
            began = time.perf_counter()
            with timed(Stage.WALK):
                walked = walk(
                    prepared,
                    list(left.values()),
                    target=Target(self.task.request.target),
                    held_out=self.task.samples_held_out,
                    committed=self.dense,
                )
            for step in walked:
                bar.describe(f"pruning {step.group.name}")
                if not last:
                    self.dense.update(dense_tensors(step.consumers))
                with room_for(prepared.model, self.task.matrix_bytes):
                    record = self._prune_group(step, began)
                if self.log is not None:
                    self.log.append(len(self.done), record)
                self.done.append(dataclasses.replace(record, weights=()))  # the model has them
                bar.advance()
                began = time.perf_counter()
        if prepared.ranks.first:
            warn_of_refits([record.report for record in self.done[before:]])

    def _prune_group(self, step: LayerStep | ExpertStep, began: float) -> LayerRecord:
        """Have the first rank solve one group, and commit the refitted weights on all."""
        name, ranks = step.group.name, self.task.prepared.ranks

        def make() -> LayerRecord:
            record = solved(step, self.keep[name], self.task.request, began)
            if ranks.alone:
                return record
            there = tuple(values_of(weight).cpu() for weight in record.weights)
            return dataclasses.replace(record, weights=there)

        inputs = " and ".join(dict.fromkeys(str(consumer.rows) for consumer in step.consumers))
        with memory_for(f"the problem of {name!r} with {inputs} inputs", FOR_MATRICES):
            record = ranks.broadcast("what became of a group", make)
        if isinstance(step, LayerStep) and not step.committed:
            step.adopt(record.weights)
        return record


def warn_of_refits(reports: Sequence[LayerReport]) -> None:
    """Say which refits did worse than none, and which have weights beyond reason."""
    dense = [label for report in reports for label in report.unrefitted]
    if dense:
        keep = "keeps its" if len(dense) == 1 else "keep their"
        held_out = all(report.held_out for report in reports if report.unrefitted)
        warn(
            f"{pluralize(len(dense), 'layer')} {keep} dense weights, except for removed units, "
            f"since a refit is worse on {'held-out' if held_out else 'calibration'} samples: "
            f"{listed(dense, 8)}; give more calibration data"
        )
    grown = sorted(
        (report for report in reports if report.growth > GROWN), key=lambda report: -report.growth
    )
    if grown:
        named = [f"{report.name} ({report.growth:.3g} times)" for report in grown]
        warn(
            f"refitted weights are very large: the largest weight that reads a group is more than "
            f"{GROWN:g} times the largest dense one of {listed(named, 8)}; "
            "give more calibration data, raise damp (`--set damp=1`), or leave such groups alone "
            "with skip (`--skip`)"
        )


def solved(
    step: LayerStep | ExpertStep, keep: int, request: PruningRequest, began: float
) -> LayerRecord:
    """Solve one group, and commit the refitted weights."""
    group = step.group
    found = (
        _solved_units(step, keep, request)
        if isinstance(step, LayerStep)
        else step.solve(
            keep, request.chosen_backend(experts=True), request.damp, request.correction_weight
        )
    )
    layer, refits = found.layer, found.refits
    report = LayerReport(
        **vars(found.record),
        name=group.name,
        kind=str(group.kind),
        units=group.units,
        kept=len(found.record.support),
        dead=found.dead,
        damp=found.damp,
        correction_weight=layer.correction_weight,
        positions=layer.positions,
        unread=len(layer.unread),
        held_out=refits.held_out,
        unrefitted=refits.unrefitted,
        fixed=sum(gram.linear_map.fixed_inputs[0] for gram in layer.known),
        fixed_dense=sum(gram.linear_map.fixed_inputs[1] for gram in layer.known),
        growth=refits.growth,
        measure_seconds=found.measured - began,
        solve_seconds=time.perf_counter() - found.measured,
        refitted_loss=found.refitted_loss,
        choosing=found.choosing,
    )
    if report.dead == group.units:
        warn_of(
            "no unit varies on the calibration data, so that which of them stay is chance, of {}; "
            "give data such as the model is made for",
            f"{group.name} ({pluralize(group.units, 'unit')})",
        )
    plan = GroupPlan.of(group, found.record.support)
    written = tuple(tensor for consumer in layer.consumers for tensor in consumer.read())
    return LayerRecord(plan, report, written)


def _solved_units(step: LayerStep, keep: int, request: PruningRequest) -> Solved:
    """Choose the units that stay by the problem of the layers that read them, and commit these."""
    backend = request.chosen_backend()
    corrected = Target(request.target).needs_dense
    with timed(Stage.DAMPING):
        weight = request.correction_weight if corrected else 0.0
        damp, step.correction_weight = step.regularization(keep, request.damp, weight)
    with timed(Stage.SOLVER):
        problem = step.problem(keep, damp)
        measured = time.perf_counter()
        if request.certify:
            solution, verification = certified(problem, backend)
        else:
            solution, verification = solvers.solve(problem, backend), None
        kept = solution.support.tolist()
        refits = step.refits(solution.weights, kept)
        step.commit(refits.weights, kept)
    record = solution.record(verification)
    return Solved(record, step, refits, damp, len(problem.dead), measured)


# ---- certificates ------------------------------------------------------------------------


def certified(
    problem: solvers.SubsetProblem, backend: solvers.Backend
) -> tuple[solvers.Solution, solvers.Verification]:
    """Solve, add a lower bound that no choice of units can beat, and verify both."""
    exact = backend.kind is solvers.BackendKind.EXACT or problem.units > _EXACT_UNITS
    solution = solvers.solve(problem, backend, bound=exact)
    if not exact:  # the choice stays as the backend made it
        start = tuple(solution.support.tolist())
        proof = solvers.solve(problem, BranchAndBound(start=start, time_limit=_EXACT_SECONDS))
        if proof.lower_bound > solution.lower_bound:
            solution = dataclasses.replace(
                solution,
                lower_bound=proof.lower_bound,
                bound_from=proof.bound_from,
                certificate=proof.certificate,
            )
    return solution, solution.verify()
