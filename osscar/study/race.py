"""A race of backends on instances of the library: who finds the best, who proves it, and when.

Backends report no trajectory.  What they reach by when is found by running each that has a time
limit several times, with a limit that grows; one without a limit runs once.  A run counts from when
it ended, with all of its answer.

A race is a study (`osscar.study.directory`): each run is a record, written as soon as it ends, and
a race that was stopped goes on from those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import solvers
from osscar.study.directory import Study
from osscar.study.library import Best, Library
from osscar.study.records import Instance, ProofBasis, Record
from solvers import SolutionRecord, Status
from solvers.protocol import DEFAULT_GAP_TOLERANCE

TOLERANCE = 1e-6
"""Share of the best known loss within which an answer counts as that."""

PROVED = DEFAULT_GAP_TOLERANCE * (1 + 1e-6)
"""Gap up to which an answer counts as optimal; searches stop right at the tolerance."""

SHARES_OF_TIME = (1 / 16, 1 / 4, 1.0)
"""The limits that a backend is run with, as shares of the whole time."""

Curves: TypeAlias = dict[str, list[tuple[float, float]]]
"""Points by backend: from 1 or from the first seconds on, and shares."""


def limited(backend: str, seconds: float) -> dict[str, float]:
    """Return the options with which a backend ends in about that time; none where it has no limit.

    That of `window_search` is for one window.
    """
    known = fields(cast(Any, solvers.backend_class(backend)))
    options: dict[str, Any] = {field.name: field.default for field in known}
    if "time_limit" not in options:
        return {}
    return {"time_limit": seconds / max(options.get("windows", 1), 1)}


def race_study(directory: Path, known: Library, names: Sequence[str]) -> Study:
    """Return the study of a race on some instances, which goes on with what lies there.

    Raises
    ------
    JournalError
        If the directory holds something else, or a race on other instances.
    """
    asked = {
        name: {"source": known.sources[one.source].sha256, "keep": one.keep, "damp": one.damp}
        for name, one in ((name, known.instances[name]) for name in names)
    }
    return Study(directory, {"instances": asked})


def race(
    study: Study,
    known: Library,
    backends: Sequence[str],
    seconds: float,
    tell: Callable[[Record], None] = lambda record: None,
) -> Iterator[list[Record]]:
    """Run each backend on each instance of a study, with limits that grow up to so many seconds.

    Yield the records instance by instance; those of earlier races are recomputed.

    Raises
    ------
    OptionError
        If a backend is unknown.
    """
    for backend in backends:
        limited(backend, seconds)
    with study.locked():
        if not study.instances:  # what has to be made takes minutes, and may fail
            study.capture(("units", known.problem(name)) for name in study.source["instances"])
        for instance in study.instances:
            keep = known.instances[instance.name].keep
            records = []
            for backend in backends:
                for record in _runs(study, instance, keep, backend, seconds):
                    tell(record)
                    records.append(record)
            yield records


def _runs(
    study: Study, instance: Instance, keep: int, backend: str, seconds: float
) -> Iterator[Record]:
    limits = SHARES_OF_TIME if limited(backend, seconds) else (1.0,)
    for share in limits:
        record = study.solve(instance, keep, backend, limited(backend, share * seconds))
        yield record
        ended_early = record.seconds is None or record.seconds < share * seconds / 2
        if ended_early or record.status == Status.OPTIMAL.name:
            return  # it failed or ended by itself, and more time would change nothing


# ---- what it comes to ----------------------------------------------------------------------


def better(best: Best, found: Record | SolutionRecord) -> Best:
    """Return the best that is known once something was found; the same where that is no better.

    found: Of a verified solution: its bound counts only if it was recomputed.
    """
    loss, seconds = found.relative_loss, found.seconds
    if loss is None or seconds is None:  # there is no answer
        return best
    took = round(seconds, 3)
    if loss < best.loss * (1 - TOLERANCE):
        by = found.backend
        best = replace(best, support=found.support, loss=loss, found_by=by, found_in=took)
    if found.recomputed_bound is not None and found.relative_bound is not None:
        bound = min(found.relative_bound, best.loss)
        if bound > best.bound * (1 + TOLERANCE):
            by = found.backend
            best = replace(best, bound=bound, bound_by=by, bound_in=took, certificate="")
    return replace(best, proved=best.gap <= PROVED)


def best_known(known: Library, records: Sequence[Record]) -> dict[str, Best]:
    """Return the best of each instance of the race that was known or was found in it."""
    best: dict[str, Best] = {}
    for record in records:
        name = record.instance
        best[name] = better(best.get(name, known.instances[name].best), record)
    return best


def without_refuted(
    records: Sequence[Record],
    best: Mapping[str, Best],
    tell: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Return the records, without the bounds that lie above the best loss of their instance.

    A bound without a certificate is its backend's word, and no exchange may refute it.
    """
    found: list[Record] = []
    for record in records:
        bound, least = record.relative_bound, best[record.instance].loss
        if bound is not None and bound > least * (1 + TOLERANCE):
            wrong = f"its bound {bound:.9g} is wrong: a support of loss {least:.9g} is known"
            record = replace(record, **_UNBOUNDED, error=wrong)
            tell(record)
        found.append(record)
    return found


_UNBOUNDED: dict[str, Any] = {
    **dict.fromkeys(("lower_bound", "relative_bound", "recomputed_bound", "gap")),
    "proof": ProofBasis.NONE,
}


def gap_below(loss: float, record: Record) -> float:
    """Return the share of a loss that a run's bound leaves below it, from 0 to 1."""
    if record.relative_bound is None:
        return 1.0
    return min(1.0, max(0.0, 1 - record.relative_bound / loss)) if loss > 0 else 0.0


def proved(record: Record) -> bool:
    """Tell whether an answer is optimal by a bound that was recomputed from its certificate."""
    return record.proof is ProofBasis.RECOMPUTED and _closed(record)


def on_its_word(record: Record) -> bool:
    """Tell whether an answer is optimal by its backend's word, and by nothing else."""
    return record.proof is not ProofBasis.RECOMPUTED and _closed(record)


def _closed(record: Record) -> bool:
    loss = record.relative_loss
    return loss is not None and gap_below(loss, record) <= PROVED


def times(records: Sequence[Record], done: Callable[[Record], bool]) -> dict[str, dict[str, float]]:
    """Return, by backend and instance, after how many seconds the first run that is `done` ended.

    Those that ended after the limit of the race are among them: a backend need not have one.
    """
    found: dict[str, dict[str, float]] = {record.backend: {} for record in records}
    for record in records:
        took, mine = record.seconds, found[record.backend]
        if took is not None and done(record):
            mine[record.instance] = min(took, mine.get(record.instance, took))
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


def anytime(records: Sequence[Record], value: Callable[[Record], float], instances: int) -> Curves:
    """Return, by backend, the mean over instances of the least value so far, at each run's end.

    value: From 0, which is best, to 1, which also stands for no answer yet.
    """
    curves: Curves = {record.backend: [] for record in records}
    for backend, curve in curves.items():
        least: dict[str, float] = {}
        ended = [
            (record.seconds, record)
            for record in records
            if record.backend == backend and record.seconds is not None
        ]
        for took, record in sorted(ended, key=lambda one: one[0]):
            least[record.instance] = min(value(record), least.get(record.instance, 1.0))
            mean = (sum(least.values()) + instances - len(least)) / instances
            curve.append((took, mean))
    return curves
