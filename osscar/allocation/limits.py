"""The budgets of a request: what they allow a model to cost, and what they came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from typing import Any

from pydantic import with_config
from torch import nn

import graph
from osscar.allocation.costs import ROUNDING, Cost, CountedCost, count, weights
from osscar.allocation.serving import serving_memory
from osscar.allocation.task import PruningTask, SkippedGroup
from osscar.base.errors import EquivalenceError, RequestError
from osscar.base.json_files import STRICT
from osscar.base.printable import engineering, share
from osscar.network.operations import count_flops
from osscar.proof.plan import Form, PruningPlan
from osscar.request import BudgetKind, parse_keep, parse_size_kept
from osscar.shrinking.shrink_program import dense_program

_ROUNDING = 1e-9


@with_config(STRICT)
@dataclass(frozen=True)
class Width:
    """What a group that shares a budget keeps.

    kept: How many of its `units` stay.
    predicted: Its part of the predicted distance.
    least: The fewest units that its code takes, where budgets could choose fewer.
    """

    kind: str
    units: int
    kept: int
    predicted: float | None = None
    least: int | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class Measured:
    """How far outputs moved with one group alone pruned to so many units."""

    kept: int
    distance: float


@with_config(STRICT)
@dataclass(frozen=True)
class Limit:
    """What one budget of a request allows the whole model, and what that came to."""

    budget: BudgetKind
    """The option."""
    cost: Cost
    """What is counted."""
    limit: float
    """What the whole model may cost."""
    dense: float
    """What the dense model costs; bytes are those of its modules, also of a program."""
    reached: float
    """What the smaller model costs."""
    assumed: str = ""
    """What was taken for granted where costs were counted, in words."""


@with_config(STRICT)
@dataclass(frozen=True)
class Budget:
    """What the groups that share one or several budgets came to."""

    limits: tuple[Limit, ...]
    """One for each budget, all of which hold; the one of which most is used comes first."""
    predicted: float | None = None
    """The distance of the pruned model from the dense one that the curves of the groups add up to,
    which know nothing of residual streams; None with equal shares."""
    lower_bound: float | None = None
    """No choice of widths within all limits, beside these residual channels, has a smaller
    prediction; None where nothing is predicted, or costs of too many groups multiply for a proof.
    """
    on_trial: float | None = None
    """The distance of the model that was pruned on trial to these widths; None where residual
    streams had no choice."""
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    """The distance that each group that had a choice causes alone, over the units kept."""
    widths: dict[str, Width] = field(default_factory=dict, repr=False)
    """What each group keeps, in the order of the model."""
    measured: dict[str, tuple[Measured, ...]] = field(default_factory=dict, repr=False)
    """By group, the widths at which its curve was measured."""

    def of(self, budget: BudgetKind) -> Limit:
        """Return the limit of one budget that was given."""
        return next(limit for limit in self.limits if limit.budget == budget)

    @property
    def gap(self) -> float | None:
        """How far the prediction can be above the least one within the limits, relative to it."""
        if self.predicted is None or self.lower_bound is None:
            return None
        above = self.predicted - self.lower_bound
        return 0.0 if above <= _ROUNDING * self.predicted else above / self.predicted

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data, with its gap, and without its curves."""
        told = {**dataclasses.asdict(self), "gap": self.gap}
        return {name: value for name, value in told.items() if name != "curves"}


@dataclass(frozen=True)
class Allocated:
    """How many units groups keep, only those that lose some, and the budgets that some share."""

    keep: Mapping[str, int]
    budget: Budget | None = None
    skipped: tuple[SkippedGroup, ...] = ()
    """Groups that were given fewer units than their code takes, as was seen then: they keep all."""


# ---- what they allow ---------------------------------------------------------------------


COUNTED = {
    BudgetKind.SPARSITY: Cost.PARAMETERS,
    BudgetKind.PARAMS: Cost.PARAMETERS,
    BudgetKind.SIZE: Cost.BYTES,
    BudgetKind.MEMORY: Cost.MEMORY,
    BudgetKind.FLOPS: Cost.FLOPS,
    BudgetKind.SPEEDUP: Cost.FLOPS,
}
"""What each budget is counted in; a speed-up is looked for among models of fewer operations, unless
its task has times."""


@dataclass(frozen=True, eq=False)
class Allowance:
    """What one budget allows; `dense` is what is told of the dense model."""

    budget: BudgetKind
    kind: Cost
    cost: CountedCost
    most: float
    dense: float

    def holds(self, kept: Mapping[str, float]) -> bool:
        """Whether the model costs at most so much where groups keep so many units."""
        return self.cost.of(kept) <= self.most * (1 + ROUNDING)


