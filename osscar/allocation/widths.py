"""Which counts of units a group may keep by itself."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup, UnitKind
from osscar.base.errors import RequestError
from osscar.base.printable import listed
from osscar.request import AUTO, RoundTo, Widths, round_width

SMALL = 128
"""Of layers up to such a width a table of times has all stairs, so that any width is known."""

_MOST_TOLD = 4


def frozen_message(group: CouplingGroup) -> str:
    """Say why a group cannot be pruned."""
    freeze = group.frozen[0]
    return (
        f"group {group.name!r} cannot be pruned: {freeze.reason} "
        f"({freeze.operator or 'graph'} in {freeze.module or 'the model'})"
    )


def count_kept(group: CouplingGroup, asked: Fraction | int, round_to: RoundTo) -> int:
    """Return the units that a group keeps of a count or a share, at a width that is rounded.

    A count is kept as it is where widths are rounded by default.
    """
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
    if not 1 <= count <= group.units:
        raise RequestError(
            f"cannot keep {float(asked):g} of {group.name!r}, which has {group.units} "
            f"{group.kind}: that is {count or 'none'} of them; give 1 to {group.units}, or a "
            "fraction"
        )
    if count == group.units:
        return count
    if round_to == AUTO:
        if isinstance(asked, int):
            return count_kept(group, asked, 1)
        fewer = [int(k) for k in possible_widths(group, Widths(AUTO)) if k < group.units]
        return min(fewer, key=lambda kept: (abs(kept - exact), -kept))
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
    width = unit_width(group)
    step = math.lcm(round_to // math.gcd(round_to, width), group.step)
    largest = group.units // step * step
    if largest == 0:
        raise RequestError(
            f"round-to {round_to} cannot be met by {group.name!r}: "
            f"its {group.units} {group.kind} are {group.units * width} wide; give a smaller "
            f"number, or skip the group (skip {group.name!r}, `--skip {group.name!r}`)"
        )
    return step, largest


def unit_width(group: CouplingGroup) -> int:
    """Return how wide a unit is where it is least."""
    return min((slot.width for slot in group.slots), default=1)


def possible_widths(group: CouplingGroup, widths: Widths) -> NDArray[np.int64]:
    """Return the counts that a group may keep: all of its units, or a width that is round.

    By default half of a step is round, too, and so is the least that it may keep.
    """
    fewest = max(widths.least(group.units), group.fewest)
    if widths.round_to != AUTO:
        step, largest = _steps(group, widths.round_to)
        least = -(-fewest // step) * step
        return np.unique([*range(least, largest + 1, step), group.units])
    alone, largest = _steps(group, 1)
    least = -(-fewest // alone) * alone
    width = unit_width(group)
    to = (
        1 if group.kind is UnitKind.HEADS or group.kind.routed else round_width(group.units * width)
    )
    step = math.lcm(to // math.gcd(to, width), alone)
    steps = range(step, largest + 1, step)
    round_ones = [least, *(step // 2 for _ in steps[:1] if step // 2 % alone == 0), *steps]
    return np.unique([*(kept for kept in round_ones if least <= kept <= largest), group.units])


def about_half(group: CouplingGroup, widths: Widths, place: int = 0) -> int:
    """Return a width near half, of those that the group may have, that divides it least.

    Any width is tried where they are rounded by default.

    Widths that divide all units hide numbers in the code: `view(-1, 64)` takes 32 channels of two
    samples for those of one.  `place` counts down the next best, so that two groups get two widths.
    """
    units = group.units
    if widths.round_to == AUTO:
        widths = replace(widths, round_to=1)
    fewer = [int(kept) for kept in possible_widths(group, widths) if kept < units]
    fewer.sort(key=lambda kept: (math.gcd(kept, units), abs(2 * kept - units), -kept))
    return fewer[min(place, len(fewer) - 1)] if fewer else units


def why_frozen(groups: Sequence[CouplingGroup]) -> str:
    """Say why groups cannot be pruned, if none can; those of repeated blocks once."""
    if any(group.prunable and group.units > 1 for group in groups):
        return ""
    frozen = {re.sub(r"\d+", "", g.name): frozen_message(g) for g in reversed(groups) if g.frozen}
    if not frozen:
        return ""
    told = "; ".join([*frozen.values()][::-1][:_MOST_TOLD])
    return f"no group of this model can be pruned; `osscar inspect` lists them: {told}"
