"""What a request keeps of a model and removes, in numbers, before anything is measured."""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction

from osscar.allocation.costs import Cost, count
from osscar.allocation.widths import asked_groups
from osscar.base.printable import engineering, share
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest, parse_keep


def goal(prepared: Prepared, request: PruningRequest, left: Collection[str]) -> str:
    """Say what is kept and what is removed, in parameters where the request tells.

    Groups that are `left` cannot follow, and keep all their units.
    """
    _, keep, shared = asked_groups(prepared, request, left)
    if request.speedup is not None:
        return f"is to be {request.speedup:g} times as fast as the dense model"
    if request.flops is not None:
        return f"keeps {share(request.flops)} of the operations, removes {share(1 - request.flops)}"
    if request.size is not None:
        return f"keeps {request.size} of the bytes that the weights take on disk"
    leaving = {*keep, *(group.name for group in shared)}
    cost = count(Cost.PARAMETERS, prepared.model, prepared.groups_with(leaving), prepared.sample)
    kept = cost.of(keep)
    if request.sparsity is not None:
        kept -= request.sparsity * (kept - cost.of({**keep, **{one.name: 0 for one in shared}}))
    elif request.params is not None:
        asked = parse_keep(request.params)
        kept = float(asked if isinstance(asked, int) else asked * Fraction(int(cost.dense)))
    return (
        f"keeps {engineering(kept)} of {engineering(cost.dense)} parameters, removes "
        f"{engineering(cost.dense - kept)}"
    )
