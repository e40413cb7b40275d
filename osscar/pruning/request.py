"""How many units each coupling group keeps."""

from __future__ import annotations

import fnmatch
import math
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from graph.groups import CouplingGroup, UnitKind
from osscar.core.errors import FrozenGroupError, TargetError

PRUNED_KINDS = (UnitKind.HEADS, UnitKind.NEURONS, UnitKind.CHANNELS)
"""What `sparsity` applies to, residual channels left out."""

_NUMBER = re.compile(
    r"[+-]?(\d{1,18}/\d{1,18}|(\d{1,18}\.?\d{0,18}|\.\d{1,18})([eE][+-]?\d{1,3})?)"
)
_LARGEST_COUNT = 10**18

Keep = str | int | float | Fraction
"""A count of units (an int, or a string such as ``"512"``) or the fraction of them to keep."""


@dataclass(frozen=True)
class Targets:
    """What a user asked to keep.

    Parameters
    ----------
    sparsity
        Share of the heads, of the neurons and of the channels to remove, in (0, 1).
    heads, neurons, channels
        What to keep of each kind, instead of ``1 - sparsity``; a kind that neither names is left
        alone.
    residual
        What to keep of residual streams, which all other options leave alone.
    groups
        What to keep of single groups, by name; takes precedence over the others.
    round_to
        Kept width (units times rows a unit) is rounded to a multiple of this.
    skip
        Patterns, as of `fnmatch`, for the names of groups that are left alone whatever else is
        asked.

    Raises
    ------
    TargetError
        If nothing is asked for, or a number makes no sense.

    Examples
    --------
    >>> Targets(neurons="2/3").fraction_or_count(UnitKind.NEURONS)
    Fraction(2, 3)
    """

    sparsity: float | None = None
    heads: Keep | None = None
    neurons: Keep | None = None
    channels: Keep | None = None
    residual: Keep | None = None
    groups: Mapping[str, Keep] = field(default_factory=dict)
    round_to: int = 1
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        sparsity, round_to = self.sparsity, self.round_to
        if sparsity is not None and not (_is(sparsity, numbers.Real) and 0 < sparsity < 1):
            raise TargetError(
                f"sparsity is {sparsity!r}; give the share to remove, a number above 0 and below 1"
            )
        if not (_is(round_to, numbers.Integral) and round_to >= 1):
            raise TargetError(f"round-to is {round_to!r}; give a whole number from 1")
        self._check_names()
        if self.sparsity is None and not any(self._asked) and not self.groups:
            raise TargetError(
                "nothing to prune: give --sparsity, or what to keep with --heads, --neurons, "
                "--channels or --residual"
            )
        for keep in (*(asked for asked in self._asked if asked is not None), *self.groups.values()):
            parse_keep(keep)

    def _check_names(self) -> None:
        if not isinstance(self.groups, Mapping):
            raise TargetError(
                f"groups is {self.groups!r}; give a mapping of names to what to keep, such as "
                "{'h.0.neurons': 0.5}"
            )
        if isinstance(self.skip, str) or not all(isinstance(p, str) and p for p in self.skip):
            raise TargetError(
                f"skip is {self.skip!r}; give a list of patterns for names of groups, such as "
                "['h.0.*']"
            )

    @property
    def _asked(self) -> tuple[Keep | None, ...]:
        return self.heads, self.neurons, self.channels, self.residual

    def of_kind(self, kind: UnitKind) -> Keep | None:
        """Return what was asked for one kind by name."""
        named = {
            UnitKind.HEADS: self.heads,
            UnitKind.NEURONS: self.neurons,
            UnitKind.CHANNELS: self.channels,
        }
        return named.get(kind)

    def reach(self, kind: UnitKind) -> bool:
        """Tell whether groups of a kind may lose units."""
        return bool(self.groups) or self.fraction_or_count(kind) is not None

    def fraction_or_count(self, kind: UnitKind, residual: bool = False) -> Fraction | int | None:
        """Return what is asked of a kind: a fraction, a count, or None to leave it alone."""
        own = self.residual if residual else self.of_kind(kind)
        if own is not None:
            return parse_keep(own)
        if self.sparsity is not None and kind in PRUNED_KINDS and not residual:
            return 1 - Fraction(str(self.sparsity))
        return None


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def parse_keep(value: Keep) -> Fraction | int:
    """Read what to keep: ``"0.7"``, ``"2/3"`` and ``0.7`` are fractions, ``"512"`` and 512 counts.

    Raises
    ------
    TargetError
        If it is neither, or outside of what a fraction or a count can be.
    """
    unreadable = "as what to keep; give a fraction such as 0.7 or 2/3, or a count"
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise TargetError(f"cannot read {value!r:.60} {unreadable}")
    if isinstance(value, numbers.Real) and not abs(value) < _LARGEST_COUNT:
        raise TargetError(f"cannot keep more than {_LARGEST_COUNT} units, nor NaN of them")
    text = str(value).strip()
    # Digits are counted before anyone computes with them: 1e-99999999 takes hours.
    if not isinstance(value, numbers.Real) and not _NUMBER.fullmatch(text):
        raise TargetError(f"cannot read {text[:60]!r} {unreadable}")
    if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", text):
        if int(text) < 1:
            raise TargetError(f"cannot keep {text} units; keep at least 1")
        return int(text)
    try:
        fraction = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise TargetError(f"cannot read {text!r} {unreadable}") from None
    if not 0 < fraction <= 1:
        raise TargetError(f"cannot keep the fraction {text}; give one above 0 and at most 1")
    return fraction


