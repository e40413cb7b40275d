"""The time and memory of a pruning run, estimated from one dense pass and the solve of a group."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from timeit import Timer
from typing import Any

from torch import nn

from graph import CouplingGroup
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, count
from osscar.allocation.measured import compared_samples, fitted_samples
from osscar.allocation.speedup import MOST_MODELS, REPETITIONS
from osscar.allocation.task import PruningTask
from osscar.base.errors import RequestError
from osscar.base.printable import in_bytes
from osscar.base.timing import Clock, Stage, clock, profiled
from osscar.checkpoint.directory import weight_bytes
from osscar.data.batches import Batch
from osscar.data.loaders import read_once
from osscar.network.modules import forward, forward_in_bfloat16
from osscar.offload.on_disk import room_for, weight_cache
from osscar.preparation.prepare import Prepared
from osscar.report.sections import Table, facts
from osscar.report.shown import Shown
from osscar.request import PruningRequest, by_keywords
from osscar.run.chain import prepare_for, tried
from osscar.run.groups import solved
from osscar.run.memory import forecast
from osscar.walk.batch_norm import batch_norms
from osscar.walk.targets import Target
from osscar.walk.walk import Walk

_FEW = 8
"""Samples on which a group is solved."""

_MOST_ROWS = 2048
"""The group that is solved has at most so many inputs, if there is one: it takes a while."""


@dataclass(frozen=True, kw_only=True)
class Estimate(Shown):
    """The time and memory that a run will take.

    Parameters
    ----------
    stages
        Seconds by stage, in the order in which they come; expect between half and twice as many.
    peak_bytes
        The most memory of the process, or of the card that it runs on.
    least_bytes
        The least memory that would do where the weights stay on disk; else None.
    solved
        The group that was solved, by which the others are estimated.
    passes
        How often the walk runs the calibration data through the model.
    kept_share
        About which share of the parameters stays.
    """

    stages: Mapping[Stage, float]
    peak_bytes: int
    least_bytes: int | None
    solved: str
    passes: int
    kept_share: float

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(self.stages.values())

    def sections(self) -> tuple[Table, Table]:
        """Return tables of the seconds of each stage, and of the memory."""
        taken = {**{str(stage): one for stage, one in self.stages.items()}, "all": self.seconds}
        rows = ((name, f"{one:.0f}" if one >= 100 else f"{one:.2g}") for name, one in taken.items())
        seconds = (
            f"right within a factor of two; {self.solved!r} was solved, and its time was scaled to "
            "other groups by the cube of their inputs"
        )
        least = "" if self.least_bytes is None else f"; {in_bytes(self.least_bytes)} would suffice"
        told = (("seconds", seconds), ("memory", f"{in_bytes(self.peak_bytes)} at most{least}"))
        return Table("estimate", ("stage", "seconds >"), tuple(rows)), facts("", told)


def estimate_as_asked(
    model: nn.Module, calibration: Any, request: PruningRequest, clock: Clock = clock
) -> Estimate:
    """Estimate what `osscar.prune` will take; nothing is written, and the model is not changed.

    Parameters
    ----------
    model, calibration
        As `osscar.prune` takes them.
    request
        What will be asked for.  `osscar.estimate` takes its fields as keywords: `PruningRequest`
        describes them.
    clock
        Tells the time; by default that of the wall.

    Returns
    -------
    Estimate
        The stages from the opening of the model to the comparison of its predictions.

    Raises
    ------
    RequestError
        If what to keep makes no sense for this model, or a limit of memory cannot be kept.
    NonFiniteError, DataError, ModelError, graph.GraphError
        As `osscar.prune`.

    Examples
    --------
    >>> import osscar
    >>> loaded = osscar.load_model("demo")
    >>> calibration = loaded.calibration(samples=4, seqlen=64)
    >>> estimate = osscar.estimate(loaded.model, calibration, sparsity=0.5)
    >>> estimate.seconds > 0
    True
    """
    if request.routed:
        raise RequestError(
            "the time of pruning whole experts cannot be estimated; prune with a few samples to "
            "measure it"
        )
    if request.quality is not None:
        raise RequestError(
            f"the time of {request.quality} cannot be estimated, as it prunes up to four "
            "times; estimate a budget in its place, such as --params 0.75, and multiply by four"
        )
    calibration = read_once(model, calibration)
    began = clock()
    with prepare_for(model, calibration, request) as task:
        opening, prepared = clock() - began, task.prepared
        samples = prepared.inputs.samples
        needs = forecast(task)
        [batch, *_] = prepared.batches()

        def seconds(run: Callable[[nn.Module, Batch], Any]) -> float:
            """Return how long a sample takes."""
            passing = Timer(partial(run, prepared.model, batch), timer=clock)
            return min(passing.repeat(2, number=1)) / prepared.inputs.count(batch)

        one = seconds(forward)
        rough = seconds(forward_in_bfloat16) if task.in_bfloat16 else one
        began = clock()
        task = tried(task)
        trial = clock() - began
        # By equal shares of the budgets, as curves are not known.
        even: dict[str, Any] = {"allocation": "uniform"} if request.has_budget else {}
        if request.speedup is not None:  # which is a matter of operations first
            even |= {"speedup": None, "flops": min(1 / request.speedup, request.flops or 1.0)}
        evenly = dataclasses.replace(request, **even)
        allocated = allocate(dataclasses.replace(task, request=evenly))
        keep, budget = allocated.keep, allocated.budget
        groups = [group for group in prepared.groups if group.name in keep]
        cost = count(Cost.PARAMETERS, prepared, prepared.groups)
        kept = cost.of(keep) / cost.dense
        target = Target(request.target)
        schedule = Walk(prepared, groups, target=target).schedule
        reach = sum((last + 1) / len(schedule.calls) for _, last in schedule.passes)
        source, solving = _solved(task, keep, groups, clock)

        def times(groups: Sequence[CouplingGroup], power: int) -> float:
            """Return how many times as long groups take as the one that was solved."""
            most = _rows(prepared, source)
            return sum((_rows(prepared, group) / most) ** power for group in groups)

        compared = max(1, task.samples_held_out)
        compared += samples if batch_norms(prepared.model) else 0
        cubes = times(groups, 3)
        stages = {
            Stage.OPEN: opening,
            Stage.TRIAL: trial,
            Stage.DENSE: one * compared,
            Stage.ALLOCATION: 0.0,
            Stage.WALK: (one + rough * target.needs_dense) * samples * reach,
            # Gram matrices are squares of what a layer reads, at every position.
            Stage.GRAM: samples / min(_FEW, samples) * times(groups, 2) * solving[Stage.GRAM],
            Stage.DAMPING: cubes * solving[Stage.DAMPING],
            Stage.SOLVER: cubes * solving[Stage.SOLVER],
            Stage.PROOF: 0.8 * trial,  # it shrinks and compares as the trial does
            Stage.PRUNED: one * kept * compared,
        }
        if request.speedup is not None:  # about half of the most models, each timed beside this one
            turns = MOST_MODELS / 2 * 2 * (REPETITIONS + 1)
            stages[Stage.ALLOCATION] += turns * one * prepared.inputs.count(batch)
        if budget is not None and task.measures_curves:
            shared = [group for group in prepared.groups if group.name in budget.widths]
            passes = fitted_samples(prepared) + compared_samples(prepared) * len(shared)
            stages[Stage.MEASURED] = passes * rough + times(shared, 3) * solving[Stage.SOLVER]
        cache, peak = weight_cache(prepared.model), needs.least
        if cache is not None:  # which holds what it has read, as long as there is room
            peak = min(peak + weight_bytes(prepared.model), cache.ceiling)
        return Estimate(
            stages={stage: stages[stage] for stage in Stage if stage in stages},
            peak_bytes=peak,
            least_bytes=None if cache is None else needs.least,
            solved=source.name,
            passes=len(schedule.passes),
            kept_share=kept,
        )


estimate = by_keywords(PruningRequest, estimate_as_asked)


def _rows(prepared: Prepared, group: CouplingGroup) -> int:
    return max(one.rows for one in prepared.linear_maps(group))


def _solved(
    task: PruningTask, keep: Mapping[str, int], groups: Sequence[CouplingGroup], clock: Clock
) -> tuple[CouplingGroup, Mapping[Stage, float]]:
    """Solve the largest group that is not too large, on few samples; return it and the seconds."""
    prepared, request = task.prepared, task.request
    by_rows = sorted(groups, key=lambda group: _rows(prepared, group))
    few_rows = [group for group in by_rows if _rows(prepared, group) <= _MOST_ROWS]
    source = (few_rows or by_rows[:1])[-1]
    samples = min(_FEW, prepared.inputs.samples)
    few = dataclasses.replace(prepared, inputs=prepared.inputs.part(0, samples))
    held = 1 if request.holds_out and samples > 1 else 0
    with profiled(clock) as profile, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about few samples
        for step in Walk(few, [source], target=Target(request.target), held=held):
            with room_for(few.model, task.matrix_bytes):
                solved(step, keep[source.name], request, 0.0)
    return source, profile.seconds
