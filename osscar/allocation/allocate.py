"""How many units each coupling group keeps.

What a request says of groups by name or kind is theirs; the others share the budget.  Their cost is
counted, their curves are measured, and one search chooses the widths of least predicted distance
from the dense model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.budget import Allocated, Budget, Measured, Width
from osscar.allocation.costs import ROUNDING, Cost, CountedCost, count
from osscar.allocation.divergence import Measure
from osscar.allocation.measured import Curve, measured_curves
from osscar.allocation.search import Search, equal_shares
from osscar.allocation.speedup import as_fast_as
from osscar.allocation.widths import (
    about_half,
    asked_groups,
    possible_counts,
    possible_widths,
    why_frozen,
    why_out_of_reach,
)
from osscar.base.errors import RequestError
from osscar.base.printable import listed
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import Form
from osscar.request import PruningRequest, Widths, parse_keep, parse_size_kept
from osscar.shrinking.shrink_program import dense_program


@dataclass(frozen=True, eq=False)
class Sharing:
    """Groups that share a budget by curves, or evenly; `others` is what other groups keep."""

    groups: Sequence[CouplingGroup]
    widths: Widths
    others: Mapping[str, int]
    curves: Mapping[str, Curve] | None = None
    measure: Measure = "nats"

    @cached_property
    def options(self) -> dict[str, NDArray[np.int64]]:
        """The widths that each group may have, ascending."""
        return {group.name: possible_widths(group, self.widths) for group in self.groups}

    @property
    def least(self) -> dict[str, int]:
        """The least widths."""
        return {name: int(some[0]) for name, some in self.options.items()}

    def choose(self, cost: CountedCost, limit: float) -> tuple[dict[str, int], float | None]:
        """Return what groups keep so that the model costs at most the limit, or the least.

        Beside it comes what no other widths are predicted to lose less than, as of
        `Search.choose`.
        """
        if self.curves is not None:
            return self._search(self.curves, cost).choose(limit)
        return equal_shares(self.options, self.others, cost, limit), None

    def budget(
        self,
        kind: Cost,
        cost: CountedCost,
        limit: float,
        found: Mapping[str, int],
        bound: float | None,
    ) -> Budget:
        """Report on a choice and its bound, with a prediction where there are curves."""
        told: dict[str, Any] = {}
        parts: dict[str, float] = {}
        if self.curves is not None:
            search = self._search(self.curves, cost)
            own = {name: self.curves[name] for name in search.options}
            parts = {name: float(curve.losses[found[name]]) for name, curve in own.items()}
            told = {
                "predicted": search.loss(found),
                "lower_bound": bound,
                "measure": self.measure,
                "curves": {
                    name: tuple(curve.losses.tolist())
                    for name, curve in own.items()
                    if len(search.options[name]) > 1
                },
                "measured": {
                    name: tuple(Measured(*point) for point in sorted(curve.measured.items()))
                    for name, curve in own.items()
                    if curve.measured
                },
                "frontier": search.frontier(),
            }
        widths = {
            g.name: Width(str(g.kind), g.units, found[g.name], parts.get(g.name))
            for g in self.groups
        }
        reached = cost.of({**self.others, **found})
        return Budget(kind, limit, cost.dense, reached, widths=widths, **told)

    def _search(self, curves: Mapping[str, Curve], cost: CountedCost) -> Search:
        losses = {name: curves[name].losses[some] for name, some in self.options.items()}
        return Search(self.options, losses, self.others, cost)


def allocate(
    prepared: Prepared,
    request: PruningRequest,
    left: Collection[str] = (),
    form: Form = Form.EAGER,
    curves: Mapping[str, Curve] | None = None,
    known: Mapping[str, Curve] = MappingProxyType({}),
) -> Allocated:
    """Decide how many units each group keeps, on the first rank for all.

    Groups that are `left` cannot follow, and keep all their units.  `form` is what becomes smaller,
    and is saved.  `curves` of the groups that share a budget are measured where they are not given,
    beginning with those that are `known` from other budgets.

    Raises
    ------
    RequestError
        If what is asked for makes no sense for these groups, a budget cannot be met, or nothing
        would be removed.
    NonFiniteError
        If weights or outputs overflow where a group is pruned by itself.
    """
    groups, keep, shared = asked_groups(prepared, request, left)
    budget = None
    if request.has_budget and not shared and (keep or not (request.skip or left)):
        raise RequestError(why_out_of_reach(groups, request, prepared.residual))
    if request.has_budget and shared:
        budget = _shared_out(
            prepared, request, groups, Sharing(shared, request.widths, keep), form, curves, known
        )
        keep = {**keep, **{name: width.kept for name, width in budget.widths.items()}}
    keep = {g.name: keep[g.name] for g in groups if keep.get(g.name, g.units) < g.units}
    if not keep:
        raise RequestError(_why_nothing(prepared, request, groups))
    return Allocated(keep, budget)


def _shared_out(
    prepared: Prepared,
    request: PruningRequest,
    groups: Sequence[CouplingGroup],
    sharing: Sharing,
    form: Form,
    curves: Mapping[str, Curve] | None,
    known: Mapping[str, Curve],
) -> Budget:
    """Choose the widths of the groups that share a budget, and say what that comes to."""
    ranks = prepared.ranks
    limit = ranks.broadcast("a budget", lambda: _limit(prepared, request, sharing, form))

    def choose(curves: Mapping[str, Curve] | None) -> Mapping[str, int]:
        now = replace(sharing, curves=curves)
        return ranks.broadcast("widths", lambda: now.choose(limit.cost, limit.most)[0])

    least = {**sharing.others, **sharing.least}
    if limit.cost.of(least) > limit.most * (1 + ROUNDING):
        raise RequestError(
            f"{request.budget_in_words} cannot be met: {limit.compared(limit.cost.of(least))}; "
            f"remove less, or let {_more_to_prune(prepared, request, groups, sharing.others)}"
        )
    if request.allocation != "uniform":
        if curves is None:
            curves, measure = measured_curves(prepared, request, sharing.groups, choose, known)
            sharing = replace(sharing, measure=measure)
        sharing = replace(sharing, curves=curves)

    def shared_out() -> Budget:
        if request.speedup is not None:
            return _timed(prepared, request.speedup, sharing, limit)
        found, bound = sharing.choose(limit.cost, limit.most)
        budget = sharing.budget(limit.kind, limit.cost, limit.most, found, bound)
        return replace(budget, dense=limit.dense)

    return ranks.broadcast("a budget that is shared out", shared_out)


class _Limit(NamedTuple):
    """What a model may cost, and what it does; `dense` as that of the dense model is told."""

    kind: Cost
    cost: CountedCost
    most: float
    dense: float

    def compared(self, reached: float) -> str:
        """Say what is allowed, and what is reached."""
        form = "" if self.dense == self.cost.dense else ", as an exported program,"
        return (
            f"it allows {self.most:,.0f} {self.kind}, and what may be pruned comes to "
            f"{reached:,.0f}{form} of {self.dense:,.0f} at least ({reached / self.dense:.3f} of "
            "the dense model's)"
        )


def _limit(prepared: Prepared, request: PruningRequest, sharing: Sharing, form: Form) -> _Limit:
    """Count what the model costs, and read what it may."""
    kind = Cost.PARAMETERS
    if request.flops is not None or request.speedup is not None:
        kind = Cost.FLOPS
    elif request.size is not None:
        kind = Cost.BYTES
    groups = prepared.groups_with({*sharing.others, *sharing.least})
    cost = count(kind, prepared.model, groups, prepared.sample)
    dense = cost.dense
    if (
        kind is Cost.BYTES and form is Form.EXPORTED
    ):  # a share is of what one has: the modules' file
        proofs = prepared.inputs.proofs(prepared.model, request.seed)
        program = dense_program(prepared.model, proofs, prepared.example)
        cost = count(kind, prepared.model, groups, prepared.sample, program)
    if request.speedup is not None:  # where the search begins; how fast the least is will be timed
        least = cost.of({**sharing.others, **sharing.least})
        return _Limit(kind, cost, max(dense / request.speedup, least), dense)
    if request.sparsity is not None:
        # Of the parameters that the shared groups own, as the others are.
        all_gone = cost.of({**sharing.others, **dict.fromkeys(sharing.least, 0)})
        most = all_gone + (1 - request.sparsity) * (cost.of(sharing.others) - all_gone)
    elif request.flops is not None:
        most = request.flops * dense
    else:
        kept = parse_keep(request.params) if request.params is not None else None
        asked_for = parse_size_kept(request.size) if request.size is not None else kept
        assert asked_for is not None
        most = float(asked_for if isinstance(asked_for, int) else asked_for * Fraction(int(dense)))
    if most >= cost.dense:
        raise RequestError(
            f"{request.budget_in_words} asks for no less than there is: it allows {most:,.0f} "
            f"{kind}, and the {'model' if form is Form.EAGER else 'exported program'} has "
            f"{cost.dense:,.0f}; ask for less to be kept"
        )
    return _Limit(kind, cost, most, dense)


def _timed(prepared: Prepared, wanted: float, sharing: Sharing, limit: _Limit) -> Budget:
    """Choose widths whose model was timed to be as fast as wanted."""
    cost = limit.cost
    least = cost.of({**sharing.others, **sharing.least}) / cost.dense

    def within(share: float) -> dict[str, int]:
        return sharing.choose(cost, share * cost.dense)[0]

    found, speedup = as_fast_as(prepared, wanted, sharing.others, least, within)
    # A bound, and what other limits come to, would be of operations, and say nothing of times.
    budget = replace(sharing.budget(Cost.FLOPS, cost, 0.0, found, None), frontier=())
    return replace(budget, cost=Cost.TIME, limit=1 / wanted, dense=1.0, reached=1 / speedup)


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


def _more_to_prune(
    prepared: Prepared,
    request: PruningRequest,
    groups: Sequence[CouplingGroup],
    keep: Mapping[str, int],
) -> str:
    """Say what else could be pruned, where what a budget reaches does not suffice."""
    residual = prepared.residual
    kinds = {one.group.kind for one in prepared.routed if one.group.prunable}
    if kinds and not request.routed and request.flops is None and request.speedup is None:
        return " and ".join(f"{kind} leave, too (--{kind} auto)" for kind in kinds)
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


def _why_nothing(
    prepared: Prepared, request: PruningRequest, groups: Sequence[CouplingGroup]
) -> str:
    """Say why no group loses a unit."""
    skipped = len([group for group in prepared.groups if group not in groups])
    rest = f" but the {skipped} that are skipped" if skipped else ""
    routed = [group for group in groups if group.kind.routed and group.prunable]
    return why_frozen(prepared.groups) or (
        f"nothing would be removed: every group{rest} keeps all its units; ask for "
        f"{'a higher sparsity' if request.sparsity else 'more to be removed'}"
        f"{', or skip less' if request.skip else ''}"
        + "".join(f"; of the {g.units} of {g.name!r}, {possible_counts(g)}" for g in routed[:1])
    )
