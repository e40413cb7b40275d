"""How many units each coupling group keeps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from graph import CouplingGroup
from osscar.allocation.budget import Allocated, Budget
from osscar.allocation.costs import ROUNDING, Cost, CostModel, count
from osscar.allocation.curves import Curve, measure_curves, told_curves
from osscar.allocation.fluctuation import measure_fluctuations
from osscar.allocation.latency import Latency, aimed
from osscar.allocation.rules import ByCurves, ByScores, Rule, Uniform
from osscar.allocation.widths import (
    about_half,
    asked_groups,
    why_frozen,
    why_out_of_reach,
)
from osscar.base.errors import RequestError
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest, parse_keep, parse_size_kept
from osscar.shrinking.plan import Form
from osscar.shrinking.program.shrink_program import dense_program


def allocate(
    prepared: Prepared,
    request: PruningRequest,
    curves: Mapping[str, Curve] | None = None,
    left: Collection[str] = (),
    form: Form = Form.MODULE,
) -> Allocated:
    """Decide how many units each group keeps.

    Parameters
    ----------
    prepared
        The dense model with its data.
    request
        What the user asked for.
    curves
        Those of all groups that share a budget, where they are known; else they are measured.
    left
        Names of groups that keep all their units, since they cannot follow; no budget counts them.
    form
        What becomes smaller, and is saved: modules, or the program.

    Raises
    ------
    RequestError
        If a count exceeds what exists, a fraction keeps nothing, a named group does not exist, a
        pattern to skip matches none, a budget cannot be met, or in the end nothing would be
        removed.
    FrozenGroupError
        If what was asked for is frozen everywhere, or a frozen group was named.
    NonFiniteError
        If the gradients that a budget needs are not finite.
    """
    groups, keep, shared = asked_groups(prepared, request, left)
    budget = None
    if request.has_budget and not shared and (keep or not (request.skip or left)):
        raise RequestError(why_out_of_reach(groups, request, prepared.residual))
    if request.has_budget and shared:
        rule: Rule
        match request.allocation:
            case "uniform":
                rule = Uniform(shared, request.widths, keep)
            case "fluctuation":
                scores = measure_fluctuations(prepared, shared)
                rule = ByScores(shared, scores, request.widths, keep)
            case _:
                known = shared_curves(prepared, request, left) if curves is None else curves
                rule = ByCurves.of(shared, request, keep, known)
        found, budget = _met(prepared, request, shared, rule, keep, form)
        keep = {**keep, **found}
    keep = {g.name: keep[g.name] for g in groups if keep.get(g.name, g.units) < g.units}
    if not keep:
        skipped = len(prepared.groups) - len(groups)
        rest = f" but the {skipped} that are skipped or left alone" if skipped else ""
        raise RequestError(
            why_frozen(prepared.groups)
            or f"nothing would be removed: every group{rest} keeps all its units; ask for "
            f"{'a higher sparsity' if request.sparsity else 'more to be removed'}"
            f"{', or skip less' if request.skip else ''}"
        )
    return Allocated(keep, budget)


def shared_curves(
    prepared: Prepared, request: PruningRequest, left: Collection[str] = ()
) -> dict[str, Curve]:
    """Measure the curves of all groups that share a request's budget, however large that is.

    Ranks share out the groups, not the few samples: each curve is the same to the bit as if one
    process had measured them all.

    Parameters
    ----------
    prepared, request, left
        As `allocate` takes them.

    Raises
    ------
    RequestError, FrozenGroupError, NonFiniteError
        As `allocate` does.
    """
    _, _, shared = asked_groups(prepared, request, left)
    mine = prepared.ranks.share([group.units * group.removable for group in shared])
    own = [shared[i] for i in mine]
    found = measure_curves(prepared, own, damp=request.damp, seed=request.seed)
    curves = told_curves(prepared.ranks, list(found))
    return {group.name: curves[group.name] for group in shared}


def provisional(prepared: Prepared, request: PruningRequest) -> dict[str, int]:
    """Return what groups may come to keep, before anything is measured.

    It is what the request says of them where it does; about half of those that share a budget.

    Raises
    ------
    RequestError, FrozenGroupError
        As `allocate` does.
    """
    _, keep, shared = asked_groups(prepared, request)
    if not request.has_budget:
        return keep
    before: Counter[int] = Counter()
    for group in shared:
        keep[group.name] = about_half(group, request.widths, before[group.units] % 2)
        before[group.units] += 1
    return keep


def _met(
    prepared: Prepared,
    request: PruningRequest,
    shared: Sequence[CouplingGroup],
    rule: Rule,
    keep: Mapping[str, int],
    form: Form,
) -> tuple[dict[str, int], Budget]:
    """Choose what groups keep within what was asked for."""
    asked = request.budget_in_words
    if request.speedup is not None:
        latency = Latency(prepared, shared, keep, request.widths)
        table = latency.table
        found, speedup = aimed(
            latency,
            request.speedup,
            lambda limit: _checked(rule, Cost.TIME, table, limit, keep, asked),
        )
        budget = rule.budget(Cost.TIME, table, table.of(found), found)
        # The bound is of modelled times, and says nothing of those that are measured.
        limit, reached = 1 / request.speedup, 1 / speedup
        return found, dataclasses.replace(budget, limit=limit, reached=reached, lower_bound=None)
    kind = Cost.PARAMETERS
    if request.flops is not None:
        kind = Cost.FLOPS
    elif request.size is not None:
        kind = Cost.BYTES
    cost = count(kind, prepared.model, prepared.groups, prepared.sample)
    dense = cost.dense
    if kind is Cost.BYTES and form is Form.GRAPH:  # a share is of what one has: the modules' file
        proofs = prepared.inputs.proofs(prepared.model, request.seed)
        program = dense_program(prepared.model, proofs, prepared.example)
        cost = count(kind, prepared.model, prepared.groups, prepared.sample, program)
    if request.sparsity is not None:
        # Of the parameters that the shared groups own, as the others are.
        all_gone = cost.of({**keep, **dict.fromkeys((g.name for g in shared), 0)})
        limit = all_gone + (1 - request.sparsity) * (cost.of(keep) - all_gone)
    elif request.flops is not None:
        limit = request.flops * dense
    else:
        asked_for = _kept(request)
        limit = float(asked_for if isinstance(asked_for, int) else asked_for * Fraction(int(dense)))
    if limit >= cost.dense:
        raise RequestError(
            f"{asked} asks for no less than there is: it allows {limit:,.0f} {kind}, and the "
            f"{'model' if form is Form.MODULE else 'exported program'} has {cost.dense:,.0f}; ask "
            "for less to be kept"
        )
    found = _checked(rule, kind, cost, limit, keep, asked, dense)
    return found, dataclasses.replace(rule.budget(kind, cost, limit, found), dense=dense)


def _kept(request: PruningRequest) -> Fraction | int:
    """Return what is asked to be kept, a share or a count of parameters or bytes."""
    if request.size is not None:
        return parse_size_kept(request.size)
    assert request.params is not None
    return parse_keep(request.params)


def _checked(
    rule: Rule,
    kind: Cost,
    cost: CostModel,
    limit: float,
    keep: Mapping[str, int],
    asked: str,
    dense: float | None = None,
) -> dict[str, int]:
    """Return what the rule chooses; `dense` is what the cost of the dense model is told as.

    Raises
    ------
    RequestError
        If even the least widths cost more than the limit.
    """

    def written(value: float) -> str:
        return f"{value:.3f}" if kind is Cost.TIME else f"{value:,.0f}"

    found = rule.choose(cost, limit)
    dense = cost.dense if dense is None else dense
    form = "" if dense == cost.dense else ", as an exported program,"
    reached = cost.of({**keep, **found})
    if not reached <= limit * (1 + ROUNDING):
        raise RequestError(
            f"{asked} cannot be met: it allows {written(limit)} {kind}, and what may be pruned "
            f"comes to {written(reached)}{form} of {written(dense)} at least "
            f"({reached / dense:.3f} of the dense model's); ask for less, or let more kinds "
            "of units be pruned"
        )
    return found
