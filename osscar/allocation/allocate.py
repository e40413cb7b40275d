"""How many units each coupling group keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np

from graph import CouplingGroup, UnitKind
from osscar.allocation.budget import Allocated, Budget
from osscar.allocation.costs import ROUNDING, Cost, count
from osscar.allocation.curves import Curve, measure_curves
from osscar.allocation.expert_curves import expert_curves
from osscar.allocation.measured import (
    FEWEST,
    Compared,
    compared_samples,
    measured_groups,
    scaled,
    widths_to_measure,
)
from osscar.allocation.sharing import Sharing
from osscar.allocation.speedup import as_fast_as
from osscar.allocation.widths import (
    about_half,
    asked_groups,
    possible_experts,
    why_frozen,
    why_out_of_reach,
)
from osscar.base.errors import RequestError
from osscar.base.printable import listed
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest, parse_keep, parse_size_kept
from osscar.shrinking.plan import Form
from osscar.shrinking.program.shrink_program import dense_program

_ROUNDS = 2
"""How often groups are measured at most: where widths move after the first round, the second."""

MEASURED = ("curvature", "measured")
"""Allocations by curves that are measured."""


def allocate(
    prepared: Prepared,
    request: PruningRequest,
    curves: Mapping[str, Curve] | None = None,
    left: Collection[str] = (),
    form: Form = Form.EAGER,
    measure: bool = True,
) -> Allocated:
    """Decide how many units each group keeps, on the first rank for all.

    Groups that are `left` cannot follow, and keep all their units.  `form` is what becomes smaller,
    and is saved.  `curves` of the groups that share a budget, which all ranks predict together, are
    found where they are not given.  Without `measure`, curves stay as
    they were predicted.

    Raises
    ------
    RequestError
        If what is asked for makes no sense for these groups, a budget cannot be met, or nothing
        would be removed.
    NonFiniteError
        If the gradients that a budget needs are not finite.
    """
    asked = _Asked(prepared, request, left, form, curves)
    if request.has_budget and request.allocation in MEASURED:
        return _by_measured_curves(asked, measure)
    return prepared.ranks.broadcast("widths", lambda: _allocated(asked))


@dataclass(frozen=True, eq=False)
class _Asked:
    """What widths are chosen by: the arguments of `allocate`."""

    prepared: Prepared
    request: PruningRequest
    left: Collection[str]
    form: Form
    curves: Mapping[str, Curve] | None


def _by_measured_curves(asked: _Asked, measure: bool) -> Allocated:
    """Choose widths by curves, measure each group at about the width that it gets, choose again.

    A group whose width moves much is measured a second time.  Without gradients, groups get equal
    shares at first, and what they lose of their own outputs is the shape of a curve.
    """
    prepared, request, curves = asked.prepared, asked.request, asked.curves
    ranks = prepared.ranks
    _, _, shared = asked_groups(prepared, request, asked.left)
    units = [group for group in shared if group.kind is not UnitKind.EXPERTS]
    of_experts = [group for group in shared if group.kind is UnitKind.EXPERTS]
    if curves is None and request.allocation == "curvature":
        curves = shared_curves(prepared, request, asked.left)
    # Those of experts are measured at several counts, whatever else is to be measured.
    experts = (
        {group.name: curves[group.name] for group in of_experts}
        if curves is not None
        else expert_curves(prepared, of_experts, request)
    )
    if not units:
        curves = experts

    def chosen(curves: Mapping[str, Curve] | None, aim: bool = True) -> Allocated:
        by = request if curves is not None else replace(request, allocation="uniform")
        every = None if curves is None else {**curves, **experts}
        now = replace(asked, request=by, curves=every)
        return ranks.broadcast("widths", lambda: _allocated(now, aim))

    if measure and units:
        curves = _measured(prepared, request, units, curves, partial(chosen, aim=False))
    return chosen(curves)


def _measured(
    prepared: Prepared,
    request: PruningRequest,
    shared: Sequence[CouplingGroup],
    curves: Mapping[str, Curve] | None,
    chosen: Callable[[Mapping[str, Curve] | None], Allocated],
) -> Mapping[str, Curve]:
    """Return the curves of groups through what is measured at widths that are `chosen`."""
    samples = compared_samples(prepared)
    consumers = {one.name for group in shared for one in prepared.linear_maps(group)}
    compared = Compared.of(prepared, consumers, samples) if samples else None
    if compared is None:
        if curves is None:
            raise RequestError(_why_not_measured(prepared))
        return curves
    for _ in range(_ROUNDS):
        budget = chosen(curves).budget
        assert budget is not None
        keep = {group.name: budget.widths[group.name].kept for group in shared}
        wanted = widths_to_measure(shared, keep, curves, request.widths)
        found = measured_groups(
            prepared, compared, wanted, damp=request.damp, shapes=curves is None
        )
        if curves is None:  # what cannot be measured has to keep all its units
            whole = [group for group in shared if group.name not in found]
            curves = {group.name: Curve(group.name, np.zeros(group.units + 1)) for group in whole}
        curves = scaled(curves, found)
    assert curves is not None
    return curves


def _why_not_measured(prepared: Prepared) -> str:
    few = prepared.inputs.samples
    if not compared_samples(prepared):
        return (
            f"--allocation measured compares predictions on samples that no weight is fitted to, "
            f"and there are {few} in all; give at least {FEWEST}, or --allocation uniform"
        )
    return (
        f"--allocation measured compares predictions, and no output of "
        f"{type(prepared.model).__name__} is known to be scores of classes; give --allocation "
        "curvature, which takes any output, or uniform"
    )


def _allocated(asked: _Asked, aim: bool = True) -> Allocated:
    """Choose widths by what is known; without `aim`, those of a speed-up by operations alone."""
    prepared, request, left = asked.prepared, asked.request, asked.left
    groups, keep, shared = asked_groups(prepared, request, left)
    budget = None
    if request.has_budget and not shared and (keep or not (request.skip or left)):
        raise RequestError(why_out_of_reach(groups, request, prepared.residual))
    if request.has_budget and shared:
        sharing = Sharing(shared, request.widths, keep)
        more = partial(_more_to_prune, prepared, request, groups, keep)
        if request.allocation in MEASURED:
            sharing = replace(sharing, curves=asked.curves)
        if request.speedup is None:
            found, budget = _counted(prepared, request, sharing, asked.form, more)
        else:
            found, budget = _timed(prepared, request.speedup, sharing, aim)
        keep = {**keep, **found}
    keep = {g.name: keep[g.name] for g in groups if keep.get(g.name, g.units) < g.units}
    if not keep and request.experts_alone:
        one = next(group for group in groups if group.kind is UnitKind.EXPERTS and group.prunable)
        raise RequestError(
            "nothing would be removed: every mixture keeps all its experts; of the "
            f"{one.units} of {one.name!r}, {possible_experts(one)}"
        )
    if not keep:
        skipped = len([group for group in prepared.groups if group not in groups])
        rest = f" but the {skipped} that are skipped" if skipped else ""
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
    """
    _, _, every = asked_groups(prepared, request, left)
    experts = expert_curves(prepared, [g for g in every if g.kind is UnitKind.EXPERTS], request)
    shared = [group for group in every if group.name not in experts]
    mine = prepared.ranks.share([group.units * group.removable for group in shared])
    own = [shared[i] for i in mine]
    found = measure_curves(prepared, own, damp=request.damp, seed=request.seed)
    told = prepared.ranks.all_gather("curves", list(found))
    curves = {curve.name: curve for some in told for curve in some}
    return {**{group.name: curves[group.name] for group in shared}, **experts}


