"""Choose the next size that is tried for a quality target, and which of the sizes is returned.

An *attempt* prunes to a size, and measures the model on the samples of the search.  The curves
predict half of the target for the first size, as the rest is for the bound.  Each other one is
where a line through the two nearest attempts, in logarithms of prediction and measurement, meets
the target (the secant method): larger sizes, until one is sure to pass its test, and then smaller
ones that may pass.

The sizes that the search holds for good are then tested on samples that chose nothing, from the
largest on, each at a level of 5 %, until one fails; the last that passed is returned.  Whatever was
searched, a size beyond the target is returned in 5 % of all runs at most: it takes an error in the
test of the first such size (Angelopoulos et al., "Learn then Test", arXiv 2110.01052).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import with_config

from osscar.allocation.costs import Cost
from osscar.allocation.measured import LEAST
from osscar.base.json_files import STRICT
from osscar.base.printable import pluralize, share
from osscar.distance.distance import UNITS, Measure
from osscar.evaluation.confidence import Bounded, rarest_seen
from osscar.request import QualityTarget, TargetKind

MOST_ATTEMPTS = 4

SURE, _BOLD = 3.0, 1.5
"""A size is sure, or worth a test, if its value and so many times what the bound adds are within
the target: a test of it on as many other samples passes in 98 of 100, or in three of four."""

_AIM = 0.95
"""Share of the target that is aimed at, once more for each attempt that was beyond it."""

_FIRST = 0.5
"""Share of the target that the first attempt is predicted to lose: the rest is for the bound."""

_SLOPES = 0.5, 3.0
"""The least and the greatest slope that two attempts may tell; one alone is taken for 1."""

_APART = 0.02
"""Two attempts tell a slope if the logarithms of their predictions differ by more."""

_STEP = 5.0
"""The prediction changes by at most this factor from the nearest attempt to the next; an attempt
whose outputs overflow is taken to be beyond the target by it."""

_FLOOR = 0.01
"""Share of the target that stands for everything below it; accuracy may rise."""

_GAIN = 0.05
"""Share of what another attempt could remove that it has to remove more than the best one."""

_LESS = 0.2
"""Share of what the largest attempt removed by which the next removes less at least, if it was
beyond."""

Frontier = Sequence[tuple[float, float]]
"""Costs of the whole model, ascending, with the least predicted distance at each."""


@with_config(STRICT)
@dataclass(frozen=True)
class Attempt:
    """One size that was tried, and the quality lost, after the recovery if there was one.

    limit, reached: The size that was allowed, and the one that came out.
    measured: The quality lost on the samples of the search; None where outputs overflow.
    tested: The same on samples that choose nothing; None where the search found too much lost.
    weights: SHA-256 of all weights of the model that passed the test; None where none did.
    """

    limit: float
    reached: float
    measured: Bounded | None
    tested: Bounded | None = None
    weights: str | None = None

    def good(self, most: float) -> bool:
        """Whether the bound of the search is within a target."""
        return self.measured is not None and self.measured.bound <= most

    def passes(self, most: float) -> bool:
        """Whether the bound of the test is."""
        return self.tested is not None and self.tested.bound <= most

    def likely(self, margin: float) -> float:
        """Return the value and so many times what its bound adds; infinity where it overflows."""
        if self.measured is None:
            return math.inf
        return self.measured.value + margin * (self.measured.bound - self.measured.value)


@dataclass(frozen=True)
class TargetReport:
    """The sizes that were tried for a quality target, and which of them was chosen."""

    quality: TargetKind
    """The option."""
    most: float
    """How much of the quality may be lost."""
    measure: Measure
    """The unit of a divergence."""
    cost: Cost
    """The unit of sizes."""
    dense: float
    """The size of the dense model."""
    attempts: tuple[Attempt, ...]

    @cached_property
    def tests(self) -> tuple[tuple[int, bool], ...]:
        """The attempts that were tested, and whether each passed; only the last fails.

        They are those that the search holds for good, the largest first.
        """
        found = list[tuple[int, bool]]()
        for at, one in sorted(enumerate(self.attempts), key=lambda named: -named[1].reached):
            if one.good(self.most) and all(passed for _, passed in found):
                found.append((at, one.passes(self.most)))
        return tuple(found)

    @property
    def chosen(self) -> int | None:
        """The index of the last attempt that passed; None where none did."""
        return next((at for at, passed in reversed(self.tests) if passed), None)

    @property
    def reported(self) -> Bounded | None:
        """The loss of quality of what is chosen, on the samples of the test.

        Where a smaller size failed, the bound is the target: which test was the last then depends
        on these samples, so that a lower one would hold less often.
        """
        if self.chosen is None:
            return None
        found = self.attempts[self.chosen].tested
        assert found is not None
        return found if self.tests[-1][1] else dataclasses.replace(found, bound=self.most)

    def searched_in_words(self, attempt: Attempt) -> str:
        """Return the size of an attempt, and what the search found, in words."""
        if attempt.measured is None:
            return f"{self._kept(attempt)}, outputs that overflow"
        lost = attempt.measured
        found, most = (_amount(self.quality, x, self.measure) for x in (lost.value, lost.bound))
        return f"{self._kept(attempt)}, {found}, probably at most {most} ({lost.samples} samples)"

    def tests_in_words(self) -> Iterator[str]:
        """Yield a line for each test."""
        for at, passed in self.tests:
            attempt = self.attempts[at]
            assert attempt.tested is not None
            lost = _lost_in_words(self.quality, attempt.tested, self.measure)
            end = "within the target" if passed else "beyond the target, and so not taken"
            yield f"attempt {at + 1}: {self._kept(attempt)}, {lost}: {end}"

    def _kept(self, attempt: Attempt) -> str:
        return f"{share(attempt.reached / self.dense)} of {counted_in_words(self.cost)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data, with what is chosen and reported."""
        reported = None if self.reported is None else dataclasses.asdict(self.reported)
        more = {"cost": str(self.cost), "chosen": self.chosen, "reported": reported}
        return {**dataclasses.asdict(self), **more}


