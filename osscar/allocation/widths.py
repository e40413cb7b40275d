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
    """Return the groups within reach, what some keep by name or kind, and those with a budget.

    Groups that are skipped or `left` are out of reach; what the request names has to exist.
    """
    groups, residual = reached_groups(prepared, request), prepared.residual
    by_name = {group.name: group for group in groups}
    for name in request.groups:
        if name not in by_name:
            for group in (one for one in prepared.every_group if one.name == name):
                raise RequestError(
                    f"groups names {name!r}, and {group.kind} are pruned only with "
                    f"--{group.kind}; give it, too, 1.0 to keep those of all other groups"
                )
            raise RequestError(f"there is no group {name!r}; `osscar inspect` lists the groups")
        if by_name[name].frozen:
            raise RequestError(_frozen_message(by_name[name]))
    if request.residual is not None:
        _check_some("residual channels", [one for one in groups if one.name in residual])
    for kind in UnitKind:
        if getattr(request, kind, None) is not None:
            own = [one for one in groups if one.kind is kind and one.name not in residual]
            _check_some(kind, own)
    skipped = set(left)
    for pattern in request.skip:
        matched = fnmatch.filter(by_name, pattern)
        if not matched:
            raise RequestError(
                f"no group is called {pattern!r}, which --skip names; `osscar inspect` lists the "
                "groups"
            )
        skipped.update(matched)
    reachable = [group for group in groups if group.name not in skipped]
    kept: dict[str, int] = {}
    shared = []
    for group in reachable:
        if not group.prunable or group.units == 1:
            continue
        name = group.name
        asked = request.fraction_or_count(group.kind, name in residual)
        if name in request.groups:
            asked = parse_keep(request.groups[name])
        if asked is not None:
            kept[name] = count_kept(group, asked, request.round_to)
        elif group.kind in request.shared_kinds and name not in residual:
            shared.append(group)
    return reachable, kept, shared


def reached_groups(prepared: Prepared, request: PruningRequest) -> tuple[CouplingGroup, ...]:
    """Return the groups that a request is about: those that are routed are looked for if asked."""
    return prepared.every_group if request.routed else prepared.groups


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
    exact = Fraction(asked) if isinstance(asked, int) else asked * group.units
    # Half a unit rounds up: rather keep one more than one less.
    count = math.floor(exact + Fraction(1, 2))
    if group.kind.routed:  # among the units that stay a router has to choose
        if count % group.step or not group.fewest <= count <= group.units:
            raise RequestError(
                f"{group.name!r} would keep {count} of its {group.units} {group.kind}; its router "
                f"needs {group.fewest} at least: {possible_counts(group)}"
            )
        return count
    if count > group.units:
        raise RequestError(
            f"cannot keep {pluralize(count, 'unit')} of {group.name!r}, which has "
            f"{group.units} {group.kind}"
        )
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

    Widths that divide all units hide numbers in the code: `view(-1, 64)` takes 32 channels of two
    samples for those of one.  `place` counts down the next best, so that two groups get two widths.
    """
    units = group.units
    fewer = [int(kept) for kept in possible_widths(group, widths) if kept < units]
    fewer.sort(key=lambda kept: (math.gcd(kept, units), abs(2 * kept - units), -kept))
    return fewer[min(place, len(fewer) - 1)] if fewer else units


def why_out_of_reach(
    groups: Sequence[CouplingGroup],
    request: PruningRequest,
    kept: Collection[str],
    residual: Collection[str],
) -> str:
    """Say why a budget reaches none of the groups, of which some are kept by name or kind."""
    others = [group for group in groups if group.prunable and group.units > 1]
    if kept:
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
