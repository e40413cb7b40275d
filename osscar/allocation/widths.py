"""Which groups a request reaches, and what each may keep by itself."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup, UnitKind
from osscar.base.errors import RequestError
from osscar.base.printable import listed, pluralize
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest, Widths, parse_keep

_MOST_TOLD = 4

# ---- which groups ------------------------------------------------------------------------


def asked_groups(
    prepared: Prepared, request: PruningRequest, left: Collection[str] = ()
) -> tuple[list[CouplingGroup], dict[str, int], list[CouplingGroup]]:
    """Return the groups within reach, what some keep by name or kind, and those with a budget."""
    residual = prepared.residual
    _check_routed(prepared, request)
    groups = _reachable(reached_groups(prepared, request), request, residual, left)
    shared = [group for group in groups if shares(group, request, residual)]
    return groups, _kept_by_name(groups, request, residual), shared


def reached_groups(prepared: Prepared, request: PruningRequest) -> tuple[CouplingGroup, ...]:
    """Return the groups that a request is about: those that are routed are looked for if asked."""
    return prepared.every_group if request.routed else prepared.groups


def _check_routed(prepared: Prepared, request: PruningRequest) -> None:
    """Refuse whole experts of one mixture where it is not said what the others keep."""
    others = set(request.groups) - {group.name for group in prepared.groups}
    if not others or request.routed:
        return
    for group in prepared.every_group:
        if group.name in others:
            raise RequestError(
                f"groups names {group.name!r}, and {group.kind} are pruned only with "
                f"--{group.kind}; give it, too, 1.0 to keep those of all other groups"
            )


def _reachable(
    groups: Sequence[CouplingGroup],
    request: PruningRequest,
    residual: Collection[str] = (),
    left: Collection[str] = (),
) -> list[CouplingGroup]:
    """Return the groups that are neither skipped nor left; what the request names has to exist."""
    by_name = {group.name: group for group in groups}
    for name in request.groups:
        if name not in by_name:
            raise RequestError(f"there is no group {name!r}; `osscar inspect` lists the groups")
        if by_name[name].frozen:
            raise RequestError(_frozen_message(by_name[name]))
    _check_kinds(groups, request, residual)
    skipped = _skipped(by_name, request.skip) | set(left)
    return [group for group in groups if group.name not in skipped]


def shares(group: CouplingGroup, request: PruningRequest, residual: Collection[str]) -> bool:
    """Whether a group shares the budget: nobody has said what it keeps."""
    return (
        group.prunable
        and group.units > 1
        and group.kind in request.shared_kinds
        and group.name not in residual
        and group.name not in request.groups
        and request.of_kind(group.kind) is None
    )


def _kept_by_name(
    groups: Sequence[CouplingGroup], request: PruningRequest, residual: Collection[str] = ()
) -> dict[str, int]:
    """Return what those groups keep of which the request says so, by name or by kind."""
    kept: dict[str, int] = {}
    for group in groups:
        asked = (
            parse_keep(request.groups[group.name])
            if group.name in request.groups
            else request.fraction_or_count(group.kind, group.name in residual)
        )
        if asked is not None and group.prunable and group.units > 1:
            kept[group.name] = count_kept(group, asked, request.round_to)
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
    for kind in UnitKind:
        if getattr(request, kind, None) is not None:
            _check_some(kind, [g for g in groups if g.kind is kind and g not in streams])


def _check_some(what: str, groups: Sequence[CouplingGroup]) -> None:
    if not groups:
        raise RequestError(f"this model has no group of {what}; `osscar inspect` lists the groups")
    if not any(group.prunable for group in groups):
        raise RequestError(_frozen_message(groups[0]))


def _frozen_message(group: CouplingGroup) -> str:
    """Say why a group cannot be pruned."""
    freeze = group.frozen[0]
    return (
        f"group {group.name!r} cannot be pruned: {freeze.reason} "
        f"({freeze.operator or 'graph'} in {freeze.module or 'the model'})"
    )


# ---- a count or a fraction of each group -------------------------------------------------


def count_kept(group: CouplingGroup, asked: Fraction | int, round_to: int) -> int:
    """Return the units that a group keeps of a count or a share, at a width that is rounded."""
    if group.kind.routed:
        return _count_exactly(group, asked)
    if isinstance(asked, int):
        if asked > group.units:
            raise RequestError(
                f"cannot keep {pluralize(asked, 'unit')} of {group.name!r}, which has "
                f"{group.units} {group.kind}"
            )
        exact = Fraction(asked)
    else:
        exact = asked * group.units
    # Half a unit rounds up: rather keep one more than one less.
    count = math.floor(exact + Fraction(1, 2))
    if count < 1:
        raise RequestError(
            f"keeping {float(asked):g} of the {group.units} {group.kind} of {group.name!r} "
            "keeps none; keep a larger fraction"
        )
    if count == group.units:
        return count
    step, largest = _steps(group, round_to)
    if step == 1:
        return count
    return min(max(step, math.floor(exact / step + Fraction(1, 2)) * step), largest)


def _count_exactly(group: CouplingGroup, asked: Fraction | int) -> int:
    """Return the units that stay of a count or a share, among which a router has to choose."""
    count = asked if isinstance(asked, int) else math.floor(asked * group.units + Fraction(1, 2))
    if count % group.step or not group.fewest <= count <= group.units:
        raise RequestError(
            f"{group.name!r} would keep {count} of its {group.units} {group.kind}; its router "
            f"needs {group.fewest} at least: {possible_counts(group)}"
        )
    return count


def possible_counts(group: CouplingGroup) -> str:
    """Say how many units of a group that is routed can stay."""
    if group.step == 1:
        return f"it can keep {group.fewest} to {group.units}"
    several = range(group.fewest, group.units + 1, group.step)
    counts = listed([*map(str, several)], 8, " or ")
    return f"it can keep {counts}, as many in each of {group.step} groups"


def _steps(group: CouplingGroup, round_to: int) -> tuple[int, int]:
    """Return by how many units the width moves to stay a multiple of `round_to`, and the most.

    Kernels may ask for longer steps.
    """
    if group.kind.routed:
        round_to = 1  # which is about widths of matrices
    width = min((slot.width for slot in group.slots), default=1)
    step = math.lcm(round_to // math.gcd(round_to, width), group.step)
    largest = group.units // step * step
    if largest == 0:
        raise RequestError(
            f"round-to {round_to} cannot be met by {group.name!r}: "
            f"its {group.units} {group.kind} are {group.units * width} wide; give a smaller "
            f"number, or skip the group (--skip {group.name!r})"
        )
    return step, largest


def possible_widths(group: CouplingGroup, widths: Widths) -> NDArray[np.int64]:
    """Return the counts that a group may keep: all of its units, or a width that is round."""
    step, largest = _steps(group, widths.round_to)
    least = -(-max(widths.least(group.units), group.fewest) // step) * step
    return np.unique([*range(least, largest + 1, step), group.units])


def about_half(group: CouplingGroup, widths: Widths, place: int = 0) -> int:
    """Return a width near half, of those that the group may have, that divides it least.

    A number in the code that stands for all units is hidden by what divides it: `view(-1, 64)`
    takes 32 channels of two samples for those of one.  `place` counts down the next best, so that
    one number does not serve two groups.
    """
    units = group.units
    fewer = [int(kept) for kept in possible_widths(group, widths) if kept < units]
    fewer.sort(key=lambda kept: (math.gcd(kept, units), abs(2 * kept - units), -kept))
    return fewer[min(place, len(fewer) - 1)] if fewer else units


def why_out_of_reach(
    groups: Sequence[CouplingGroup], request: PruningRequest, residual: Collection[str]
) -> str:
    """Say why a budget reaches none of the groups."""
    others = [group for group in groups if group.prunable and group.units > 1]
    named = _kept_by_name(groups, request, residual)
    if any(group.name in named for group in others):
        return (
            f"{request.in_words(request.budgets)} has nothing to prune: other options say what to "
            "keep of every group that a budget prunes; omit one of these, or the budget"
        )
    if not others:
        return why_frozen(groups) or (
            "nothing can be removed: the model has no group whose units can be pruned; `osscar "
            "inspect` lists its groups, and why each is frozen"
        )
    told = [f"{g.name!r} ({pluralize(g.units, 'unit')})" for g in others]
    streams = any(group.name in residual for group in others)
    return (
        "a budget prunes heads, neurons and channels, and there are none; other groups can be "
        f"pruned, {listed(told)}: say what to keep of them, such as by "
        f"{'residual=0.5, or ' if streams else ''}groups={{{others[0].name!r}: 0.5}} in Python"
    )


def why_frozen(groups: Sequence[CouplingGroup]) -> str:
    """Say why groups cannot be pruned, if none can; those of repeated blocks once."""
    if any(group.prunable and group.units > 1 for group in groups):
        return ""
    frozen = {re.sub(r"\d+", "", g.name): _frozen_message(g) for g in reversed(groups) if g.frozen}
    if not frozen:
        return ""
    told = "; ".join([*frozen.values()][::-1][:_MOST_TOLD])
    return f"no group of this model can be pruned; `osscar inspect` lists them: {told}"
