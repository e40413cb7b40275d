"""What the budgets of a request allow a model to cost, and what it does cost."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from osscar.allocation.costs import Cost, CountedCost, count
from osscar.allocation.serving import serving_memory
from osscar.allocation.task import PruningTask
from osscar.base.errors import RequestError
from osscar.proof.plan import Form
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
"""What each budget is counted in; a speed-up is looked for among models of fewer operations."""


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
    prepared, request, form = task.prepared, task.request, task.feasible.form
    others, least, groups = task.keep, task.least, task.counted

    @cache
    def counted(kind: Cost, form: Form) -> CountedCost:
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
        kind, asked = COUNTED[budget], getattr(request, budget)
        dense = counted(kind, Form.EAGER).dense  # a share is of what one has: the modules' file
        cost = counted(kind, form if kind is Cost.BYTES else Form.EAGER)
        match budget:
            case BudgetKind.SPARSITY:  # of the parameters that the shared groups own
                all_gone = cost.of({**others, **dict.fromkeys(least, 0)})
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
