"""Allocate the units that each group keeps, or read them from the log of a run that goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fractions import Fraction

from osscar.allocation.allocate import allocate
from osscar.allocation.budget import Allocated, Budget
from osscar.allocation.costs import Cost, count
from osscar.allocation.measured import known_curves
from osscar.allocation.widths import asked_groups
from osscar.base.errors import RequestError
from osscar.base.printable import engineering, share
from osscar.base.timing import Stage, timed
from osscar.preparation.prepare import Prepared
from osscar.request import BudgetKind, PruningRequest, parse_keep
from osscar.run.feasibility import Feasible, in_words
from osscar.run.run_log import RunLog


@timed(Stage.ALLOCATION)
def widths(
    prepared: Prepared,
    request: PruningRequest,
    feasible: Feasible,
    log: RunLog | None,
    tell: Callable[[str], None],
    before: Budget | None = None,
) -> Allocated:
    """Allocate the units that groups keep, unless the log has them; curves of `before` count."""
    noted: Allocated | None = prepared.ranks.broadcast(
        "what was allocated", lambda: None if log is None else log.allocation()
    )
    if noted is not None:
        return noted
    known = {} if before is None else known_curves(before)
    try:
        tell(goal(prepared, request, feasible.skipped_names))
        found = allocate(prepared, request, feasible.skipped_names, feasible.form, known=known)
    except RequestError as error:
        also = f"; {in_words(feasible.skipped)}" if feasible.skipped else ""
        raise type(error)(f"{error}{also}") from error
    if log is not None:
        log.note_allocation(found)
    return found


def goal(prepared: Prepared, request: PruningRequest, skipped: Collection[str]) -> str:
    """Say what the run is to keep and to remove."""
    _, keep, shared = asked_groups(prepared, request, skipped)
    leaving = {*keep, *(group.name for group in shared)}

    def of_parameters(budget: BudgetKind | None) -> str:
        groups = prepared.groups_with(leaving)
        cost = count(Cost.PARAMETERS, prepared.model, groups, prepared.sample)
        kept = cost.of(keep)
        if budget is BudgetKind.SPARSITY and request.sparsity is not None:
            kept -= request.sparsity * (kept - cost.of({**keep, **{one.name: 0 for one in shared}}))
        elif budget is BudgetKind.PARAMS and request.params is not None:
            asked = parse_keep(request.params)
            kept = float(asked if isinstance(asked, int) else asked * Fraction(int(cost.dense)))
        return (
            f"keeps {engineering(kept)} of {engineering(cost.dense)} parameters, removes "
            f"{engineering(cost.dense - kept)}"
        )

    def told(budget: BudgetKind) -> str:
        asked = getattr(request, budget)
        match budget:
            case BudgetKind.SPEEDUP:
                return f"is to be {asked:g} times as fast as the dense model"
            case BudgetKind.FLOPS:
                return f"keeps {share(asked)} of the operations, removes {share(1 - asked)}"
            case BudgetKind.SIZE:
                return f"keeps {asked} of the bytes that the weights take on disk"
            case BudgetKind.MEMORY:
                return f"keeps {asked} of the memory that serving takes"
        return of_parameters(budget)

    return "; ".join(map(told, request.budgets)) or of_parameters(None)
