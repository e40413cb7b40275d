"""How many units each coupling group keeps.

What a request says of groups by name or kind is theirs; the others share the budget.  Their cost is
counted, their curves are measured, and one search chooses the widths of least predicted distance
from the dense model.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from osscar.allocation.costs import Cost, CountedCost
from osscar.allocation.limits import (
    Allocated,
    Allowance,
    Budget,
    Limit,
    Measured,
    Width,
    allowances,
)
from osscar.allocation.measured import (
    Curve,
    compared_samples,
    curves_at,
    dense_references,
    measured_curves,
)
from osscar.allocation.search import Chosen, Search, equal_shares
from osscar.allocation.speedup import Kept, Proposal, WholeModels
from osscar.allocation.task import PruningTask, possible_counts, why_frozen
from osscar.allocation.times import time_operators
from osscar.base.errors import NonFiniteError, RequestError
from osscar.base.printable import listed, pluralize
from osscar.base.timing import Stage, timed
from osscar.data.parts import held_out
from osscar.offload.on_disk import put_back, values_of
from osscar.proof.plan import PruningPlan
from osscar.request import AUTO, BudgetKind
from osscar.walk.batch_norm import dense_statistics, renew_statistics, statistics_put_back
from osscar.walk.layer_step import DenseTensors, LayerStep, dense_tensors
from osscar.walk.targets import Target
from osscar.walk.walk import Walk
from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.refit import refit

_PATIENCE = 2
"""Shares of residual channels in a row that may bring no model closer than others, before fewer
are tried no more."""

_SHARES = 128
"""Steps of the share of operations in which a time is looked for."""


@dataclass(frozen=True, eq=False)
class Sharing:
    """The groups of a task that share budgets, by curves, or evenly without any."""

    task: PruningTask
    curves: Mapping[str, Curve] | None = None
    widths: Mapping[str, NDArray[np.int64]] | None = None
    """The widths that they may have, if not those of the task."""

    @property
    def options(self) -> Mapping[str, NDArray[np.int64]]:
        """The widths that each may have, ascending."""
        return self.task.options if self.widths is None else self.widths

    def choose(self, allowed: Sequence[Allowance]) -> Chosen:
        """Return what groups keep so that the model costs at most what is allowed, or the least."""
        costs, limits = [one.cost for one in allowed], [one.most for one in allowed]
        if self.curves is None:
            return Chosen(equal_shares(self.options, self.task.keep, costs, limits))
        losses = {name: self.curves[name].losses[some] for name, some in self.options.items()}
        return Search(self.options, losses, self.task.keep, costs).choose(limits)

    def lost(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Return the distance that each group is predicted to cause; none without curves."""
        curves = self.curves or {}
        return {n: float(curves[n].losses[kept[n]]) for n in self.options if n in curves}

    def budget(self, allowed: Sequence[Allowance], chosen: Chosen) -> Budget:
        """Report on a choice, with a prediction where there are curves."""
        kept, lost = {**self.task.keep, **chosen.kept}, self.lost(chosen.kept)
        curves = {name: (self.curves or {})[name] for name in lost}
        limits = [
            Limit(a.budget, a.kind, a.most, a.dense, a.cost.of(kept), a.cost.assumed)
            for a in allowed
        ]
        limits.sort(key=lambda one: one.reached / one.limit, reverse=True)
        return Budget(
            tuple(limits),
            None if self.curves is None else sum(lost.values()),
            chosen.bound,
            curves={
                name: tuple(curve.losses.tolist())
                for name, curve in curves.items()
                if len(self.options[name]) > 1
            },
            measured={
                name: tuple(Measured(*point) for point in sorted(curve.measured.items()))
                for name, curve in curves.items()
                if curve.measured
            },
            widths={
                g.name: Width(
                    *(str(g.kind), g.units, kept.get(g.name, g.units), lost.get(g.name)),
                    least=self.task.narrowest.get(g.name),
                )
                for g in self.task.groups
                if g in self.task.shared or g in self.task.streams
            },
        )


Choosing = Callable[[Mapping[str, Curve] | None], Mapping[str, int]]
"""Returns what groups keep by some curves, or in equal shares without any."""

Measuring = Callable[[PruningTask, Choosing], Mapping[str, Curve]]
"""Returns the curves of a task, as `measured_curves` does."""


