"""How many units each coupling group keeps."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from graph import CouplingGroup
from osscar.capture.opened import Opened
from osscar.capture.regularization import DEFAULT_DAMP
from osscar.core.errors import FrozenGroupError, RequestError
from osscar.core.files import STRICT
from osscar.pruning.costs import Cost, CostModel, count
from osscar.pruning.curves import Curve, measure_curves
from osscar.pruning.knapsack import BudgetError, choose
from osscar.pruning.latency import Latency, aimed
from osscar.pruning.request import PRUNED_KINDS, Allocation, PruningRequest, parse_keep

_ROUNDS = 60
_SWEEPS = 30
_POINTS = 33
"""Of each curve, in what is saved."""

_PRICES = 96
_FRONTIER = 24
"""Points of the frontier that are kept at most."""


@dataclass(frozen=True)
class Width:
    """What a group that shares a budget keeps.

    Parameters
    ----------
    kind, units, kept
        The group, and how many of its units stay.
    predicted
        Its part of the predicted divergence, in nats; None where nothing predicts it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: str
    units: int
    kept: int
    predicted: float | None = None


@dataclass(frozen=True)
class Budget:
    """What the groups that share a budget came to.

    Parameters
    ----------
    cost
        What it is counted in.
    limit
        What the whole model may cost.
    dense, reached
        What it costs, and what it will.
    predicted
        The predicted divergence of the pruned model's predictions from the dense ones, in nats a
        prediction; None where nothing predicts it.
    lower_bound
        No choice of widths within the limit has a smaller prediction; None where costs of groups
        multiply, so that nothing was proved, or nothing is predicted.
    comparable
        Whether gradients reached all groups; if not, those that none reached count by their own
        relative loss.
    curves
        The predicted divergence of each group over the units kept.
    widths
        What each group keeps, in the order of the model.
    frontier
        Costs of the whole model, ascending, and the least predicted divergence at each: what other
        limits would have come to.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    cost: Cost
    limit: float
    dense: float
    reached: float
    predicted: float | None = None
    lower_bound: float | None = None
    comparable: bool = True
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    widths: dict[str, Width] = field(default_factory=dict, repr=False)
    frontier: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def gap(self) -> float | None:
        """How far the prediction can be above the least one within the limit, relative to it."""
        if self.predicted is None or self.lower_bound is None:
            return None
        above = max(self.predicted - self.lower_bound, 0.0)
        return above / self.predicted if self.predicted else 0.0


@dataclass(frozen=True)
class Allocated:
    """How many units groups keep, only those that lose some, and the budget that some share."""

    keep: Mapping[str, int]
    budget: Budget | None = None


def allocate(
    ready: Opened,
    request: PruningRequest,
    curves: Mapping[str, Curve] | None = None,
    left: Collection[str] = (),
) -> Allocated:
    """Decide how many units each group keeps.

    Parameters
    ----------
    ready
        The dense model with its data.
    request
        What the user asked for.
    curves
        Those of all groups that share a budget, where they are known; else they are measured.
    left
        Names of groups that keep all their units, since they cannot follow; no budget counts them.

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
    groups, keep, shared = _asked(ready, request, left)
    budget = None
    if request.has_budget and shared:
        rule = (
            _Uniform(shared, request, keep)
            if request.allocation is Allocation.UNIFORM
            else _ByCurves.of(shared, request, keep, curves or shared_curves(ready, request, left))
        )
        found, budget = _met(ready, request, shared, rule, keep)
        keep = {**keep, **found}
    keep = {g.name: keep[g.name] for g in groups if keep.get(g.name, g.units) < g.units}
    if not keep:
        skipped = len(ready.groups) - len(groups)
        rest = f" but the {skipped} that are skipped or left alone" if skipped else ""
        raise RequestError(
            f"nothing would be removed: every group{rest} keeps all its units; ask for "
            f"{'a higher sparsity' if request.sparsity else 'more to be removed'}"
            f"{', or skip less' if request.skip else ''}{_why_frozen(groups)}"
        )
    return Allocated(keep, budget)


