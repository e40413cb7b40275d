"""How many units each coupling group keeps."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Sequence
from fractions import Fraction

from graph import CouplingGroup
from osscar.core.errors import FrozenGroupError, RequestError
from osscar.pruning.request import PRUNED_KINDS, PruningRequest, parse_keep


def allocate(
    groups: Sequence[CouplingGroup], request: PruningRequest, residual: Collection[str] = ()
) -> dict[str, int]:
    """Decide how many units each group keeps.

    Parameters
    ----------
    groups
        All groups of the model.
    request
        What the user asked for.
    residual
        The names of those groups that are residual streams.

    Returns
    -------
    dict
        Kept units by group name, only for groups that lose some.

    Raises
    ------
    RequestError
        If a count exceeds what exists, a fraction keeps nothing, a named group does not exist, a
        pattern to skip matches none, or in the end nothing would be removed.
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
    skipped = _skipped(by_name, request.skip)
    kept: dict[str, int] = {}
    for group in groups:
        if group.name in skipped:
            continue
        asked = (
            parse_keep(request.groups[group.name])
            if group.name in request.groups
            else request.fraction_or_count(group.kind, group.name in residual)
        )
        if asked is not None and group.prunable and group.units > 1:
            count = _count(group, asked, request.round_to)
            if count < group.units:
                kept[group.name] = count
    if not kept:
        rest = f" but the {len(skipped)} that are skipped" if skipped else ""
        raise RequestError(
            f"nothing would be removed: every group{rest} keeps all its units; ask for a higher "
            f"sparsity{', or skip less' if skipped else ''}"
        )
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
    return _rounded(group, exact, round_to)


def _rounded(group: CouplingGroup, exact: Fraction, round_to: int) -> int:
    """Return the count nearest to `exact` whose width is a multiple of `round_to`."""
    width = min((slot.width for slot in group.slots), default=1)
    step = round_to // math.gcd(round_to, width)
    largest = group.units // step * step
    if largest == 0:
        raise RequestError(
            f"round-to {round_to} cannot be met by {group.name!r}: "
            f"its {group.units} {group.kind} are {group.units * width} wide; give a smaller one"
        )
    return min(max(step, math.floor(exact / step + Fraction(1, 2)) * step), largest)