def allocate(
    groups: Sequence[CouplingGroup], targets: Targets, residual: Collection[str] = ()
) -> dict[str, int]:
    """Decide how many units each group keeps.

    Parameters
    ----------
    groups
        All groups of the model.
    targets
        What the user asked for.
    residual
        The names of those groups that are residual streams.

    Returns
    -------
    dict
        Kept units by group name, only for groups that lose some.

    Raises
    ------
    TargetError
        If a count exceeds what exists, a fraction keeps nothing, a named group does not exist, a
        pattern to skip matches none, or in the end nothing would be removed.
    FrozenGroupError
        If what was asked for is frozen everywhere, or a frozen group was named.
    """
    by_name = {group.name: group for group in groups}
    for name in targets.groups:
        if name not in by_name:
            raise TargetError(f"there is no group {name!r}; `osscar inspect` lists the groups")
        if by_name[name].frozen:
            raise FrozenGroupError(_frozen_message(by_name[name]))
    _check_kinds(groups, targets, residual)
    skipped = _skipped(by_name, targets.skip)
    kept: dict[str, int] = {}
    for group in groups:
        if group.name in skipped:
            continue
        asked = (
            parse_keep(targets.groups[group.name])
            if group.name in targets.groups
            else targets.fraction_or_count(group.kind, group.name in residual)
        )
        if asked is not None and group.prunable and group.units > 1:
            count = _count(group, asked, targets.round_to)
            if count < group.units:
                kept[group.name] = count
    if not kept:
        rest = f" but the {len(skipped)} that are skipped" if skipped else ""
        raise TargetError(
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
            raise TargetError(
                f"no group is called {pattern!r}, which --skip names; `osscar inspect` lists the "
                "groups"
            )
        skipped.update(matched)
    return skipped


def _check_kinds(
    groups: Sequence[CouplingGroup], targets: Targets, residual: Collection[str]
) -> None:
    streams = [group for group in groups if group.name in residual]
    if targets.residual is not None:
        _check_some("residual channels", streams)
    for kind in PRUNED_KINDS:
        if targets.of_kind(kind) is not None:
            _check_some(kind, [g for g in groups if g.kind is kind and g not in streams])


def _check_some(what: str, groups: Sequence[CouplingGroup]) -> None:
    if not groups:
        raise TargetError(f"this model has no group of {what}; `osscar inspect` lists the groups")
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
            raise TargetError(
                f"cannot keep {asked} units of {group.name!r}, which has {group.units} {group.kind}"
            )
        exact = Fraction(asked)
    else:
        exact = asked * group.units
    # Half a unit rounds up: rather keep one more than one less.
    count = math.floor(exact + Fraction(1, 2))
    if count < 1:
        raise TargetError(
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
        raise TargetError(
            f"round-to {round_to} cannot be met by {group.name!r}: "
            f"its {group.units} {group.kind} are {group.units * width} wide; give a smaller one"
        )
    return min(max(step, math.floor(exact / step + Fraction(1, 2)) * step), largest)