def shared_curves(
    ready: Opened, request: PruningRequest, left: Collection[str] = ()
) -> dict[str, Curve]:
    """Measure the curves of all groups that share a request's budget, however large that is.

    Parameters
    ----------
    ready, request, left
        As `allocate` takes them.

    Raises
    ------
    RequestError, FrozenGroupError, NonFiniteError
        As `allocate` does.
    """
    _, _, shared = _asked(ready, request, left)
    damp = DEFAULT_DAMP if request.damp is None else request.damp
    found = measure_curves(ready, shared, damp=damp, seed=request.seed)
    return {curve.name: curve for curve in found}


def provisional(ready: Opened, request: PruningRequest) -> dict[str, int]:
    """Return what groups may come to keep, before anything is measured.

    It is what the request says of them where it does; about half of those that share a budget.

    Raises
    ------
    RequestError, FrozenGroupError
        As `allocate` does.
    """
    _, keep, shared = _asked(ready, request)
    if not request.has_budget:
        return keep
    if request.allocation is Allocation.UNIFORM and request.sparsity is not None:
        return {**keep, **_Uniform(shared, request, keep).of_units()}
    return {**keep, **{group.name: _about_half(group, request.round_to) for group in shared}}


def _about_half(group: CouplingGroup, round_to: int) -> int:
    """Return a width near half, of those that the group may have, that divides it least.

    A number in the code that stands for all units is hidden by what divides it: `view(-1, 64)`
    takes 32 channels of two samples for those of one.
    """
    units = group.units
    fewer = [int(kept) for kept in _options(group, round_to) if kept < units]
    return min(
        fewer, key=lambda kept: (math.gcd(kept, units), abs(2 * kept - units), -kept), default=units
    )


def _why_frozen(groups: Sequence[CouplingGroup]) -> str:
    """Say why groups cannot be pruned, if none can."""
    if any(group.prunable and group.units > 1 for group in groups):
        return ""
    frozen = next((group for group in groups if group.frozen), None)
    return (
        ""
        if frozen is None
        else f". No group of this model can be pruned: {_frozen_message(frozen)}"
    )


# ---- which groups ------------------------------------------------------------------------


def _asked(
    ready: Opened, request: PruningRequest, left: Collection[str] = ()
) -> tuple[list[CouplingGroup], dict[str, int], list[CouplingGroup]]:
    """Return the groups within reach, what some keep by name or kind, and those with a budget."""
    residual = ready.residual
    groups = reachable(ready.groups, request, residual, left)
    shared = [group for group in groups if _shares(group, request, residual)]
    return groups, kept_by_name(groups, request, residual), shared


def reachable(
    groups: Sequence[CouplingGroup],
    request: PruningRequest,
    residual: Collection[str] = (),
    left: Collection[str] = (),
) -> list[CouplingGroup]:
    """Return the groups that the request does not skip, nor are left; what it names has to exist.

    Raises
    ------
    RequestError
        If a named group does not exist, or a pattern to skip matches none.
    FrozenGroupError
        If what was asked for is frozen everywhere, or a frozen group was named.
    """
    by_name = {group.name: group for group in groups}
    for name in request.groups:
        if name not in by_name:
            raise RequestError(f"there is no group {name!r}; `osscar inspect` lists the groups")
        if by_name[name].frozen:
            raise FrozenGroupError(_frozen_message(by_name[name]))
    _check_kinds(groups, request, residual)
    skipped = _skipped(by_name, request.skip) | set(left)
    return [group for group in groups if group.name not in skipped]


def _shares(group: CouplingGroup, request: PruningRequest, residual: Collection[str]) -> bool:
    """Whether a group shares the budget: nobody has said what it keeps."""
    return (
        group.prunable
        and group.units > 1
        and group.kind in PRUNED_KINDS
        and group.name not in residual
        and group.name not in request.groups
        and request.of_kind(group.kind) is None
    )


