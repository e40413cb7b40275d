"""Find the smallest model whose loss of quality is within a target.

The model is pruned to a size, which is an *attempt*, and measured; what was measured chooses the
next size.  Half of the calibration samples prune.  A quarter, to which nothing is fitted, measures
each attempt, and so leads the search.  The last quarter tests the sizes that the search holds for
good (`osscar.run.target_search`), and has no say in what is tried, or in which order it is tested.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from osscar.allocation.clocks import clock_of
from osscar.allocation.costs import CountedCost, count
from osscar.allocation.limits import COUNTED, Allocated, Budget, allowances
from osscar.allocation.measured import known_curves, measured_curves
from osscar.allocation.search import Search
from osscar.allocation.task import PruningTask
from osscar.allocation.times import as_shares, time_operators
from osscar.base.errors import DataError, NonFiniteError, RequestError
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, profiled, timed
from osscar.data.batches import as_inputs
from osscar.data.loaders import read_once
from osscar.data.parts import copies, in_parts
from osscar.evaluation.confidence import (
    Bounded,
    Judge,
    check_labelled,
    fewest_samples,
    usual_samples,
)
from osscar.network.modules import digest_of_weights
from osscar.recovery.recover import Recovery
from osscar.request import BudgetKind, PruningRequest, QualityTarget, TargetKind
from osscar.run.chain import PreparedRun, prepare, prune_prepared, widths
from osscar.run.result import PruningResult
from osscar.run.run_log import ALLOCATION, ATTEMPTS, TIMES, RunLog, begun
from osscar.run.target_search import (
    SURE,
    Attempt,
    Frontier,
    TargetReport,
    next_limit,
    samples_needed,
)

_FIRST = 0.3
"""Share of what may be removed that is gone where curves are first measured."""

_BUDGETS = {
    "params": BudgetKind.PARAMS,
    "flops": BudgetKind.FLOPS,
    "size": BudgetKind.SIZE,
    "time": BudgetKind.SPEEDUP,
}
"""By which an attempt asks for a size, by the field `smallest`."""

Recover = Callable[[PruningResult, Any, int], Recovery]
"""Recovers a pruned model, given the data that it was pruned on and the number of its attempt."""

Made = tuple[PruningResult, Recovery | None]


def prune_to_target(
    model: nn.Module,
    calibration: Any,
    request: PruningRequest,
    log: RunLog | None = None,
    ranks: Ranks = ALONE,
    tell: Callable[[str], None] = lambda line: None,
    recover: Recover | None = None,
) -> Made:
    """Find the smallest model within the quality target of a request, as `prune_as_asked` does.

    `recover` is called on the model of each attempt before it is measured; its model is that of the
    result.  Without a log, a temporary one keeps the attempts, whose models are not all in memory.
    """
    if log is None and ranks.first:
        with tempfile.TemporaryDirectory(prefix="osscar-") as place:
            log = RunLog(Path(place) / "run")
            return prune_to_target(model, calibration, request, log, ranks, tell, recover)
    start = time.perf_counter()
    calibration = read_once(model, calibration)
    inputs = as_inputs(model, calibration)
    target = request.quality
    assert target is not None
    if target.kind is TargetKind.TOP1:
        check_labelled(calibration)
    numbers = copies(inputs)
    check_samples(target, len(numbers), int(numbers.max()) + 1)
    parts = in_parts(calibration, numbers, request.seed)
    part = parts.pruned_on
    with (
        profiled() as spent,
        prepare(
            model, calibration, request, pruned_on=part, log=log, ranks=ranks, tell=tell
        ) as prepared,
    ):
        searched, tested = (
            _judge(target, prepared.task, data) for data in (parts.searched, parts.tested)
        )
        search = _Search(target, prepared, searched, tested, part, recover)
        (pruned, recovery), report = search.smallest()
        with timed(Stage.PRUNED):
            likeness = tested.reference.likeness(pruned.model)
    seconds = time.perf_counter() - start
    measure = tested.reference.distance.measure
    scores, same = measure == "nats", measure == pruned.distance.measure
    result = replace(
        pruned,
        model=_model(pruned, recovery),
        target=report,
        distance=pruned.distance.measured(likeness.distance if same else None),
        divergence=likeness.distance if scores else None,
        agreement=likeness.agreement if scores else None,
        held_out=tested.samples,
        request=request,
        calibration=inputs.settings,
        seconds=seconds,
        stages=spent.of(seconds),
    )
    if ranks.first:  # the others save nothing
        result.check_tested()
    return result, recovery


def _model(pruned: PruningResult, recovery: Recovery | None) -> nn.Module:
    """Return the model of an attempt."""
    return pruned.model if recovery is None else recovery.model


def usual_draw(target: QualityTarget) -> int:
    """Return how many calibration samples to draw for a target: four times those of a test."""
    return 4 * usual_samples(target.kind, target.most)


def check_samples(target: QualityTarget, samples: int, different: int) -> None:
    """Refuse too few samples for a test that can pass (DataError)."""
    needed = 4 * fewest_samples(target.kind, target.most)
    if different < needed:
        alike = f" (of {samples}, with copies or windows that overlap)" * (different < samples)
        raise DataError(
            f"{target} needs at least {needed} different calibration samples, for a bound that "
            "holds with 95 % confidence: half to prune on, a quarter to search on, and a quarter "
            f"to test on; there are {different}{alike}, {needed - different} too few"
        )


@timed(Stage.DENSE)
def _judge(target: QualityTarget, task: PruningTask, data: Any) -> Judge:
    """Run the dense model on a part of the data; refuse too few labels, and too low an accuracy."""
    judge = Judge.of(target.kind, task.prepared.model, data, task.request.distance)
    if target.kind is not TargetKind.TOP1:
        return judge
    needed = fewest_samples(target.kind, target.most)
    if judge.samples < needed:
        raise DataError(
            f"{target} takes {needed} different labelled samples in each quarter of the "
            f"calibration data, and one has {judge.samples}; give more, or label them"
        )
    if target.most >= judge.dense_accuracy:
        raise RequestError(
            f"{target} allows a loss of all accuracy: the dense model is right in "
            f"{judge.dense_accuracy:.1%} of {judge.samples} samples; give less"
        )
    return judge


@dataclass(eq=False)
class _Search:
    """The attempts to a target, and the data that they prune on."""

    target: QualityTarget
    prepared: PreparedRun
    searched: Judge
    tested: Judge
    data: Any
    recover: Recover | None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def task(self) -> PruningTask:
        """What the whole run is asked for."""
        return self.prepared.task

    def smallest(self) -> tuple[Made, TargetReport]:
        """Try sizes until none is left to try, test them; return the smallest that passes."""
        ranks, log = self.task.prepared.ranks, self.prepared.log
        if self._kind is BudgetKind.SPEEDUP:
            times = ranks.broadcast("times of operators", self._times)
            self.prepared = replace(self.prepared, task=replace(self.task, times=times))
        self.attempts += ranks.broadcast("attempts", self._known_attempts)
        budget, best = self._known_budget(), dict[int | None, Made | None]()

        def following() -> float | None:
            return next_limit(partial(self._frontier, budget), self.attempts, self.target)

        while (limit := ranks.broadcast("the next size", following)) is not None:
            at = len(self.attempts)
            made, attempt = self._attempt(at + 1, limit, budget)
            self.attempts.append(attempt)
            if log is not None:
                log.write(ATTEMPTS, self.attempts)
            report = self._report(budget)
            self.prepared.tell(f"attempt {at + 1}: {report.searched_in_words(attempt)}")
            budget = (made and made[0].budget) or budget
            best = {n: one for n, one in {**best, at: made}.items() if n == report.chosen}
        report = self._report(budget)
        for line in report.tests_in_words():
            self.prepared.tell(line)
        if report.chosen is None:
            if log is not None:
                log.remove()  # it is of no use to another target
            raise self._failure(report)
        found = best.get(report.chosen)
        if found is None:  # what was chosen since failed, or a run was killed
            number = report.chosen + 1
            found = self._made(number, self.attempts[report.chosen].limit, budget)
            if log is not None:
                log.attempt(number).put_back_tested(_model(*found))
        return found, report

    def _attempt(self, number: int, limit: float, budget: Budget) -> tuple[Made | None, Attempt]:
        """Make a model, and measure it; a size whose model or outputs overflow has no measure."""
        ranks = self.task.prepared.ranks
        try:
            with ranks.alike("an attempt"):
                made = pruned, recovery = self._made(number, limit, budget)
                measure = partial(self._measured, number, _model(pruned, recovery))
                lost = ranks.broadcast("its quality", measure)
        except NonFiniteError:
            return None, Attempt(limit, limit, None)
        assert pruned.budget is not None
        return made, Attempt(limit, pruned.budget.of(self._kind).reached, *lost)

    @timed(Stage.PRUNED)
    def _measured(
        self, number: int, model: nn.Module
    ) -> tuple[Bounded, Bounded | None, str | None]:
        """Measure a model on the samples of the search, and where it is good on those of tests.

        Where it passes, keep its weights on disk; return their digest.
        """
        measured, most = self.searched.measure(model), self.target.most
        if measured.bound > most:
            return measured, None, None
        tested = self.tested.measure(model)
        if tested.bound > most:
            return measured, tested, None
        assert self.prepared.log is not None
        self.prepared.log.attempt(number).keep_tested(model)
        return measured, tested, digest_of_weights(model)

    def _failure(self, report: TargetReport) -> RequestError:
        """Say that no model is within the target, which is nearest, and what would help."""
        known = [one for one in self.attempts if one.measured is not None]
        nearest = min(known, key=lambda one: one.likely(SURE), default=self.attempts[-1])
        said, found = report.searched_in_words(nearest), nearest.measured
        if report.tests:
            said = f"{next(report.tests_in_words())}, though the search held it for good"
            found = self.attempts[report.tests[0][0]].tested
        budgets = self.task.request.budgets
        beside = f" and {self.task.request.in_words(budgets)}" if budgets else ""
        wanted = found and samples_needed(found, self.target.most)
        more = f"give about {4 * wanted:,} samples (samples, `--samples`), " if wanted else ""
        return RequestError(
            f"no model that was tried is within {self.target}{beside}: the nearest, {said}; {more}"
            "allow more to be lost, or recover what is pruned (recover, `--recover`)"
        )

    def _report(self, budget: Budget) -> TargetReport:
        target, limit = self.target, budget.of(self._kind)
        measure, attempts = self.searched.reference.distance.measure, tuple(self.attempts)
        return TargetReport(target.kind, target.most, measure, limit.cost, limit.dense, attempts)

    @property
    def _kind(self) -> BudgetKind:
        """The budget by which an attempt asks for a size."""
        return _BUDGETS[self.task.request.smallest or "params"]

    @cached_property
    def _cost(self) -> CountedCost:
        """What sizes are counted in."""
        if self.task.times is not None:
            return self.task.times
        prepared = self.task.prepared
        return count(COUNTED[self._kind], prepared, self.task.counted)

    @cached_property
    def _largest(self) -> float:
        """The largest size to try: one group, or streams, lose the least."""
        cost, task = self._cost, self.task
        widths = ((name, some[-2]) for name, some in task.options.items() if len(some) > 1)
        fewer = [{**task.keep, name: int(width)} for name, width in widths]
        fewer += (one.keep for one in task.with_streams[1:])
        if not fewer:
            raise RequestError(
                f"{self.target} has nothing to prune: no group that a budget prunes may become "
                "smaller; omit what says what to keep, at_least (`--set at_least`) or skip "
                "(`--skip`)"
            )
        allowed = allowances(task) if task.request.budgets else ()
        own = (one.most for one in allowed if one.budget is self._kind)
        return min([max(map(cost.of, fewer)), *own])

    def _frontier(self, budget: Budget) -> Frontier:
        """Return the least predicted distance at each size, with all channels of streams."""
        task, dense = self.task, self._cost.of(self.task.keep)
        known, found = known_curves(budget), [(0.0, 1.0), (dense, 0.0)]
        losses = {
            name: known[name].losses[some] if name in known else np.zeros(len(some))
            for name, some in task.options.items()
        }
        if losses:  # of streams alone, nothing is predicted
            search = Search(task.options, losses, task.keep, [self._cost])
            found = [*search.frontier()]
        costs, lost = zip(*found, strict=True)
        sizes = [*(cost for cost in costs if cost < self._largest), self._largest]
        return (*zip(sizes, np.interp(sizes, costs, lost).tolist(), strict=True), (dense, 0.0))

    def _request(self, limit: float) -> PruningRequest:
        """Return the request of an attempt: a size in place of the target."""
        match self._kind:
            case BudgetKind.FLOPS:
                value = limit / self._cost.dense
            case BudgetKind.SPEEDUP:
                value = self._cost.dense / limit
            case _:
                value = int(limit)
        asked: dict[str, Any] = dict.fromkeys([*TargetKind, "smallest"])
        return replace(self.task.request, **{**asked, self._kind: value})

    @timed(Stage.ALLOCATION)
    def _times(self) -> CountedCost:
        """Return shares of the dense model's time by widths: those of the log, if it has any."""
        task, log = self.task, self.prepared.log
        noted = None if log is None else log.read(TIMES, CountedCost)
        if noted is not None:
            return noted
        times = as_shares(time_operators(task, clock_of(task)))
        if task.shared and not times.of({**task.keep, **task.least}) < times.of(task.keep):
            raise RequestError(
                "smallest is time, and by the times of its operators the model is no faster with "
                f"fewer units; give {task.request.instead_of_time('flops')}"
            )
        if log is not None:
            log.write(TIMES, times)
        return times

    # ---- what the log has, and makes ---------------------------------------------------------

    def _known_attempts(self) -> list[Attempt]:
        """Return the attempts of the log, on the first rank."""
        log = self.prepared.log
        return (None if log is None else log.read(ATTEMPTS, list[Attempt])) or []

    def _known_budget(self) -> Budget:
        """Return the budget of the last attempt; before the first one, measure the curves."""
        log = self.prepared.log
        done = [number for number, one in enumerate(self.attempts, 1) if one.measured is not None]
        if done:  # which a log has
            last = self.task.prepared.ranks.broadcast(
                "the last budget",
                lambda: None if log is None else log.attempt(done[-1]).read(ALLOCATION, Allocated),
            )
        else:
            others = self.task.keep
            most = self._cost.of(others)
            limit = most - _FIRST * (most - self._cost.of({**others, **self.task.least}))
            request = self._request(min(limit, self._largest))
            quiet = replace(self.prepared, tell=lambda line: None)  # nothing is pruned
            last = widths(quiet, replace(self.task, request=request))
        assert last is not None
        assert last.budget is not None  # or the request would have been refused
        return last.budget

    def _made(self, number: int, limit: float, before: Budget) -> Made:
        """Make the model of an attempt; groups that its log has are not solved again."""
        prepared, request = self.prepared, self._request(limit)
        log = None if prepared.log is None else prepared.log.attempt(number)

        def tell(line: str) -> None:
            prepared.tell(f"attempt {number}: {line}")

        with begun(log, self.task.prepared, request) as committed:
            measuring = partial(measured_curves, before=before)
            attempt = replace(
                prepared, log=log, committed=committed, tell=tell, measuring=measuring
            )
            pruned = prune_prepared(attempt, request)
        return pruned, self.recover and self.recover(pruned, self.data, number)
