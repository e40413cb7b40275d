"""A pruning task: a prepared model, and what a request asks of it."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import with_config

from graph import CouplingGroup, UnitKind
from osscar.allocation.costs import CountedCost
from osscar.allocation.widths import (
    SMALL,
    about_half,
    count_kept,
    frozen_message,
    possible_widths,
    unit_width,
)
from osscar.base.errors import RequestError
from osscar.base.json_files import STRICT
from osscar.data.parts import held_out
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import Form
from osscar.request import AUTO, Keep, PruningRequest, Widths, parse_keep
from osscar.walk.targets import Target

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
                        f"{group.kind} (`--{group.kind}`); give it, too (1.0 keeps all "
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

        What streams lose is not seen by one group alone, as for others (`osscar.allocation.whole`).
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
            found[group.name] = possible_widths(group, widths)
        return found

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