def provisional(prepared: Prepared, request: PruningRequest) -> dict[str, int]:
    """Return what groups may come to keep, before anything is measured.

    It is what the request says of them where it does; about half of those that share a budget.
    """
    _, keep, shared = asked_groups(prepared, request)
    if not request.has_budget:
        return keep
    before: Counter[int] = Counter()
    for group in shared:
        keep[group.name] = about_half(group, request.widths, before[group.units] % 2)
        before[group.units] += 1
    return keep


def _timed(
    prepared: Prepared, wanted: float, sharing: Sharing, aim: bool
) -> tuple[dict[str, int], Budget]:
    """Choose widths whose model was timed to be as fast as wanted, or has as few operations."""
    groups = [group for group in prepared.every_group if group.kind is not UnitKind.EXPERTS]
    cost = count(Cost.FLOPS, prepared.model, groups, prepared.sample)
    fewest, _ = sharing.choose(cost, 0.0)
    least = cost.of({**sharing.others, **fewest}) / cost.dense

    def within(share: float) -> dict[str, int]:
        return sharing.choose(cost, share * cost.dense)[0]

    if aim:
        found, speedup = as_fast_as(prepared, wanted, sharing.others, least, within)
    else:
        found, speedup = within(max(1 / wanted, least)), wanted
    # A bound, and what other limits come to, would be of operations, and say nothing of times.
    budget = replace(sharing.budget(Cost.FLOPS, cost, 0.0, found, None), frontier=())
    limit, reached = 1 / wanted, 1 / speedup
    return found, replace(budget, cost=Cost.TIME, limit=limit, dense=1.0, reached=reached)


