"""A race of backends on instances of the library: who finds the best, who proves it, and when.

Backends report no trajectory.  What they reach by when is found by running each that has a time
limit several times, with a limit that grows; one without a limit runs once.  A run counts from when
it ended, with all of its answer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import solvers
from osscar.base.errors import OptionError
from osscar.study.library import Best, Library
from solvers import BackendError, SolutionRecord, SubsetProblem, VerificationError
from solvers.protocol import DEFAULT_GAP_TOLERANCE

TOLERANCE = 1e-6
"""Share of the best known loss within which an answer counts as that."""

PROVED = DEFAULT_GAP_TOLERANCE * (1 + 1e-6)
"""Gap up to which an instance counts as proved; searches stop right at the tolerance."""

SHARES_OF_TIME = (1 / 16, 1 / 4, 1.0)
"""The limits that a backend is run with, as shares of the whole time."""

Curves: TypeAlias = dict[str, list[tuple[float, float]]]
"""Points by backend: from 1 or from the first seconds on, and shares."""


@dataclass(frozen=True)
class Run:
    """One run of one backend on one instance.

    Parameters
    ----------
    instance, backend
        Who ran on what.
    seconds
        When it ended; None where there is no answer.
    loss, bound
        Recomputed loss, and what was proved; shares of the loss of removing everything.
    recomputed
        Whether the bound was recomputed from a certificate, and is not the solver's word.
    support
        The units that stay.
    error
        Why there is no answer, or why its bound does not count.
    """

    instance: str
    backend: str
    seconds: float | None = None
    loss: float | None = None
    bound: float | None = None
    recomputed: bool = False
    support: tuple[int, ...] = ()
    error: str = ""


def limited(backend: str, seconds: float) -> dict[str, float]:
    """Return the options with which a backend ends in about that time; none where it has no limit.

    That of `window_search` is for one window.
    """
    defaults = {info.name: info.options for info in solvers.backends()}
    if backend not in defaults:
        raise OptionError(
            f"there is no backend {backend!r}; `osscar backends` lists those that there are"
        )
    options = defaults[backend]
    if "time_limit" not in options:
        return {}
    return {"time_limit": seconds / max(options.get("windows", 1), 1)}


def better(best: Best, found: SolutionRecord) -> Best:
    """Return the best that is known once something was found; the same where that is no better.

    found: Of a verified solution: its bound counts only if it was recomputed.
    """
    if found.relative_loss < best.loss * (1 - TOLERANCE):
        best = dataclasses.replace(
            best,
            support=found.support,
            loss=found.relative_loss,
            found_by=found.backend,
            found_in=round(found.seconds, 3),
        )
    if found.recomputed_bound is not None and found.relative_bound is not None:
        bound = found.relative_bound
        if min(bound, best.loss) > best.bound * (1 + TOLERANCE):
            best = dataclasses.replace(
                best,
                bound=min(bound, best.loss),
                bound_by=found.backend,
                bound_in=round(found.seconds, 3),
                certificate="",
            )
    return dataclasses.replace(best, proved=best.gap <= PROVED)


def race(
    known: Library,
    names: Sequence[str],
    backends: Sequence[str],
    seconds: float,
    tell: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Run each backend on each instance, with limits that grow up to so many seconds.

    Raises
    ------
    OptionError
        If a backend is unknown.
    """
    for backend in backends:
        limited(backend, seconds)
    for name in names:  # what has to be made takes minutes, and may fail
        known.file(known.instances[name].source)
    runs: list[Run] = []
    for name in names:
        problem = known.problem(name)
        for backend in backends:
            for run in _runs(problem, name, backend, seconds):
                tell(run)
                runs.append(run)
    return runs


def _runs(problem: SubsetProblem, name: str, backend: str, seconds: float) -> Iterator[Run]:
    limits = SHARES_OF_TIME if limited(backend, seconds) else (1.0,)
    for share in limits:
        options = limited(backend, share * seconds)
        began = time.perf_counter()
        try:
            solution = solvers.solve(problem, backend, options=options)
            took = time.perf_counter() - began
            said = solution.record(solution.verify())
        except (BackendError, VerificationError) as error:
            yield Run(name, backend, error=str(error))
            return
        yield Run(
            instance=name,
            backend=backend,
            seconds=took,
            loss=said.relative_loss,
            bound=said.relative_bound,
            recomputed=said.recomputed_bound is not None,
            support=said.support,
        )
        if said.proved_optimal or took < share * seconds / 2:
            return  # it ended by itself, and more time would change nothing


# ---- what it comes to ----------------------------------------------------------------------


def best_losses(known: Library, runs: Sequence[Run]) -> dict[str, float]:
    """Return the least loss of each instance that is known or was found in the race."""
    least: dict[str, float] = {}
    for run in runs:
        before = least.get(run.instance, known.instances[run.instance].best.loss)
        least[run.instance] = before if run.loss is None else min(before, run.loss)
    return least


def without_refuted(
    runs: Sequence[Run], best: Mapping[str, float], tell: Callable[[Run], None] = lambda run: None
) -> list[Run]:
    """Return the runs, without the bounds that lie above the best loss of their instance.

    A bound without a certificate is its backend's word, and no exchange may refute it.
    """
    found: list[Run] = []
    for run in runs:
        least = best[run.instance]
        if run.bound is not None and run.bound > least * (1 + TOLERANCE):
            wrong = f"its bound {run.bound:.9g} is wrong: a support of loss {least:.9g} is known"
            run = dataclasses.replace(run, bound=None, recomputed=False, error=wrong)
            tell(run)
        found.append(run)
    return found


def times(
    runs: Sequence[Run], done: Callable[[Run], bool], seconds: float
) -> dict[str, dict[str, float]]:
    """Return, by backend and instance, when the first run that is `done` ended within the time."""
    found: dict[str, dict[str, float]] = {run.backend: {} for run in runs}
    for run in runs:
        if run.seconds is not None and run.seconds <= seconds and done(run):
            mine = found[run.backend]
            mine[run.instance] = min(run.seconds, mine.get(run.instance, run.seconds))
    return found


def profile(found: dict[str, dict[str, float]], instances: int) -> Curves:
    """Return performance profiles (Dolan and More, 2002): the steps of each backend's curve.

    A backend's curve at r is the share of all instances that it does within r times the time of the
    fastest on that instance.
    """
    fastest: dict[str, float] = {}
    for mine in found.values():
        for name, when in mine.items():
            fastest[name] = min(when, fastest.get(name, when))
    ratios = {
        backend: sorted(when / fastest[name] for name, when in mine.items())
        for backend, mine in found.items()
    }
    widest = max([2.0, *(ratio for mine in ratios.values() for ratio in mine)])
    return {
        backend: [
            *((ratio, (i + 1) / instances) for i, ratio in enumerate(mine)),
            (widest, len(mine) / instances),
        ]
        for backend, mine in ratios.items()
    }


def anytime(runs: Sequence[Run], value: Callable[[Run], float], instances: int) -> Curves:
    """Return, by backend, the mean over instances of the least value so far, at each run's end.

    value: From 0, which is best, to 1, which also stands for no answer yet.
    """
    curves: Curves = {run.backend: [] for run in runs}
    for backend, curve in curves.items():
        least: dict[str, float] = {}
        mine = [run for run in runs if run.backend == backend and run.seconds is not None]
        for run in sorted(mine, key=lambda run: run.seconds or 0.0):
            least[run.instance] = min(value(run), least.get(run.instance, 1.0))
            mean = (sum(least.values()) + instances - len(least)) / instances
            curve.append((run.seconds or 0.0, mean))
    return curves
