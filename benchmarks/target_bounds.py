"""How often the bound of a quality target holds: simulated searches.

    python -m benchmarks.target_bounds --searches 2000

A stand-in takes the place of pruning: a size has a loss that grows with what the curves predict, by
a factor and a power that differ from search to search, and each sample's loss is drawn about it,
anew for each size.  All else is what a run does: sizes are chosen by `next_limit` on as many
samples as test them, tested from the largest on, and reported.  The table tells in how many
searches the truth is within the reported bound, and within the target.

Takes a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import markdown
from osscar.allocation.costs import Cost
from osscar.evaluation.confidence import bounded_mean
from osscar.request import QualityTarget, TargetKind
from osscar.run.target_search import Attempt, TargetReport, next_limit

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
"""Draws the losses of so many samples, of mean 1."""


def normal(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.normal(1, 0.5, n)


def lognormal(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.lognormal(-0.5, 1, n)


def rare(times: float, share: float = 0.01) -> Draw:
    """Return the draw of samples of which a share loses so many times as much."""

    def draw(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        size = np.where(rng.random(n) < share, times, 1.0)
        return size * rng.normal(1, 0.3, n) / (1 - share + share * times)

    return draw


@dataclass(frozen=True)
class Case:
    """A draw, how many samples search and test, and how good predictions are.

    A size loses so many times what is predicted, to a power; `factors` are logarithms.
    """

    draw: Draw
    samples: int
    factors: tuple[float, float] = (-1.5, 0.7)
    powers: tuple[float, float] = (0.7, 1.6)


CASES = {
    "normal, 16": Case(normal, 16),
    "normal, 32": Case(normal, 32),
    "normal, 128": Case(normal, 128),
    "lognormal, 128": Case(lognormal, 128),
    "1 % with 5 times the loss, 512": Case(rare(5), 512),
    "1 % with 10 times the loss, 512": Case(rare(10), 512),
    "1 % with 30 times the loss, 512": Case(rare(30), 512),
    "1 % with 100 times the loss, 512": Case(rare(100), 512),
    "lognormal, 128, too little predicted": Case(lognormal, 128, (0.0, 1.2), (0.6, 1.0)),
}

COSTS = 1 - np.append(np.geomspace(0.8, 0.001, 30), 0)
FRONTIER = tuple((float(c), float((1 / c) ** 2 - 1)) for c in COSTS)

UNSEEN = {
    f"1 in 50 with {times} times the loss, {samples}": Case(rare(times, 0.02), samples)
    for samples in (32, 128, 512)
    for times in (10, 30, 100)
}
"""A kind of sample that 32 of them lack more often than not: no bound sees it there."""


@dataclass(frozen=True)
class Outcome:
    """What became of one search: the report, and the true loss of the size that it returned."""

    report: TargetReport
    truth: float | None

    @property
    def holds(self) -> bool:
        """Whether the truth is within the reported bound."""
        assert self.truth is not None
        assert self.report.reported is not None
        return self.truth <= self.report.reported.bound


def search(case: Case, rng: np.random.Generator) -> Outcome:
    """Search once."""
    target = QualityTarget(TargetKind.DIVERGENCE, float(np.exp(rng.uniform(-3, 0.5))))
    factor, power = float(np.exp(rng.uniform(*case.factors))), float(rng.uniform(*case.powers))
    attempts, truths = list[Attempt](), list[float]()
    while (limit := next_limit(lambda: FRONTIER, attempts, target)) is not None:
        predicted = (1 / limit) ** 2 - 1
        truths.append(factor * predicted**power)
        measured, tested = (
            bounded_mean(truths[-1] * case.draw(rng, case.samples)) for _ in range(2)
        )
        good = measured.bound <= target.most
        attempts.append(Attempt(limit, limit, measured, tested if good else None))
    report = TargetReport(target.kind, target.most, "nats", Cost.PARAMETERS, 1.0, tuple(attempts))
    return Outcome(report, None if report.chosen is None else truths[report.chosen])


def searches(case: str, count: int, seed: int) -> list[Outcome]:
    """Search so many times."""
    rng = np.random.default_rng(seed)
    return [search({**CASES, **UNSEEN}[case], rng) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--searches", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = [["losses, samples of a test", "within the bound", "within the target", "attempts"]]
    lines[0] += ["no size passed", "truth / target, mean"]
    for case in (*CASES, *UNSEEN):
        found = searches(case, arguments.searches, arguments.seed)
        own = [one for one in found if one.truth is not None]
        within = np.mean([one.truth <= one.report.most for one in own if one.truth is not None])
        near = np.mean([one.truth / one.report.most for one in own if one.truth is not None])
        tries = np.mean([len(one.report.attempts) for one in found])
        held = np.mean([one.holds for one in own])
        lost = 1 - len(own) / len(found)
        lines.append(
            [case, f"{held:.1%}", f"{within:.1%}", f"{tries:.1f}", f"{lost:.1%}", f"{near:.2f}"]
        )
    print(*markdown(lines, 1), sep="\n")


if __name__ == "__main__":
    main()