def _counted(
    prepared: Prepared,
    request: PruningRequest,
    sharing: Sharing,
    form: Form,
    more: Callable[[], str],
) -> tuple[dict[str, int], Budget]:
    """Choose widths within what was asked for of parameters, bytes or operations."""
    asked, keep = request.budget_in_words, sharing.others
    kind = Cost.PARAMETERS
    if request.flops is not None:
        kind = Cost.FLOPS
    elif request.size is not None:
        kind = Cost.BYTES
    # Experts that all stay are no group here: neurons of each may leave, not of all alike.
    leaving = {*keep, *(group.name for group in sharing.groups)}
    groups = [
        g for g in prepared.every_group if g.kind is not UnitKind.EXPERTS or g.name in leaving
    ]
    cost = count(kind, prepared.model, groups, prepared.sample)
    dense = cost.dense
    if (
        kind is Cost.BYTES and form is Form.EXPORTED
    ):  # a share is of what one has: the modules' file
        proofs = prepared.inputs.proofs(prepared.model, request.seed)
        program = dense_program(prepared.model, proofs, prepared.example)
        cost = count(kind, prepared.model, groups, prepared.sample, program)
    if request.sparsity is not None:
        # Of the parameters that the shared groups own, as the others are.
        all_gone = cost.of({**keep, **dict.fromkeys((g.name for g in sharing.groups), 0)})
        limit = all_gone + (1 - request.sparsity) * (cost.of(keep) - all_gone)
    elif request.flops is not None:
        limit = request.flops * dense
    else:
        kept = parse_keep(request.params) if request.params is not None else None
        asked_for = parse_size_kept(request.size) if request.size is not None else kept
        assert asked_for is not None
        limit = float(asked_for if isinstance(asked_for, int) else asked_for * Fraction(int(dense)))
    if limit >= cost.dense:
        raise RequestError(
            f"{asked} asks for no less than there is: it allows {limit:,.0f} {kind}, and the "
            f"{'model' if form is Form.EAGER else 'exported program'} has {cost.dense:,.0f}; ask "
            "for less to be kept"
        )
    found, bound = sharing.choose(cost, limit)
    reached = cost.of({**keep, **found})
    if not reached <= limit * (1 + ROUNDING):
        as_program = "" if dense == cost.dense else ", as an exported program,"
        raise RequestError(
            f"{asked} cannot be met: it allows {limit:,.0f} {kind}, and what may be pruned "
            f"comes to {reached:,.0f}{as_program} of {dense:,.0f} at least "
            f"({reached / dense:.3f} of the dense model's); remove less, or let {more()}"
        )
    return found, replace(sharing.budget(kind, cost, limit, found, bound), dense=dense)


def _more_to_prune(
    prepared: Prepared,
    request: PruningRequest,
    groups: Sequence[CouplingGroup],
    keep: Mapping[str, int],
) -> str:
    """Say what else could be pruned, where what a budget reaches does not suffice."""
    residual = prepared.residual
    experts = any(mixture.group.prunable for mixture in prepared.mixtures)
    if experts and request.experts is None and request.flops is None and request.speedup is None:
        return "experts leave, too (--experts auto)"
    streams = [
        group.name
        for group in groups
        if group.prunable and group.units > 1 and group.name in residual and group.name not in keep
    ]
    if not streams:
        return "more kinds of units be pruned"
    return (
        "residual channels leave, too, of which no budget takes any by itself "
        f"(--residual): {listed([*map(repr, streams)], 3)}"
    )
