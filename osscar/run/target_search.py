"""Which size is tried next to find the smallest model of a quality, and what became of each.

Curves predict a distance for each cost of the model, and what is measured after a walk is about a
multiple of it: refits make up for one another, so that it is mostly less.  The first size is where
the multiple is assumed to be a usual one; the second, where it is that of the first walk; each
other is where a line through the two nearest walks, in logarithms, meets the target (the secant
method).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from osscar.allocation.costs import Cost
from osscar.allocation.divergence import Measure
from osscar.base.json_files import STRICT
from osscar.base.printable import pluralize, share
from osscar.evaluation.confidence import Bounded
from osscar.request import TargetKind

MOST_WALKS = 4

_USUAL = {False: 0.8, True: 0.4}
"""Of the bound that is measured to what was predicted, without recovery and with it: a guess."""

_AIM, _AIM_BETWEEN = (0.95, 0.7, 0.3), 0.98
"""Of the target: what a walk is to come to, after one, two and three that are beyond it, and where
others tell the slope."""

_SLOPE = {False: 1.0, True: 1.3}
"""Power of what is predicted that the bound goes with, taken from a model beyond the target, and
from one within it: what overshoots is then the larger model."""

_SLOPES = 0.5, 3.0
"""Between what it is taken to be where two walks tell it."""

_APART = 0.02
"""Two predictions that tell it differ by so much, in logarithms."""

_STEP = 5.0
"""By which a prediction is corrected at most."""

_FLOOR = 0.01
"""Of the target: a bound below it, which may be negative, is taken for this."""

_LEAST = 1e-7
"""Of a predicted distance: less is rounding."""

_GAIN = 0.01
"""Of what the dense model costs: a walk that would save less is not made."""

Frontier = Sequence[tuple[float, float]]
"""Costs of the whole model, ascending, with the least predicted distance at each."""


@dataclass(frozen=True)
class TargetWalk:
    """One size that was tried.

    Parameters
    ----------
    limit, reached
        What the model was allowed to cost, and what it does.
    predicted
        Its distance from the dense one, by the curves.
    measured
        The quality lost on the samples that choose a size, after the recovery if there was one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    limit: float
    reached: float
    predicted: float
    measured: Bounded


@dataclass(frozen=True)
class TargetReport:
    """The sizes that were tried, and which is the smallest of the quality that was asked for.

    Parameters
    ----------
    quality, most
        What may be lost, and how much of it.
    measure
        What a divergence is counted in.
    cost, dense
        What sizes are counted in, and that of the dense model.
    walks
        In the order in which they were made.
    reported
        The quality that the chosen model has lost on samples that no choice has seen.
    """

    quality: TargetKind
    most: float
    measure: Measure
    cost: Cost
    dense: float
    walks: tuple[TargetWalk, ...]
    reported: Bounded | None = None

    @property
    def chosen(self) -> int | None:
        """The index of the smallest model whose bound is within the target; None without one."""
        best = smallest_within(self.walks, self.most)
        return None if best is None else self.walks.index(best)

    @property
    def nearest(self) -> int:
        """The index of the model whose bound is the least."""
        bounds = [one.measured.bound for one in self.walks]
        return bounds.index(min(bounds))

    def in_words(self, index: int) -> str:
        """Say what a walk has come to."""
        walk = self.walks[index]
        kept = f"{share(walk.reached / self.dense)} of {self.cost}"
        return f"{kept}, {lost_in_words(self.quality, walk.measured, self.measure)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data, with what is chosen."""
        return {**dataclasses.asdict(self), "cost": str(self.cost), "chosen": self.chosen}


def amount(quality: TargetKind, lost: float, measure: Measure = "nats") -> str:
    """Write how much of a quality is lost."""
    if quality is TargetKind.DIVERGENCE:
        return f"{lost:.3g} {'nats' if measure == 'nats' else 'of the squared outputs'}"
    if quality is TargetKind.PERPLEXITY:
        return f"{lost:.2%} more perplexity"
    return f"{100 * lost:.2f} points of top-1"