def allocate(
    task: PruningTask,
    measuring: Measuring | None = None,
    within_reach: Callable[[Sequence[Allowance]], None] = lambda allowed: None,
) -> Allocated:
    """Decide how many units each group keeps, on the first rank for all.

    `measuring` tells where curves come from, by default from `measured_curves`; `within_reach` is
    called before with what the budgets allow, once the least widths are known to meet it.

    A `RequestError` is raised if the request makes no sense for these groups, a budget cannot be
    met, or nothing would be removed; a `NonFiniteError` if a group pruned alone overflows.
    """
    request, keep, budget = task.request, task.keep, None
    if request.has_budget and (task.shared or task.streams):
        budget = _shared_out(task, measuring, within_reach)
        keep = {**keep, **{name: width.kept for name, width in budget.widths.items()}}
    elif request.has_budget and keep:
        raise RequestError(
            f"{request.in_words(request.budgets)} has nothing to prune: other options say what to "
            "keep of every group that a budget prunes; omit one of these, or the budget"
        )
    keep = {g.name: keep[g.name] for g in task.groups if keep.get(g.name, g.units) < g.units}
    if not keep:
        raise RequestError(_why_nothing(task))
    if budget is None:
        within_reach(())
    return Allocated(keep, budget)


def measured_once(tasks: Sequence[PruningTask]) -> Measuring | None:
    """Measure curves once for several tasks of one model, which keep different shares of it.

    They are measured at about the widths of equal shares of each; None where one task at most has
    any use for curves.
    """
    every = [task for task in tasks if task.measures_curves and task.shared]
    if len(every) < 2:
        return None
    ranks = every[0].prepared.ranks

    def equal(task: PruningTask) -> dict[str, int]:
        allowed = allowances(task)
        return Sharing(_within_reach(task, allowed)[0]).choose(allowed).kept

    choices = [ranks.broadcast("widths", partial(equal, task)) for task in every]
    found = curves_at(every[0], choices, {})
    return lambda task, choose: found


def _shared_out(
    task: PruningTask,
    measuring: Measuring | None,
    within_reach: Callable[[Sequence[Allowance]], None],
) -> Budget:
    """Choose the widths of the groups that share a budget, and say what that comes to."""
    request, ranks = task.request, task.prepared.ranks
    allowed = ranks.broadcast("budgets", lambda: allowances(task))
    tasks, least = task.with_streams, {**task.with_streams[-1].keep, **task.least}
    for one in allowed:
        if not one.holds(least):
            reached = one.cost.of(least)
            program = "" if one.dense == one.cost.dense else ", as an exported program,"
            raise RequestError(
                f"{request.in_words([one.budget])} cannot be met: it allows {one.most:,.0f} "
                f"{one.kind}, and at least {reached:,.0f}{program} of "
                f"{one.dense:,.0f} stay ({reached / one.dense:.3f} of the dense model's); "
                f"remove less{_more_to_prune(task, least, one.budget)}"
            )
    within_reach(allowed)
    by_time, models = request.speedup and task.times is None, WholeModels.shared(tasks[-1])
    if by_time:
        ranks.broadcast("the fastest model", models.check_reach)
    else:
        tasks = _within_reach(task, allowed)

    def choose(curves: Mapping[str, Curve] | None) -> Mapping[str, int]:
        one = Sharing(tasks[0], curves)
        return ranks.broadcast("widths", lambda: one.choose(allowed).kept)

    sharing = Sharing(task)
    if request.allocation != "uniform" and task.shared:
        sharing = Sharing(task, (measuring or measured_curves)(task, choose))
    sharings = [replace(sharing, task=one) for one in tasks]
    if by_time:
        return _timed(sharings, models, allowed)
    choices = ((s, ranks.broadcast("widths", partial(s.choose, allowed))) for s in sharings)
    best = _closest(choices, _on_trial if task.streams else lambda *_: 0.0)
    assert best is not None  # the least widths are within
    return _told(best, allowed)


def _within_reach(task: PruningTask, allowed: Sequence[Allowance]) -> list[PruningTask]:
    """Return the task for each share of residual channels with which the budgets can be met."""
    tasks = task.with_streams
    found = [t for t in tasks if all(one.holds({**t.keep, **t.least}) for one in allowed)]
    return found or tasks[-1:]


class _Candidate(NamedTuple):
    """Widths, and how far a model of them is from the dense one."""

    sharing: Sharing
    chosen: Chosen
    distance: float


def _closest(
    candidates: Iterable[tuple[Sharing, Chosen]],
    distance: Callable[[Sharing, Chosen], float],
    best: _Candidate | None = None,
) -> _Candidate | None:
    """Return the candidate of least distance, or the `best` before if none is closer.

    What follows several in a row that are no closer is not looked at.
    """
    worse = 0
    for sharing, chosen in candidates:
        found = _Candidate(sharing, chosen, distance(sharing, chosen))
        worse += 1
        if best is None or found.distance < best.distance:
            best, worse = found, 0
        if worse == _PATIENCE:
            break
    return best


