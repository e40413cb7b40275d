"""Choose the next size that is tried for a quality target, and which of the sizes is returned.

An *attempt* prunes to a size, and measures the model on the samples of the search.  The first size
is where the curves predict the target; each other one is where a line through the two nearest
attempts, in logarithms of prediction and measurement, meets it (the secant method).

The sizes that the search holds for good are then tested on samples that chose nothing, from the
largest on, each at a level of 5 %, until one fails; the last that passed is returned.  Whatever was
searched, a size beyond the target is returned in 5 % of all runs at most: it takes an error in the
test of the first such size (Angelopoulos et al., "Learn then Test", arXiv 2110.01052).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
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
from osscar.evaluation.confidence import Bounded
from osscar.request import QualityTarget, TargetKind

MOST_ATTEMPTS = 4

_AIM = 0.95
"""Share of the target that is aimed at, once more for each attempt that was beyond it."""

_MARGIN = 2.0
"""A size is within the target if its value, and so many times what the bound adds, are: a test of
it on as many other samples then passes in seven of eight."""

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

Frontier = Sequence[tuple[float, float]]
"""Costs of the whole model, ascending, with the least predicted distance at each."""


@with_config(STRICT)
@dataclass(frozen=True)
class Attempt:
    """One size that was tried, and the quality lost, after the recovery if there was one.

    limit, reached: The size that was allowed, and the one that came out.
    predicted: Its distance from the dense model by the curves.
    measured: The quality lost on the samples of the search; None where outputs overflow.
    tested: The same on samples that choose nothing; None where the search found too much lost.
    """

    limit: float
    reached: float
    predicted: float
    measured: Bounded | None
    tested: Bounded | None = None

    def good(self, most: float) -> bool:
        """Whether the bound of the search is within a target."""
        return self.measured is not None and self.measured.bound <= most

    def passes(self, most: float) -> bool:
        """Whether the bound of the test is."""
        return self.tested is not None and self.tested.bound <= most

    def likely(self) -> float:
        """Return the bound that a test probably passes; infinity where outputs overflow."""
        if self.measured is None:
            return math.inf
        return self.measured.value + _MARGIN * (self.measured.bound - self.measured.value)


@dataclass(frozen=True)
class WholeTime:
    """How many times as fast as the dense model one is, timed as a whole beside it.

    speedup: As timed; None where the times are too noisy.
    error: That of `speedup`, relative.
    unknown: Why `speedup` is None.
    """

    what: str
    """What was timed, and where."""
    expected: float
    """How fast it is by the times of its operators."""
    speedup: float | None = None
    error: float | None = None
    unknown: str = ""


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
    timed: WholeTime | None = None
    """Of what was chosen, where the time is what was to be small."""

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """The attempts that the search holds for good, in the order of tests: the largest first."""
        good = [at for at, one in enumerate(self.attempts) if one.good(self.most)]
        return tuple(sorted(good, key=lambda at: -self.attempts[at].reached))

    @cached_property
    def tests(self) -> tuple[tuple[int, bool], ...]:
        """The attempts that were tested, in order, and whether each passed; only the last fails."""
        found = list[tuple[int, bool]]()
        for at in self.candidates:
            found.append((at, self.attempts[at].passes(self.most)))
            if not found[-1][1]:
                break
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
    """Return the target and the chosen size in words, of the ``target`` of ``osscar.prune/5``."""
    attempt, attempts = target["attempts"][target["chosen"]], len(target["attempts"])
    most = _amount(TargetKind(target["quality"]), target["most"], target["measure"])
    kept = share(attempt["reached"] / target["dense"])
    best, has = ("fastest", "takes") if target["cost"] == Cost.TIME else ("smallest", "keeps")
    return (
        f"at most {most}; the {best} model that passed its test, of "
        f"{pluralize(attempts, 'attempt')}, {has} {kept} of {counted_in_words(target['cost'])}"
    )


def timed_in_words(target: Mapping[str, Any]) -> str:
    """Return how fast the chosen model was as a whole; nothing where sizes are no times."""
    if target["timed"] is None:
        return ""
    timed = WholeTime(**target["timed"])
    found = f"the speed of the whole model is not known ({timed.unknown})"
    if timed.speedup is not None and timed.error is not None:
        found = f"{timed.speedup:.2f} times as fast as the dense model, known to {timed.error:.1%}"
    return f"{found}; {timed.expected:.2f} by the times of its operators: {timed.what}"


def reported_in_words(target: Mapping[str, Any]) -> str:
    """Return the loss of the chosen model on samples that no choice has seen, in words."""
    kind, lost = TargetKind(target["quality"]), Bounded(**target["reported"])
    return _lost_in_words(kind, lost, target["measure"])


def next_limit(
    frontier: Frontier, attempts: Sequence[Attempt], target: QualityTarget
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
        return cost_at(math.log(nats.get(target.kind, most)))
    # Logarithms of what was predicted, and of what was measured as shares of the target.
    known = [
        (
            math.log(max(one.predicted, LEAST)),
            math.log(min(max(one.likely() / most, _FLOOR), _STEP)),
        )
        for one in attempts
    ]
    (x, y), *others = sorted(known, key=lambda point: abs(point[1]))
    slope = 1.0
    if others and abs(others[0][0] - x) > _APART:
        slope = (others[0][1] - y) / (others[0][0] - x)
    beyond = [one.limit for one in attempts if one.likely() > most]
    move = ((1 + len(beyond)) * math.log(_AIM) - y) / min(max(slope, _SLOPES[0]), _SLOPES[1])
    limit = cost_at(x + min(max(move, -math.log(_STEP)), math.log(_STEP)))
    if beyond:  # what is smaller loses more
        limit = max(limit, max(beyond) + _GAIN * (dense - max(beyond)))
    within = [one.reached for one in attempts if one.likely() <= most]
    if within:
        return limit if min(within) - limit >= _GAIN * (dense - limit) else None
    return min(limit, costs[0]) if max(beyond) < costs[0] else None
