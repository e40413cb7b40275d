"""Choose the next size that is tried for a quality target, and report the sizes that were tried.

A *attempt* prunes to a size and measures the model.  Curves predict its distance from the dense model;
the measured bound is about a multiple of that, mostly less than one, as refits make up for one
another.  The first size assumes a usual multiple, the second the multiple of the first attempt.  Each
other size is where a line through the two nearest attempts, in logarithms, meets the target (the
secant method).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import with_config

from osscar.allocation.costs import Cost
from osscar.allocation.divergence import UNITS, Measure
from osscar.allocation.measured import LEAST
from osscar.base.json_files import STRICT
from osscar.base.printable import pluralize, share
from osscar.evaluation.confidence import Bounded
from osscar.request import QualityTarget, TargetKind

MOST_ATTEMPTS = 4

_USUAL = {False: 0.8, True: 0.4}
"""Ratio of the measured bound to the prediction in the first attempt, without recovery and with it: a
guess."""

_AIM = 0.95, 0.7, 0.3
"""Share of the target that the next bound is to reach.  The first holds once a model is within the
target, or after one attempt; the others after two and three attempts that are all beyond it."""

_AIM_BETWEEN = 0.98
"""The same once a model is within the target, and two attempts tell the slope."""

_SLOPE = {False: 1.0, True: 1.3}
"""Power of the prediction with which the bound grows, assumed where no two attempts tell it: nearest
to an attempt beyond the target, and to one within it.  The higher one makes the smaller step."""

_SLOPES = 0.5, 3.0
"""The least and the greatest power that two attempts may tell."""

_APART = 0.02
"""Two attempts tell the power if the logarithms of their predictions differ by more."""

_STEP = 5.0
"""The prediction changes by at most this factor from the nearest attempt to the next."""

_FLOOR = 0.01
"""Share of the target that stands for every bound below it; bounds may be negative."""

_GAIN = 0.01
"""Share of the dense model's cost that another attempt has to save, or it is not made."""

Frontier = Sequence[tuple[float, float]]
"""Costs of the whole model, ascending, with the least predicted distance at each."""


@with_config(STRICT)
@dataclass(frozen=True)
class Attempt:
    """One size that was tried: the limit of its cost, and the cost that was reached.

    `predicted` is its distance from the dense model by the curves, and `measured` the quality lost
    on the samples that choose a size, after the recovery if there was one.
    """

    limit: float
    reached: float
    predicted: float
    measured: Bounded


@dataclass(frozen=True)
class TargetReport:
    """The sizes that were tried for a quality target, and which of them was chosen."""

    quality: TargetKind
    most: float
    """How much of the quality may be lost."""
    measure: Measure
    """The unit of a divergence."""
    cost: Cost
    """The unit of sizes."""
    dense: float
    """The size of the dense model."""
    attempts: tuple[Attempt, ...]
    reported: Bounded | None = None
    """The loss of quality of the chosen model, on samples that no choice has seen."""

    @property
    def chosen(self) -> int | None:
        """The index of the smallest model whose bound is within the target; None without one."""
        best = smallest_within(self.attempts, self.most)
        return None if best is None else self.attempts.index(best)

    def in_words(self, attempt: Attempt) -> str:
        """Return the size and the loss of quality of an attempt, in words."""
        kept = f"{share(attempt.reached / self.dense)} of {self.cost}"
        return f"{kept}, {_lost_in_words(self.quality, attempt.measured, self.measure)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data, with what is chosen."""
        return {**dataclasses.asdict(self), "cost": str(self.cost), "chosen": self.chosen}


def _amount(quality: TargetKind, lost: float, measure: Measure) -> str:
    """Return a loss of quality with its unit."""
    if quality is TargetKind.DIVERGENCE:
        return f"{lost:.3g} {UNITS[measure]}"
    if quality is TargetKind.PERPLEXITY:
        return f"{lost:.2%} more perplexity"
    return f"{100 * lost:.2f} points of top-1"


def _lost_in_words(kind: TargetKind, lost: Bounded, measure: Measure, what: str = "samples") -> str:
    """Return a loss of quality on some samples, and its bound, in words."""
    found, most = (_amount(kind, one, measure) for one in (lost.value, lost.bound))
    return f"{found} on {lost.samples} {what}, at most {most} with 95 % confidence"


def target_in_words(target: Mapping[str, Any]) -> str:
    """Return the target and the chosen size in words, of the ``target`` of ``osscar.prune/5``."""
    kind, measure = TargetKind(target["quality"]), target["measure"]
    attempt, attempts = target["attempts"][target["chosen"]], len(target["attempts"])
    kept = share(attempt["reached"] / target["dense"])
    lost = _lost_in_words(kind, Bounded(**attempt["measured"]), measure)
    return (
        f"at most {_amount(kind, target['most'], measure)}; the smallest model within it, of "
        f"{pluralize(attempts, 'attempt')}, keeps {kept} of {target['cost']}: {lost}"
    )


def reported_in_words(target: Mapping[str, Any]) -> str:
    """Return the loss of the chosen model on samples that no choice has seen, in words."""
    kind, lost = TargetKind(target["quality"]), Bounded(**target["reported"])
    return _lost_in_words(kind, lost, target["measure"], "samples that were used for nothing else")


def smallest_within(attempts: Sequence[Attempt], most: float) -> Attempt | None:
    """Return the smallest model whose bound is within a target; None if there is none."""
    within = [one for one in attempts if one.measured.bound <= most]
    return min(within, key=lambda one: one.reached, default=None)


def next_limit(
    frontier: Frontier,
    attempts: Sequence[Attempt],
    target: QualityTarget,
    *,
    recovers: bool = False,
) -> float | None:
    """Return what the next model may cost, or None; the frontier ends with the dense model."""
    dense, most = frontier[-1][0], target.most
    points = {max(loss, LEAST): cost for cost, loss in reversed(frontier) if cost < dense}
    if len(attempts) == MOST_ATTEMPTS or not points:
        return None
    losses, costs = np.log(list(points)), list(points.values())

    def cost_at(predicted: float) -> float:
        return float(np.interp(predicted, losses, costs))

    if not attempts:
        # In nats; a drop of accuracy by d is taken for d / 2 nats, which is a guess.
        nats = {TargetKind.PERPLEXITY: math.log1p(most), TargetKind.TOP1: most / 2}
        return cost_at(math.log(nats.get(target.kind, most) / _USUAL[recovers]))
    # Logarithms of what was predicted, and of the bound in units of the target, the nearest first.
    known = [
        (math.log(max(one.predicted, LEAST)), math.log(max(one.measured.bound / most, _FLOOR)))
        for one in attempts
    ]
    (x, y), *others = sorted(known, key=lambda point: abs(point[1]))
    best = smallest_within(attempts, most)
    slope, aim = _SLOPE[y <= 0], _AIM[0 if best is not None else len(attempts) - 1]
    if others and abs(others[0][0] - x) > _APART:
        slope = (others[0][1] - y) / (others[0][0] - x)
        aim = aim if best is None else _AIM_BETWEEN
    move = (math.log(aim) - y) / min(max(slope, _SLOPES[0]), _SLOPES[1])
    limit = cost_at(x + min(max(move, -math.log(_STEP)), math.log(_STEP)))
    beyond = [one.limit for one in attempts if one.measured.bound > most]  # less reaches no more
    gain = _GAIN * dense
    if beyond:
        limit = max(limit, max(beyond) + gain)
    if best is not None:
        return limit if best.reached - limit >= gain else None
    return min(limit, costs[0]) if max(beyond) < costs[0] else None
