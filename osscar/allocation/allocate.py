"""How many units each coupling group keeps.

What a request says of groups by name or kind is theirs; the others share the budget.  Their cost is
counted, their curves are measured, and one search chooses the widths of least predicted distance
from the dense model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.budget import Allocated, Budget, Limit, Measured, Width
from osscar.allocation.costs import ROUNDING, Cost
from osscar.allocation.divergence import Measure
from osscar.allocation.limits import Allowance, allowances
from osscar.allocation.measured import Curve, measured_curves
from osscar.allocation.search import Chosen, Search, equal_shares
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
from osscar.request import BudgetKind, PruningRequest, Widths


@dataclass(frozen=True, eq=False)
class Sharing:
    """Groups that share budgets by curves, or evenly; `others` is what other groups keep."""

    groups: Sequence[CouplingGroup]
    widths: Widths
    others: Mapping[str, int]
    curves: Mapping[str, Curve] | None = None
    measure: Measure = "nats"
    bfloat16: bool = False

    @cached_property
    def options(self) -> dict[str, NDArray[np.int64]]:
        """The widths that each group may have, ascending."""
        return {group.name: possible_widths(group, self.widths) for group in self.groups}

    @property
    def least(self) -> dict[str, int]:
        """The least widths."""
        return {name: int(some[0]) for name, some in self.options.items()}

    def choose(self, allowed: Sequence[Allowance]) -> Chosen:
        """Return what groups keep so that the model costs at most what is allowed, or the least."""
        limits = [one.most for one in allowed]
        if self.curves is not None:
            return self._search(self.curves, allowed).choose(limits)
        costs = [one.cost for one in allowed]
        return Chosen(equal_shares(self.options, self.others, costs, limits))

    def budget(self, allowed: Sequence[Allowance], chosen: Chosen) -> Budget:
        """Report on a choice, with a prediction and prices where there are curves."""
        found, prices = chosen.kept, chosen.prices
        kept = {**self.others, **found}
        each = [None] * len(allowed) if prices is None else prices.tolist()
        limits = [
            Limit(a.budget, a.kind, a.most, a.dense, a.cost.of(kept), price, a.cost.assumed)
            for a, price in zip(allowed, each, strict=True)
        ]

        def binds(i: int) -> tuple[float, float]:
            """How much the limit is worth by its price, and how much of it is spent."""
            return (limits[i].price or 0.0) * limits[i].limit, limits[i].reached / limits[i].limit

        order = sorted(range(len(limits)), key=binds, reverse=True)
        told: dict[str, Any] = {}
        parts: dict[str, float] = {}
        if self.curves is not None:
            search = self._search(self.curves, allowed)
            own = {name: self.curves[name] for name in search.options}
            parts = {name: float(curve.losses[found[name]]) for name, curve in own.items()}
            told = {
                "predicted": search.loss(found),
                "lower_bound": chosen.bound,
                "measure": self.measure,
                "bfloat16": self.bfloat16,
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
                "frontier": () if prices is None else search.frontier(prices, order[0]),
            }
        widths = {
            g.name: Width(str(g.kind), g.units, found[g.name], parts.get(g.name))
            for g in self.groups
        }
        return Budget(tuple(limits[i] for i in order), widths=widths, **told)

    def _search(self, curves: Mapping[str, Curve], allowed: Sequence[Allowance]) -> Search:
        losses = {name: curves[name].losses[some] for name, some in self.options.items()}
        return Search(self.options, losses, self.others, [one.cost for one in allowed])


def allocate(
    prepared: Prepared,
    request: PruningRequest,
    left: Collection[str] = (),
    form: Form = Form.EAGER,
    curves: Mapping[str, Curve] | None = None,
    known: Mapping[str, Curve] | None = None,
) -> Allocated:
    """Decide how many units each group keeps, on the first rank for all.

    Groups that are `left` cannot follow, and keep all their units.  `form` is what becomes smaller,
    and is saved.  `curves` of the groups that share a budget are measured where they are not given,
    beginning with those that are `known` from other budgets.

    A `RequestError` is raised if the request makes no sense for these groups, a budget cannot be
    met, or nothing would be removed; a `NonFiniteError` if a group pruned alone overflows.
    """
    groups, keep, shared = asked_groups(prepared, request, left)
    budget = None
    if request.has_budget and not shared and (keep or not (request.skip or left)):
        raise RequestError(why_out_of_reach(groups, request, keep, prepared.residual))
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
    known: Mapping[str, Curve] | None,
) -> Budget:
    """Choose the widths of the groups that share a budget, and say what that comes to."""
    ranks, others, least = prepared.ranks, sharing.others, sharing.least
    allowed = ranks.broadcast("budgets", lambda: allowances(prepared, request, others, least, form))

    def choose(curves: Mapping[str, Curve] | None) -> Mapping[str, int]:
        now = replace(sharing, curves=curves)
        return ranks.broadcast("widths", lambda: now.choose(allowed).kept)

    for one in allowed:
        reached = one.cost.of({**others, **least})
        if reached > one.most * (1 + ROUNDING):
            program = "" if one.dense == one.cost.dense else ", as an exported program,"
            more = _more_to_prune(prepared, request, groups, others, one.budget)
            raise RequestError(
                f"{request.in_words([one.budget])} cannot be met: it allows {one.most:,.0f} "
                f"{one.kind}, and what may be pruned comes to {reached:,.0f}{program} of "
                f"{one.dense:,.0f} at least ({reached / one.dense:.3f} of the dense model's); "
                f"remove less, or prune {more}"
            )
    if request.allocation == "uniform":
        curves = None
    elif curves is None:
        curves, reference = measured_curves(prepared, request, sharing.groups, choose, known or {})
        measure, bfloat16 = reference.distance.measure, reference.bfloat16
        sharing = replace(sharing, measure=measure, bfloat16=bfloat16)
    sharing = replace(sharing, curves=curves)

    def shared_out() -> Budget:
        if request.speedup is not None:
            return _timed(prepared, request.speedup, sharing, allowed)
        return sharing.budget(allowed, sharing.choose(allowed))

    return ranks.broadcast("budgets that are shared out", shared_out)


def _timed(
    prepared: Prepared, wanted: float, sharing: Sharing, allowed: Sequence[Allowance]
) -> Budget:
    """Choose widths whose model was timed to be as fast as wanted, within all other limits."""
    (operations,) = (one for one in allowed if one.budget is BudgetKind.SPEEDUP)
    dense = operations.cost.dense

    def within(share: float) -> dict[str, int]:
        limit = replace(operations, most=share * dense)
        return sharing.choose([limit if one is operations else one for one in allowed]).kept

    def share(kept: Mapping[str, int]) -> float:
        return operations.cost.of({**sharing.others, **kept}) / dense

    found, speedup = as_fast_as(
        prepared, wanted, sharing.others, share(sharing.least), share(within(1.0)), within
    )
    # A bound, and what other limits come to, would be of operations, and say nothing of times.
    budget = sharing.budget(allowed, Chosen(found))
    timed = Limit(BudgetKind.SPEEDUP, Cost.TIME, 1 / wanted, 1.0, 1 / speedup)
    others = (one for one in budget.limits if one.budget is not BudgetKind.SPEEDUP)
    return replace(budget, limits=(timed, *others))


def provisional(prepared: Prepared, request: PruningRequest) -> dict[str, int]:
    """Return what groups may come to keep: as asked, or about half where they share a budget."""
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
    budget: BudgetKind,
) -> str:
    """Say what else could be pruned, where what a budget reaches does not suffice."""
    kinds = {one.group.kind for one in prepared.routed if one.group.prunable}
    if kinds and not request.routed and budget not in (BudgetKind.FLOPS, BudgetKind.SPEEDUP):
        return " and ".join(f"{kind}, too (--{kind} auto)" for kind in kinds)
    names = prepared.residual - {*keep}
    streams = [g.name for g in groups if g.prunable and g.units > 1 and g.name in names]
    if not streams:
        return "more kinds of units"
    return (
        "residual channels, too, which no budget prunes by itself "
        f"(--residual): {listed([*map(repr, streams)], 3)}"
    )


def _why_nothing(
    prepared: Prepared, request: PruningRequest, groups: Sequence[CouplingGroup]
) -> str:
    """Say why no group loses a unit."""
    skipped = sum(group not in groups for group in prepared.groups)
    rest = f" but the {skipped} that are skipped" if skipped else ""
    routed = [group for group in groups if group.kind.routed and group.prunable]
    return why_frozen(prepared.groups) or (
        f"nothing would be removed: every group{rest} keeps all its units; ask for "
        f"{'a higher sparsity' if request.sparsity else 'more to be removed'}"
        f"{', or skip less' if request.skip else ''}"
        + "".join(f"; of the {g.units} of {g.name!r}, {possible_counts(g)}" for g in routed[:1])
    )