def _on_trial(sharing: Sharing, chosen: Chosen) -> float:
    """Return the distance of the model that is pruned on trial."""
    return whole_distance(sharing.task, {**sharing.task.keep, **chosen.kept})


def _told(best: _Candidate, allowed: Sequence[Allowance]) -> Budget:
    """Report on a candidate, on the first rank for all."""
    ranks, on_trial = best.sharing.task.prepared.ranks, best.sharing.task.streams
    told = partial(best.sharing.budget, allowed, best.chosen)
    budget = ranks.broadcast("budgets that are shared out", told)
    return replace(budget, on_trial=best.distance if on_trial else None)


def _timed(
    sharings: Sequence[Sharing], models: WholeModels, allowed: Sequence[Allowance]
) -> Budget:
    """Choose widths whose model was timed to be as fast as wanted, within all other limits.

    The table of times proposes widths for each share of residual channels; the operations do for
    the best of these.
    """
    task, curves = sharings[0].task, sharings[0].curves
    ranks = task.prepared.ranks
    (operations,) = (one for one in allowed if one.budget is BudgetKind.SPEEDUP)
    table = ranks.broadcast("times of operators", lambda: time_operators(task, models.clock))

    def kept_of(sharing: Sharing, cost: CountedCost, share: float) -> Kept:
        limit = replace(operations, cost=cost, most=share * cost.dense)
        chosen = sharing.choose([limit if one is operations else one for one in allowed])
        return {**sharing.task.keep, **chosen.kept}

    def expected(kept: Kept) -> float:
        return table.of(kept) / table.dense

    def by_operations(sharing: Sharing) -> Proposal:
        at = cache(lambda step: kept_of(sharing, operations.cost, step / _SHARES))
        steps = range(1, _SHARES + 1)
        return lambda share: at(bisect(steps, share, key=lambda n: expected(at(n))) or 1)

    def fitting(
        proposals: Iterable[tuple[Sharing, Proposal]], most: int
    ) -> Iterator[tuple[Sharing, Chosen]]:
        for sharing, within in proposals:
            fitted = partial(models.fitted, within, expected, most)
            kept = ranks.broadcast("a model that is fast enough", fitted)
            if kept is not None:
                yield sharing, Chosen({name: kept[name] for name in sharing.options})

    def distance(sharing: Sharing, chosen: Chosen) -> float:
        # Of residual streams, sums of curves say little.
        lost = sharing.lost(chosen.kept).values()
        return _on_trial(sharing, chosen) if task.streams else sum(lost)

    stairs = replace(task, times=table).options
    tables = [replace(sharing, widths=stairs) for sharing in sharings]
    by_times = [(one, partial(kept_of, one, table)) for one in tables]
    best = _closest(fitting(by_times, 6), distance)
    if curves is not None:
        first = sharings[0] if best is None else replace(best.sharing, widths=None)
        any_width = replace(task.widths, round_to=1)
        anyhow = {group.name: task.possible(group, any_width) for group in task.shared}
        auto = task.widths.round_to == AUTO
        others = [replace(first, widths=anyhow), first] if auto else [first]
        best = _closest(fitting(((one, by_operations(one)) for one in others), 2), distance, best)
    if best is None:  # the table goes on between what was timed
        best = _closest(fitting(by_times[:1], 12), distance)
    if best is None:
        ranks.broadcast("no model is fast enough", models.refuse)
    assert best is not None
    # A bound, and what other limits come to, would be of operations, and say nothing of times.
    budget, kept = _told(best, allowed), {**best.sharing.task.keep, **best.chosen.kept}
    reached = ranks.broadcast("its time", lambda: 1 / models.speedup(kept))
    wanted = 1 / models.wanted
    timed = Limit(BudgetKind.SPEEDUP, Cost.TIME, wanted, 1.0, reached, assumed=table.assumed)
    rest = (one for one in budget.limits if one.budget is not BudgetKind.SPEEDUP)
    return replace(budget, limits=(timed, *rest))


# ---- why not -----------------------------------------------------------------------------