def lost_in_words(
    kind: TargetKind, lost: Bounded, measure: Measure = "nats", what: str = "samples"
) -> str:
    """Say how much of a quality is lost on some samples, and at most on others."""
    found, most = (amount(kind, one, measure) for one in (lost.value, lost.bound))
    return f"{found} on {lost.samples} {what}, at most {most} with 95 % confidence"


def target_in_words(target: Mapping[str, Any]) -> str:
    """Say which of the sizes was chosen, of the ``target`` of an ``osscar.prune/5``."""
    kind, measure = TargetKind(target["quality"]), target["measure"]
    walk, walks = target["walks"][target["chosen"]], len(target["walks"])
    kept = share(walk["reached"] / target["dense"])
    lost = lost_in_words(kind, Bounded(**walk["measured"]), measure)
    return (
        f"at most {amount(kind, target['most'], measure)}; the smallest model within it, of "
        f"{pluralize(walks, 'walk')}, keeps {kept} of {target['cost']}: {lost}"
    )


def reported_in_words(target: Mapping[str, Any]) -> str:
    """Say what the chosen model has lost where no choice was made."""
    kind, lost = TargetKind(target["quality"]), Bounded(**target["reported"])
    return lost_in_words(kind, lost, target["measure"], "samples that no choice has seen")


def smallest_within(walks: Sequence[TargetWalk], most: float) -> TargetWalk | None:
    """Return the smallest model whose bound is within a target; None if there is none."""
    within = [one for one in walks if one.measured.bound <= most]
    return min(within, key=lambda one: one.reached, default=None)


def next_limit(
    frontier: Frontier,
    walks: Sequence[TargetWalk],
    quality: TargetKind,
    most: float,
    *,
    recovers: bool = False,
) -> float | None:
    """Return what the next model may cost; None where none is to be tried.

    Parameters
    ----------
    frontier
        As the curves have it by now; the last point is the dense model.
    walks
        What was tried.
    quality, most
        The target.
    recovers
        Whether models are recovered before they are measured.
    """
    dense = frontier[-1][0]
    points = {max(loss, _LEAST): cost for cost, loss in reversed(frontier) if cost < dense}
    if len(walks) == MOST_WALKS or not points:
        return None
    losses, costs = np.log(list(points)), list(points.values())

    def cost_at(predicted: float) -> float:
        return float(np.interp(predicted, losses, costs))

    if not walks:
        nats = {TargetKind.PERPLEXITY: math.log1p(most), TargetKind.TOP1: most / 2}.get(
            quality, most
        )
        return cost_at(math.log(nats / _USUAL[recovers]))
    # Logarithms of what was predicted, and of the bound in units of the target, the nearest first.
    known = [
        (math.log(max(one.predicted, _LEAST)), math.log(max(one.measured.bound / most, _FLOOR)))
        for one in walks
    ]
    (x, y), *others = sorted(known, key=lambda point: abs(point[1]))
    best = smallest_within(walks, most)
    slope, aim = _SLOPE[y <= 0], _AIM[0 if best is not None else len(walks) - 1]
    if others and abs(others[0][0] - x) > _APART:
        slope = (others[0][1] - y) / (others[0][0] - x)
        aim = aim if best is None else _AIM_BETWEEN
    move = (math.log(aim) - y) / min(max(slope, _SLOPES[0]), _SLOPES[1])
    limit = cost_at(x + min(max(move, -math.log(_STEP)), math.log(_STEP)))
    beyond = [one.limit for one in walks if one.measured.bound > most]  # less reaches no more
    gain = _GAIN * dense
    if beyond:
        limit = max(limit, max(beyond) + gain)
    if best is not None:
        return limit if best.reached - limit >= gain else None
    return min(limit, costs[0]) if max(beyond) < costs[0] else None
