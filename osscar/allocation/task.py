"""A pruning task: a prepared model, what a request asks of it, and the widths of its groups."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import with_config

from graph import CouplingGroup, UnitKind
from osscar.allocation.costs import CountedCost
from osscar.base.errors import RequestError
from osscar.base.json_files import STRICT
from osscar.base.printable import listed
from osscar.data.parts import held_out
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import Form
from osscar.request import AUTO, Keep, PruningRequest, RoundTo, Widths, parse_keep, round_width
from osscar.walk.targets import Target

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
    if round_to == AUTO and not isinstance(asked, int):
        some = [int(kept) for kept in possible_widths(group, Widths(AUTO)) if kept < group.units]
    else:
        step, largest = _steps(group, 1 if round_to == AUTO else round_to)
        some = [*range(step, largest + 1, step)]
    return min(some, key=lambda kept: (abs(kept - exact), -kept))


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


# ---- tasks -------------------------------------------------------------------------------


_STREAM_SHARES = [Fraction(eighths, 8) for eighths in range(7, 1, -1)]
"""Of the channels of residual streams that are tried, below all."""

_TRIED_SHARE = Fraction(3, 4)
"""Of these channels in the trial of what can follow."""


@with_config(STRICT)
@dataclass(frozen=True)
class SkippedGroup:
    """A group that keeps all its units: something around it cannot work with fewer.

    Parameters
    ----------
    name, kind, units
        The group.
    reason
        What failed on trial, mostly with the module and its line of code.
    """

    name: str
    kind: str
    units: int
    reason: str


@dataclass(frozen=True, eq=False)
class PruningTask:
    """A prepared model, and what a request asks of it.

    A `RequestError` is raised where the request makes no sense for the groups of this model.
    """

    prepared: Prepared
    request: PruningRequest
    form: Form = Form.EAGER
    """What of the model is shrunk, as was found on trial."""
    skipped: tuple[SkippedGroup, ...] = ()
    """The groups that cannot lose units in this form, in the order of the model."""
    narrowest: Mapping[str, int] = field(default_factory=dict)
    """The fewest units of groups that budgets can choose, where code was seen to take no fewer."""
    matrix_bytes: int = 0
    """Memory that a cache of weights on disk leaves to the problem of a layer; 0 without one."""
    times: CountedCost | None = None
    """Shares of the dense model's time, a limit of which is what a speed-up stands for; without,
    whole models are timed."""
    stream_share: Fraction | None = None
    """The channels that residual streams keep of which the request says nothing; all, if None."""

    @property
    def measures_curves(self) -> bool:
        """Whether a budget is shared out by loss curves."""
        return self.request.has_budget and self.request.allocation != "uniform"

    @property
    def in_bfloat16(self) -> tuple[str, ...]:
        """What is computed in bfloat16, in words."""
        asked = {
            "loss curves": self.measures_curves and bool(self.shared),
            "the dense model's part of the targets": Target(self.request.target).needs_dense,
        }
        return tuple(
            what for what, is_asked in asked.items() if is_asked and self.prepared.bfloat16
        )

    @property
    def samples_held_out(self) -> int:
        """How many samples are held out: none if the request gives damping and correction."""
        inputs = self.prepared.inputs
        return inputs.last(held_out(inputs.samples)) if self.request.holds_out else 0

    @cached_property
    def groups(self) -> list[CouplingGroup]:
        """The groups within reach, none of which is skipped; what the request names has to exist.

        Those that are routed are looked for if the request is about them.
        """
        prepared, request = self.prepared, self.request
        groups = prepared.every_group if request.routed else prepared.groups
        residual = prepared.residual
        by_name = {group.name: group for group in groups}
        for name in request.groups:
            if name not in by_name:
                for group in (one for one in prepared.every_group if one.name == name):
                    raise RequestError(
                        f"groups names {name!r}, and {group.kind} are pruned only with "
                        f"{group.kind} (`--{group.kind}`); give it, too ('all' keeps all "
                        "units of the other groups)"
                    )
                raise RequestError(f"there is no group {name!r}; `osscar inspect` lists the groups")
            if by_name[name].frozen:
                raise RequestError(frozen_message(by_name[name]))
        if request.residual is not None:
            _check_some("residual channels", [one for one in groups if one.name in residual])
        for kind in UnitKind:
            if getattr(request, kind, None) is not None:
                own = [one for one in groups if one.kind is kind and one.name not in residual]
                _check_some(kind, own)
        skipped = {group.name for group in self.skipped}
        for pattern in request.skip:
            matched = fnmatch.filter(by_name, pattern)
            if not matched:
                raise RequestError(
                    f"no group is called {pattern!r}, which skip (`--skip`) names; `osscar "
                    f"inspect` lists "
                    "the groups"
                )
            skipped.update(matched)
        return [group for group in groups if group.name not in skipped]

    @cached_property
    def keep(self) -> dict[str, int]:
        """What groups keep of which the request says so, by name or kind."""
        requested = [(group, self._requested(group)) for group in self._prunable]
        if self.stream_share is not None:
            requested += ((group, self.stream_share) for group in self.streams)
        return {
            group.name: count_kept(group, kept, self.request.round_to)
            for group, kept in requested
            if kept is not None
        }

    @cached_property
    def shared(self) -> list[CouplingGroup]:
        """The groups that share a budget, by whose widths this is met."""
        return [group for group in self._unnamed if group.name not in self.prepared.residual]

    @cached_property
    def streams(self) -> list[CouplingGroup]:
        """The residual streams of which a budget may take the same share of channels."""
        if not self.measures_curves or self.request.residual is not None:
            return []
        return [group for group in self._unnamed if group.name in self.prepared.residual]

    @cached_property
    def with_streams(self) -> list[PruningTask]:
        """The same task for each share of their channels that streams may keep, all first.

        What streams lose is not seen by one group alone, as for others (`whole_distance`).
        """
        fewest = {group.name: self.widths.least(group.units) for group in self.streams}
        found = [self]
        for share in _STREAM_SHARES if fewest else ():
            one = replace(self, stream_share=share)
            if (
                all(fewest[name] <= one.keep[name] for name in fewest)
                and one.keep != found[-1].keep
            ):
                found.append(one)
        return found

    @property
    def widths(self) -> Widths:
        """The widths that groups that share a budget may have."""
        return self.request.widths

    @cached_property
    def options(self) -> dict[str, NDArray[np.int64]]:
        """The widths that each group that shares a budget may have, ascending.

        By default they are any where `times` tell them apart.
        """
        found, by_time = {}, self.times is not None and self.widths.round_to == AUTO
        for group in self.shared:
            any_width = by_time and group.units * unit_width(group) <= SMALL
            widths = replace(self.widths, round_to=1) if any_width else self.widths
            found[group.name] = self.possible(group, widths)
        return found

    def possible(self, group: CouplingGroup, widths: Widths) -> NDArray[np.int64]:
        """Return which of some widths a group may have, ascending: those that its code takes."""
        found = possible_widths(group, widths)
        return found[found >= self.narrowest.get(group.name, 1)]

    @property
    def least(self) -> dict[str, int]:
        """The least of these widths."""
        return {name: int(some[0]) for name, some in self.options.items()}

    @property
    def counted(self) -> list[CouplingGroup]:
        """The groups by which costs are counted: all that are traced, and routed ones to shrink.

        A mixture that keeps all its experts is left out: each of these may lose neurons.
        """
        others = (group for group in self.groups if group.kind.routed)
        names = self.keep.keys() | self.options.keys()
        return [*self.prepared.groups, *(group for group in others if group.name in names)]

    @cached_property
    def provisional(self) -> dict[str, int]:
        """What groups may come to keep: as requested, or about half where they share a budget."""
        keep = dict(self.keep)
        before: Counter[int] = Counter()
        for group in self.shared if self.request.has_budget else ():
            keep[group.name] = about_half(group, self.widths, before[group.units] % 2)
            before[group.units] += 1
        for group in self.streams:
            keep[group.name] = count_kept(group, _TRIED_SHARE, 1)
        return keep

    @property
    def _unnamed(self) -> list[CouplingGroup]:
        """The groups of the kinds that a budget prunes of which the request says nothing."""
        kinds = self.request.shared_kinds
        return [g for g in self._prunable if self._requested(g) is None and g.kind in kinds]

    @property
    def _prunable(self) -> list[CouplingGroup]:
        return [group for group in self.groups if group.prunable and group.units > 1]

    def _requested(self, group: CouplingGroup) -> Fraction | int | None:
        """Return what the request says of a group, by its name or its kind."""
        kept: Keep | None
        if group.name in self.request.groups:
            kept = self.request.groups[group.name]
        elif group.name in self.prepared.residual:
            kept = self.request.residual
        else:
            kept = getattr(self.request, group.kind, None)
        return None if kept is None or kept == AUTO else parse_keep(kept)


def _check_some(what: str, groups: Sequence[CouplingGroup]) -> None:
    if not groups:
        raise RequestError(f"this model has no group of {what}; `osscar inspect` lists the groups")
    if not any(group.prunable for group in groups):
        raise RequestError(frozen_message(groups[0]))