def _more_to_prune(task: PruningTask, least: Mapping[str, int], budget: BudgetKind) -> str:
    """Advise to prune the units that a budget cannot take by itself, if the model has some."""
    streams = [g for g in task.groups if g.name in task.prepared.residual - least.keys()]
    counted = budget not in (BudgetKind.FLOPS, BudgetKind.SPEEDUP)
    experts = [one.group for one in task.prepared.experts if counted and not task.request.routed]
    more = {"residual channels (`--residual`)": streams, "experts (`--experts`)": experts}
    some = [kind for kind, groups in more.items() if any(g.prunable for g in groups)]
    return f", or prune {' and '.join(some)}, too" if some else ""


def _why_nothing(task: PruningTask) -> str:
    """Say why no group loses a unit."""
    every, request = task.prepared.groups, task.request
    others = [group for group in task.groups if group.prunable and group.units > 1]
    if request.has_budget and others and not (task.shared or task.streams or task.keep):
        told = [f"{one.name!r} ({pluralize(one.units, 'unit')})" for one in others]
        return (
            "a budget prunes heads, neurons and channels, and there are none; other groups can be "
            f"pruned, {listed(told)}: say what to keep of them, by residual (`--residual 0.5`) or "
            f"groups={{{others[0].name!r}: 0.5}} in Python"
        )
    skipped = sum(group not in task.groups for group in every)
    rest = f" but the {skipped} that are skipped" if skipped else ""
    routed = [group for group in task.groups if group.kind.routed and group.prunable]
    return why_frozen(every) or (
        f"nothing would be removed: every group{rest} keeps all its units; ask for "
        f"{'a higher sparsity' if request.sparsity else 'more to be removed'}"
        f"{', or skip less' if request.skip else ''}"
        + "".join(f"; of the {g.units} of {g.name!r}, {possible_counts(g)}" for g in routed[:1])
    )


# ---- whole models ------------------------------------------------------------------------


@timed(Stage.MEASURED)
def whole_distance(task: PruningTask, keep: Mapping[str, int]) -> float:
    """Return the distance of the model with groups pruned in turn; infinite if it overflows.

    Curves add up what groups lose alone, and later refits make up for what earlier groups lose.
    They cannot for channels of residual streams, since nobody makes these any more.  So for each
    share of these channels that all streams may keep, all groups are pruned in turn, as a run does,
    on all samples but those on which outputs are compared, and put back.  On a quarter of the
    samples, as for a curve, models with whole streams come out too far: they have more weights to
    fit.

    All ranks take part.  Units that are routed stay.  Statistics of batch norms are corrected if
    the request says so.
    """
    prepared, request = task.prepared, task.request
    model, ranks = prepared.model, prepared.ranks
    compared = compared_samples(prepared)
    fitted = prepared.inputs.part(0, prepared.inputs.samples - compared)
    few = dataclasses.replace(prepared, inputs=fitted)
    groups = [g for g in task.groups if keep.get(g.name, g.units) < g.units and not g.kind.routed]
    reference, _ = dense_references(prepared, compared, request.distance)
    corrected = request.batch_norm == "correct"
    statistics = dense_statistics(model, few.batches(), ranks) if corrected else None
    dense: dict[str, DenseTensors] = {}
    target = Target(request.target)
    try:
        with (
            ranks.alike("the model that is pruned on trial"),
            torch.no_grad(),
            statistics_put_back(model),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
            for step in Walk(
                few, groups, target=target, held_out=few.inputs.last(held_out(fitted.samples))
            ):
                dense = dense_tensors(step.consumers) | dense
                pruned = partial(_pruned, step, keep[step.group.name], task)
                written = ranks.broadcast("a group that is pruned on trial", pruned)
                if not step.committed:
                    step.adopt(written)
            renew_statistics(model, PruningPlan(()), few.batches(), statistics, ranks)
            return reference.divergence(model)
    except NonFiniteError:
        return math.inf
    finally:
        for group in groups:
            for one in prepared.linear_maps(group):
                if one.holder in dense:
                    put_back(one.module, dense[one.holder])
        torch.clear_autocast_cache()


def _pruned(step: LayerStep, keep: int, task: PruningTask) -> tuple[Tensor, ...]:
    """Remove units one by one, and commit the refit; return what other ranks are to adopt."""
    request = task.request
    weight = request.correction_weight if Target(request.target).needs_dense else 0.0
    damp, step.correction_weight = step.regularization(keep, request.damp, weight)
    problem = step.problem(keep, damp)
    kept = support_after(eliminate(problem, problem.units - keep), problem)
    refits = step.refits(refit(problem, kept)[0], kept.tolist())
    step.commit(refits.weights, kept.tolist())
    if task.prepared.ranks.alone:
        return ()
    return tuple(values_of(one).cpu() for consumer in step.consumers for one in consumer.read())