def kept_by_name(
    groups: Sequence[CouplingGroup], request: PruningRequest, residual: Collection[str] = ()
) -> dict[str, int]:
    """Return what those groups keep of which the request says so, by name or by kind.

    Raises
    ------
    RequestError
        If a count exceeds what exists, or a fraction keeps nothing.
    """
    kept: dict[str, int] = {}
    for group in groups:
        asked = (
            parse_keep(request.groups[group.name])
            if group.name in request.groups
            else request.fraction_or_count(group.kind, group.name in residual)
        )
        if asked is not None and group.prunable and group.units > 1:
            kept[group.name] = _count(group, asked, request.round_to)
    return kept


def _skipped(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Return the names that a pattern matches; each has to match one."""
    skipped: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise RequestError(
                f"no group is called {pattern!r}, which --skip names; `osscar inspect` lists the "
                "groups"
            )
        skipped.update(matched)
    return skipped


def _check_kinds(
    groups: Sequence[CouplingGroup], request: PruningRequest, residual: Collection[str]
) -> None:
    streams = [group for group in groups if group.name in residual]
    if request.residual is not None:
        _check_some("residual channels", streams)
    for kind in PRUNED_KINDS:
        if request.of_kind(kind) is not None:
            _check_some(kind, [g for g in groups if g.kind is kind and g not in streams])


def _check_some(what: str, groups: Sequence[CouplingGroup]) -> None:
    if not groups:
        raise RequestError(f"this model has no group of {what}; `osscar inspect` lists the groups")
    if not any(group.prunable for group in groups):
        raise FrozenGroupError(_frozen_message(groups[0]))


def _frozen_message(group: CouplingGroup) -> str:
    freeze = group.frozen[0]
    return (
        f"group {group.name!r} cannot be pruned: {freeze.reason} "
        f"({freeze.operator or 'graph'} in {freeze.module or 'the model'})"
    )


# ---- a count or a fraction of each group -------------------------------------------------


def _count(group: CouplingGroup, asked: Fraction | int, round_to: int) -> int:
    if isinstance(asked, int):
        if asked > group.units:
            raise RequestError(
                f"cannot keep {asked} units of {group.name!r}, which has {group.units} {group.kind}"
            )
        exact = Fraction(asked)
    else:
        exact = asked * group.units
    # Half a unit rounds up: rather keep one more than one less.
    count = math.floor(exact + Fraction(1, 2))
    if count < 1:
        raise RequestError(
            f"keeping {float(asked):g} of the {group.units} {group.kind} of {group.name!r} "
            "keeps none; ask for a lower sparsity"
        )
    if round_to == 1 or count == group.units:
        return count
    step, largest = _steps(group, round_to)
    return min(max(step, math.floor(exact / step + Fraction(1, 2)) * step), largest)


def _steps(group: CouplingGroup, round_to: int) -> tuple[int, int]:
    """Return by how many units the width moves to stay a multiple of `round_to`, and the most."""
    width = min((slot.width for slot in group.slots), default=1)
    step = round_to // math.gcd(round_to, width)
    largest = group.units // step * step
    if largest == 0:
        raise RequestError(
            f"round-to {round_to} cannot be met by {group.name!r}: "
            f"its {group.units} {group.kind} are {group.units * width} wide; give a smaller one"
        )
    return step, largest


def _options(group: CouplingGroup, round_to: int) -> NDArray[np.int64]:
    """Return the counts that a group may keep: all of its units, or a width that is round."""
    step, largest = _steps(group, round_to)
    return np.unique([*range(step, largest + 1, step), group.units])


# ---- one budget for all ------------------------------------------------------------------


class _Rule(Protocol):
    """How a budget is shared out."""

    @property
    def rounds(self) -> bool:
        """Whether it may come to more than the limit, since shares are rounded to units."""

    def choose(self, cost: CostModel, limit: float) -> dict[str, int]:
        """Return what groups keep so that the model costs at most the limit."""

    def budget(self, kind: Cost, cost: CostModel, limit: float, found: dict[str, int]) -> Budget:
        """Report on a choice."""


def _met(
    ready: Opened,
    request: PruningRequest,
    shared: Sequence[CouplingGroup],
    rule: _Rule,
    keep: Mapping[str, int],
) -> tuple[dict[str, int], Budget]:
    """Choose what groups keep within what was asked for."""
    asked = request.budget_in_words
    if request.speedup is not None:
        latency = Latency(ready, shared, keep)
        cost = latency.model
        found, speedup = aimed(
            latency,
            request.speedup,
            lambda limit: _checked(rule, Cost.TIME, cost, limit, keep, asked),
        )
        budget = rule.budget(Cost.TIME, cost, cost.of({**keep, **found}), found)
        # The bound is of modelled times, and says nothing of those that are measured.
        limit, reached = 1 / request.speedup, 1 / speedup
        return found, dataclasses.replace(budget, limit=limit, reached=reached, lower_bound=None)
    kind = Cost.FLOPS if request.flops is not None else Cost.PARAMETERS
    cost = count(kind, ready.model, ready.groups, ready.sample)
    if request.sparsity is not None:
        # Of the parameters that the shared groups own, as the others are.
        all_gone = cost.of({**keep, **dict.fromkeys((g.name for g in shared), 0)})
        limit = all_gone + (1 - request.sparsity) * (cost.of(keep) - all_gone)
    elif request.flops is not None:
        limit = request.flops * cost.dense
    else:
        assert request.params is not None
        params = parse_keep(request.params)
        limit = float(params if isinstance(params, int) else params * Fraction(int(cost.dense)))
    found = _checked(rule, kind, cost, limit, keep, asked)
    return found, rule.budget(kind, cost, limit, found)


def _checked(
    rule: _Rule,
    kind: Cost,
    cost: CostModel,
    limit: float,
    keep: Mapping[str, int],
    asked: str,
) -> dict[str, int]:
    """Return what the rule chooses.

    Raises
    ------
    RequestError
        If even the least widths cost more than the limit.
    """
    found = rule.choose(cost, limit)
    reached = cost.of({**keep, **found})
    if not (reached <= limit * (1 + 1e-9) or rule.rounds):
        raise RequestError(
            f"{asked} cannot be met: it allows {limit:,.6g} {kind}, and what may be pruned comes "
            f"to {reached:,.6g} of {cost.dense:,.6g} at least ({reached / cost.dense:.3f} of the "
            "dense model's); ask for less, or let more kinds of units be pruned"
        )
    return found


@dataclass(frozen=True, eq=False)
class _Uniform:
    """The same share of every group: of its units if the sparsity is given, or as costs allow."""

    shared: Sequence[CouplingGroup]
    request: PruningRequest
    keep: Mapping[str, int]

    @property
    def rounds(self) -> bool:
        """Whether shares are rounded to units, whatever that comes to."""
        return self.request.sparsity is not None

    def choose(self, cost: CostModel, limit: float) -> dict[str, int]:
        """Return the counts of the largest share within the limit, or of the least share."""
        if self.request.sparsity is not None:
            return self.of_units()
        low, high, steps = 0, 1 << 12, 1 << 12
        while low < high:
            middle = (low + high + 1) // 2
            within = cost.of({**self.keep, **self._at(Fraction(middle, steps))}) <= limit
            low, high = (middle, high) if within else (low, middle - 1)
        return self._at(Fraction(low, steps))

    def of_units(self) -> dict[str, int]:
        """Return the counts where the sparsity is the share of each group's units to remove."""
        return self._at(1 - Fraction(str(self.request.sparsity)))

    def _at(self, share: Fraction) -> dict[str, int]:
        return {
            g.name: _count(g, max(share, Fraction(1, 2 * g.units)), self.request.round_to)
            for g in self.shared
        }

    def budget(self, kind: Cost, cost: CostModel, limit: float, found: dict[str, int]) -> Budget:
        """Report without a prediction."""
        return Budget(
            kind,
            limit,
            cost.dense,
            cost.of({**self.keep, **found}),
            widths={g.name: Width(str(g.kind), g.units, found[g.name]) for g in self.shared},
        )


@dataclass(frozen=True, eq=False)
class _ByCurves:
    """The widths of least predicted divergence."""

    curves: Mapping[str, Curve]
    options: Mapping[str, NDArray[np.int64]]
    keep: Mapping[str, int]
    kinds: Mapping[str, str]
    rounds: ClassVar[bool] = False

    @classmethod
    def of(
        cls,
        shared: Sequence[CouplingGroup],
        request: PruningRequest,
        keep: Mapping[str, int],
        curves: Mapping[str, Curve],
    ) -> _ByCurves:
        """Take the curve of each group, and the widths that it may have."""
        options = {group.name: _options(group, request.round_to) for group in shared}
        kinds = {group.name: str(group.kind) for group in shared}
        return cls({name: curves[name] for name in options}, options, keep, kinds)

    def choose(self, cost: CostModel, limit: float) -> dict[str, int]:
        """Return the widths of least predicted divergence within the limit, or the least ones."""
        least = {name: int(some[0]) for name, some in self.options.items()}
        if not cost.of({**self.keep, **least}) <= limit * (1 + 1e-9):
            return least
        problem = self._problem(cost, limit)
        return problem.exact()[0] if cost.separable(self.options) else problem.alternating()

    def _problem(self, cost: CostModel, limit: float) -> _Shared:
        losses = {name: self.curves[name].losses[some] for name, some in self.options.items()}
        return _Shared(cost, limit, self.keep, self.options, losses)

    def budget(self, kind: Cost, cost: CostModel, limit: float, found: dict[str, int]) -> Budget:
        """Report with the prediction, and a bound on it where costs add up."""
        proved = cost.separable(self.options)
        problem = self._problem(cost, limit)
        parts = {name: float(self.curves[name].losses[kept]) for name, kept in found.items()}
        return Budget(
            kind,
            limit,
            dense=cost.dense,
            reached=cost.of({**self.keep, **found}),
            predicted=sum(parts.values()),
            lower_bound=problem.exact()[1] if proved else None,
            comparable=all(curve.comparable for curve in self.curves.values()),
            curves={name: tuple(c.losses.tolist()) for name, c in self.curves.items()},
            widths={
                name: Width(self.kinds[name], len(c.losses) - 1, found[name], parts[name])
                for name, c in self.curves.items()
            },
            frontier=problem.frontier(),
        )


@dataclass(frozen=True, eq=False)
class _Shared:
    """Groups that share a budget: their options, what these lose, and what they cost together."""

    cost: CostModel
    limit: float
    others: Mapping[str, int]
    options: Mapping[str, NDArray[np.int64]]
    losses: Mapping[str, NDArray[np.float64]]

    def exact(self) -> tuple[dict[str, int], float]:
        """Solve the knapsack: costs of groups add up."""
        names = list(self.options)
        slopes = {name: self.cost.slope(name, self.others) for name in names}
        costs = [slopes[name] * self.options[name].astype(float) for name in names]
        nothing = self.cost.of({**self.others, **dict.fromkeys(names, 0)})
        try:
            choice = choose([self.losses[n] for n in names], costs, self.limit - nothing)
        except BudgetError as error:  # by less than rounding, as the least widths were checked
            raise RequestError(f"the budget cannot be met: {error}") from error
        chosen = zip(names, choice.options, strict=True)
        return {name: int(self.options[name][i]) for name, i in chosen}, choice.lower_bound

    def alternating(self) -> dict[str, int]:
        """Choose widths whose costs multiply: one group after the other, at one price for all.

        At a price for the cost, each group in turn takes its best width given the others', until
        none changes; the price is the least that comes within the limit, and what is left of that
        is spent.
        """
        low, high = 0.0, 1e-12
        kept = self._at(high, self._all())
        while self.cost.of(kept) > self.limit and high < 1e300:
            low, high = high, 10 * high
            kept = self._at(high, kept)
        for _ in range(_ROUNDS):
            middle = math.sqrt(max(low, 1e-3 * high) * high)
            found = self._at(middle, self._all())
            if self.cost.of(found) > self.limit:
                low = middle
            else:
                high, kept = middle, found
        return self._spent({name: kept[name] for name in self.options})

    def _all(self) -> dict[str, int]:
        return {**self.others, **{name: int(some[-1]) for name, some in self.options.items()}}

    def _at(self, price: float, start: Mapping[str, int]) -> dict[str, int]:
        kept = dict(start)
        for _ in range(_SWEEPS):
            before = dict(kept)
            for name, some in self.options.items():
                paid = self.losses[name] + price * self.cost.slope(name, kept) * some
                kept[name] = int(some[paid.argmin()])
            if kept == before:
                break
        return kept

    def frontier(self) -> tuple[tuple[float, float], ...]:
        """Return costs of the whole model with the least loss at each, whatever the limit.

        They are the choices at one price of the cost each, from that at which nothing leaves to
        that at which all leaves that may: no choice of the same cost has a smaller loss where costs
        of groups add up.
        """
        low, high = self._prices()
        prices = np.geomspace(low, high, _PRICES).tolist() if high > 0 else []
        choices = [self._all(), *(self._at(price, self._all()) for price in prices)]
        found = {self.cost.of(kept): self._loss(kept) for kept in choices}
        costs = sorted(found)
        chosen = np.unique(np.linspace(0, len(costs) - 1, _FRONTIER).round().astype(int))
        return tuple((costs[i], found[costs[i]]) for i in chosen)

    def _prices(self) -> tuple[float, float]:
        """Return a price below which nothing leaves, and one above which all leaves that may."""
        least = {**self.others, **{name: int(some[0]) for name, some in self.options.items()}}
        low, high = math.inf, 0.0
        for name, some in self.options.items():
            losses, units = self.losses[name], some.astype(float)
            if len(some) > 1:
                first = (losses[:-1] - losses[-1]) / (units[-1] - units[:-1])
                last = (losses[0] - losses[1:]) / (units[1:] - units[0])
                low = min([low, *first[first > 0] / self.cost.slope(name, self._all())])
                high = max(high, float(last.max()) / self.cost.slope(name, least))
        return 0.9 * low, 1.1 * high

    def _loss(self, kept: Mapping[str, int]) -> float:
        indices = {name: np.searchsorted(some, kept[name]) for name, some in self.options.items()}
        return sum(float(self.losses[name][index]) for name, index in indices.items())

    def _spent(self, kept: dict[str, int]) -> dict[str, int]:
        """Widen groups, the one that gains most by its cost first, as far as the limit allows."""
        while True:
            room = self.limit - self.cost.of({**self.others, **kept})
            best: tuple[float, str, int] | None = None
            for name, some in self.options.items():
                slope = self.cost.slope(name, {**self.others, **kept})
                now = int(np.searchsorted(some, kept[name]))
                wider = some[now + 1 :]
                fits = wider[(wider - kept[name]) * slope <= room]
                if len(fits):
                    gain = float(self.losses[name][now] - self.losses[name][now + len(fits)])
                    rate = gain / max(slope * float(fits[-1] - kept[name]), 1e-300)
                    if gain > 0 and (best is None or rate > best[0]):
                        best = rate, name, int(fits[-1])
            if best is None:
                return kept
            kept = {**kept, best[1]: best[2]}


def described(budget: Budget) -> dict[str, object]:
    """Return a budget as JSON-able data, with its gap, and each curve at some of its points."""
    data = {f.name: getattr(budget, f.name) for f in dataclasses.fields(budget)}
    curves: dict[str, dict[str, list[float]]] = {}
    for name, losses in budget.curves.items():
        kept = np.unique(np.linspace(0, len(losses) - 1, _POINTS).round().astype(int)).tolist()
        curves[name] = {"kept": kept, "nats": [float(f"{losses[k]:.6g}") for k in kept]}
    cost, nats = ([float(f"{point[i]:.6g}") for point in budget.frontier] for i in (0, 1))
    return {
        **data,
        "cost": str(budget.cost),
        "curves": curves,
        "widths": {name: dataclasses.asdict(width) for name, width in budget.widths.items()},
        "frontier": {"cost": cost, "nats": nats},
        "gap": budget.gap,
    }