def counted_in_words(cost: str) -> str:
    """Return what a size is counted in."""
    return "the time by its operators" if cost == Cost.TIME else cost


def _amount(quality: TargetKind, lost: float, measure: Measure) -> str:
    """Return a loss of quality with its unit."""
    if quality is TargetKind.DIVERGENCE:
        return f"{lost:.3g} {UNITS[measure]}"
    if quality is TargetKind.PERPLEXITY:
        return f"{lost:.2%} more perplexity"
    return f"{100 * lost:.2f} points of top-1"


def _lost_in_words(kind: TargetKind, lost: Bounded, measure: Measure) -> str:
    """Return a loss of quality on the samples of the test, and its bound, in words."""
    found, most = (_amount(kind, one, measure) for one in (lost.value, lost.bound))
    return (
        f"{found}; tested on {lost.samples} samples that chose nothing: at most {most} with 95 % "
        "confidence"
    )


def target_in_words(target: Mapping[str, Any]) -> str:
    """Return the target and the chosen size in words, of the ``target`` of ``osscar.prune/7``."""
    attempt, attempts = target["attempts"][target["chosen"]], len(target["attempts"])
    most = _amount(TargetKind(target["quality"]), target["most"], target["measure"])
    kept = share(attempt["reached"] / target["dense"])
    best, has = ("fastest", "takes") if target["cost"] == Cost.TIME else ("smallest", "keeps")
    return (
        f"at most {most}; the {best} model that passed its test, of "
        f"{pluralize(attempts, 'attempt')}, {has} {kept} of {counted_in_words(target['cost'])}"
    )


def reported_in_words(target: Mapping[str, Any]) -> str:
    """Return the loss of the chosen model on samples that no choice has seen, in words."""
    kind, lost = TargetKind(target["quality"]), Bounded(**target["reported"])
    return _lost_in_words(kind, lost, target["measure"])


def scope_in_words(target: Mapping[str, Any]) -> str:
    """Return for which data the reported bound holds, in words: a test sees what it has."""
    samples = target["reported"]["samples"]
    return (
        f"for data like these {samples} samples; a kind of sample that is rarer than 1 in "
        f"{rarest_seen(samples)} may be missing from them, and is then not seen"
    )


def samples_needed(found: Bounded, most: float) -> int | None:
    """Return on how many samples a test of such a model is sure to pass; None where it loses more.

    What the bound adds falls with the root of their number.
    """
    if found.value >= most:
        return None
    share = SURE * (found.bound - found.value) / (most - found.value)
    return math.ceil(found.samples * share * share)


def next_limit(
    frontier: Callable[[], Frontier], attempts: Sequence[Attempt], target: QualityTarget
) -> float | None:
    """Return what the next model may cost, or None; the frontier ends with the dense model.

    Sizes are compared by what the frontier predicts of them.  Until one is sure to be within the
    target, larger ones are tried, and then smaller ones that are worth a test.
    """
    if len(attempts) == MOST_ATTEMPTS:
        return None
    (*points, (dense, _)), most = frontier(), target.most
    costs, losses = np.array([point for point in points if point[0] < dense]).reshape(-1, 2).T
    if not len(costs):
        return None
    logs = np.log(np.maximum(losses, LEAST))

    def cost_at(predicted: float) -> float:
        return float(np.interp(predicted, logs[::-1], costs[::-1]))

    if not attempts:
        # In nats; a drop of accuracy by d is taken for d / 2 nats, which is a guess.
        nats = {TargetKind.PERPLEXITY: math.log1p(most), TargetKind.TOP1: most / 2}
        return cost_at(math.log(_FIRST * nats.get(target.kind, most)))
    margin = _BOLD if any(one.likely(SURE) <= most for one in attempts) else SURE
    lost = [one.likely(margin) / most for one in attempts]
    # What is smaller than a size that was allowed loses more, and what is larger than one that came
    # out loses less.
    sizes = [a.limit if y > 1 else a.reached for a, y in zip(attempts, lost, strict=True)]
    beyond = [size for size, y in zip(sizes, lost, strict=True) if y > 1]
    within = [size for size, y in zip(sizes, lost, strict=True) if y <= 1]
    # Logarithms of what is predicted, and of what was measured as shares of the target.
    predicted = np.interp(sizes, costs, logs).tolist()
    measured = [math.log(max(y, _FLOOR) if y < math.inf else _STEP) for y in lost]
    (x, y), *others = sorted(zip(predicted, measured, strict=True), key=lambda one: abs(one[1]))
    slope = 1.0
    if others and abs(others[0][0] - x) > _APART:
        slope = (others[0][1] - y) / (others[0][0] - x)
    move = ((1 + len(beyond)) * math.log(_AIM) - y) / min(max(slope, _SLOPES[0]), _SLOPES[1])
    limit = cost_at(x + min(max(move, -math.log(_STEP)), math.log(_STEP)))
    if len({one.reached for one in attempts}) < len(attempts):  # widths are too coarse for the line
        untried = beyond and not within and max(beyond) < costs[-1]
        return float(costs[-1]) if untried else None
    if not within:
        largest = max(beyond)
        limit = max(limit, largest + _LESS * (dense - largest))
        return min(limit, float(costs[-1])) if largest < costs[-1] else None
    if beyond:
        limit = max(limit, max(beyond) + _GAIN * (dense - max(beyond)))
    return limit if min(within) - limit >= _GAIN * (dense - limit) else None