def allowances(task: PruningTask) -> list[Allowance]:
    """Count what the model costs, and read what it may: one allowance for each budget.

    A `RequestError` is raised if no budget asks for less than there is, or the model keeps nothing
    that memory counts.
    """
    prepared, request, form = task.prepared, task.request, task.form
    others, least, groups = task.keep, task.least, task.counted

    @cache
    def counted(kind: Cost, form: Form) -> CountedCost:
        if kind is Cost.TIME:
            assert task.times is not None
            return task.times
        if kind is Cost.MEMORY:
            assert request.context is not None
            return serving_memory(
                counted(Cost.BYTES, form),
                *(prepared.model, prepared.traced, groups, prepared.sample),
                *(request.context, request.batch),
            )
        program = None
        if form is Form.EXPORTED:
            proofs = prepared.inputs.proofs(request.seed)
            program = dense_program(prepared.model, proofs, prepared.example)
        return count(kind, prepared, groups, program)

    found = []
    for budget in request.budgets:
        by_time = budget is BudgetKind.SPEEDUP and task.times is not None
        kind, asked = Cost.TIME if by_time else COUNTED[budget], getattr(request, budget)
        dense = counted(kind, Form.EAGER).dense  # a share is of what one has: the modules' file
        cost = counted(kind, form if kind is Cost.BYTES else Form.EAGER)
        match budget:
            case BudgetKind.SPARSITY:  # of the parameters that the shared groups own, not streams
                all_gone = cost.of(
                    {**others, **dict.fromkeys(least or [g.name for g in task.streams], 0)}
                )
                most = all_gone + (1 - asked) * (cost.of(others) - all_gone)
            case BudgetKind.FLOPS:
                most = asked * dense
            case BudgetKind.SPEEDUP:  # where the search begins; the least is yet to be timed
                most = max(dense / asked, cost.of({**others, **least}))
            case _:
                kept = parse_keep(asked) if budget is BudgetKind.PARAMS else parse_size_kept(asked)
                most = float(kept if isinstance(kept, int) else kept * Fraction(int(dense)))
        found.append(Allowance(budget, kind, cost, most, dense))
    if all(one.most >= one.cost.dense for one in found):
        has = f"the {'model' if form is Form.EAGER else 'exported program'} has"
        told = (f"{one.most:,.0f} {one.kind}, and {has} {one.cost.dense:,.0f}" for one in found)
        raise RequestError(
            f"{request.in_words(request.budgets)} removes nothing: it allows {'; '.join(told)}; "
            "keep less"
        )
    return found


def counted_again(
    task: PruningTask, budget: Budget, plan: PruningPlan, smaller: nn.Module
) -> Budget:
    """Compare what a budget came to with what the smaller model costs by itself.

    It may take fewer operations: products with a single column, for one, may be computed by
    element, and are not counted.  Where experts leave, tokens are sent to others, and operations
    are not compared.

    An `EquivalenceError` is raised where the model has more than the budget says.
    """
    nothing, sample, request = graph.DependencyGraph((), ()), task.prepared.sample, task.request

    def again(limit: Limit) -> float:
        match limit.cost:
            case Cost.TIME:
                return limit.reached
            case Cost.FLOPS:
                routed = any(group.kind.routed for group in plan.groups)
                return limit.reached if routed else float(count_flops(smaller, sample))
            case Cost.MEMORY:
                size = weights(Cost.BYTES, smaller, nothing, ())
                assert request.context is not None
                serving = request.context, request.batch
                return serving_memory(size, smaller, nothing, (), sample, *serving).dense
        return weights(limit.cost, smaller, nothing, ()).dense

    limits = tuple(replace(limit, reached=again(limit)) for limit in budget.limits)
    for before, after in zip(budget.limits, limits, strict=True):
        exact = after.cost is not Cost.FLOPS and after.reached != before.reached
        if exact or after.reached > before.reached * (1 + ROUNDING):
            raise EquivalenceError(
                f"the smaller model has {after.reached:,.0f} {after.cost}, and "
                f"{before.reached:,.0f} were counted for {request.in_words([after.budget])}; give "
                "widths in place of a budget (heads, neurons, channels), and report the model"
            )
    return replace(budget, limits=limits)


def goal(task: PruningTask, allowed: Sequence[Allowance]) -> str:
    """Say what the run is to keep and to remove."""

    def told(kept: float, dense: float, kind: Cost) -> str:
        mine, of, gone = map(engineering, (kept, dense, dense - kept))
        return f"keeps {mine} of {of} {kind}, removes {gone}"

    removed = [
        f"sparsity {task.request.sparsity:g} removes {_removed(task, one)}"
        for one in allowed
        if one.budget is BudgetKind.SPARSITY
    ]
    found = removed + [
        told(min(one.most, one.dense), one.dense, one.kind)
        for one in allowed
        if one.budget is not BudgetKind.SPEEDUP
    ]
    if not allowed:
        cost = count(Cost.PARAMETERS, task.prepared, task.counted)
        found = [told(cost.of(task.keep), cost.dense, Cost.PARAMETERS)]
    elif task.request.speedup is not None:
        by = "" if task.times is None else " by the times of its operators"
        found.append(f"is to be {task.request.speedup:g} times as fast as the dense model{by}")
    return "; ".join(found)


def _removed(task: PruningTask, sparsity: Allowance) -> str:
    """Return what a sparsity is a share of, and which share of the whole model that is."""
    shared = {group.kind for group in task.shared}
    *others, last = [kind for kind in task.request.shared_kinds if kind in shared] or [
        "residual channels"
    ]
    kinds = f"{', '.join(others)} and {last}" if others else last
    asked, whole = task.request.sparsity or 0, 1 - sparsity.most / sparsity.dense
    return f"{share(asked)} of the parameters of {kinds}, {share(whole)} of all parameters"
