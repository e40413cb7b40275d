"""What the budgets of a request allow a model to cost, and what it does cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any

from torch import nn

import graph
from osscar.allocation.budget import Budget, Limit
from osscar.allocation.costs import ROUNDING, Cost, CountedCost, count, weights
from osscar.allocation.serving import serving_memory
from osscar.allocation.task import PruningTask
from osscar.base.errors import EquivalenceError, RequestError
from osscar.base.printable import engineering, share
from osscar.network.operations import count_flops
from osscar.proof.plan import Form, PruningPlan
from osscar.request import BudgetKind, parse_keep, parse_size_kept
from osscar.shrinking.shrink_program import dense_program

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
            proofs = prepared.inputs.proofs(prepared.model, request.seed)
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


def goal(task: PruningTask) -> str:
    """Say what the run is to keep and to remove."""
    prepared, request, keep = task.prepared, task.request, task.keep
    left = {group.name: 0 for group in task.shared}

    def told(budget: BudgetKind | None) -> str:
        asked: Any = None if budget is None else getattr(request, budget)
        match budget:
            case BudgetKind.SPEEDUP:
                by = "" if task.times is None else " by the times of its operators"
                return f"is to be {asked:g} times as fast as the dense model{by}"
            case BudgetKind.FLOPS:
                return f"keeps {share(asked)} of the operations, removes {share(1 - asked)}"
            case BudgetKind.SIZE:
                return f"keeps {asked} of the bytes that the weights take on disk"
            case BudgetKind.MEMORY:
                return f"keeps {asked} of the memory that serving takes"
        cost = count(Cost.PARAMETERS, prepared, task.counted)
        dense, kept = cost.dense, cost.of(keep)
        if budget is BudgetKind.SPARSITY:
            gone = asked * (kept - cost.of({**keep, **left}))
            return (
                f"removes {share(asked)} of the parameters of heads, neurons and channels: "
                f"{engineering(gone)} of the {engineering(dense)} of the model"
            )
        if budget is BudgetKind.PARAMS:
            wanted = parse_keep(asked)
            kept = float(wanted if isinstance(wanted, int) else wanted * Fraction(int(dense)))
        return (
            f"keeps {engineering(kept)} of {engineering(dense)} parameters, removes "
            f"{engineering(dense - kept)}"
        )

    return "; ".join(map(told, request.budgets or (None,)))
