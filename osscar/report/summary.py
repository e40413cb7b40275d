"""What the rows of a study say: optima, gaps, how good heuristics are, whether solvers agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import solvers
from osscar.rows import WINDOW, Row, window_layer
from solvers import Status

HIT = 1e-6
"""Relative excess over the optimum up to which a loss counts as the optimum; optima themselves are
known up to the gap tolerance of the study."""

_OPTIMAL = Status.OPTIMAL.name
_ROOT = "perspective"


@dataclass(frozen=True)
class Case:
    """All answers to one problem at one number of kept units.

    Parameters
    ----------
    rows
        Those that have an answer, in the order of the study.
    """

    rows: tuple[Row, ...]

    @property
    def best(self) -> Row:
        """The row of the lowest loss; of several the first."""
        return min(self.rows, key=_loss)

    @property
    def loss(self) -> float:
        """The lowest loss."""
        return _loss(self.best)

    @property
    def bound(self) -> float | None:
        """The highest lower bound that any row proved."""
        return max((r.lower_bound for r in self.rows if r.lower_bound is not None), default=None)

    @property
    def gap(self) -> float | None:
        """From the lowest loss to the highest bound, as a share of the loss; None unbounded."""
        return _gap(self.loss, self.bound)

    @property
    def root_gap(self) -> float | None:
        """The same with the root bound alone."""
        root = next((r for r in self.rows if r.backend == _ROOT), None)
        return _gap(self.loss, None if root is None else root.lower_bound)

    @property
    def closed(self) -> bool:
        """Whether some backend proved its answer optimal."""
        return any(r.status == _OPTIMAL for r in self.rows)

    @property
    def proved(self) -> tuple[Row, ...]:
        """The rows that are proved optimal."""
        return tuple(r for r in self.rows if r.status == _OPTIMAL)

    @property
    def why_open(self) -> str:
        """Why it is not closed, in words."""
        tried = [r for r in self.rows if _kind(r) is solvers.Kind.EXACT]
        if not tried:
            return f"no exact backend was asked: {self.best.units} units"
        ends = {f"{r.backend}: {r.status.lower().replace('_', ' ')}" for r in tried}
        return "; ".join(sorted(ends))


@dataclass(frozen=True)
class Score:
    """How a backend did on the problems of one kind whose optimum is known.

    Parameters
    ----------
    backend, kind
        Its name, and what the units of the problems are.
    cases, hits
        Closed problems that it answered, and how many of those optimally.
    mean_excess, worst_excess
        Loss above the optimum, relative to it.
    seconds
        Median time of a solve.
    """

    backend: str
    kind: str
    cases: int
    hits: int
    mean_excess: float
    worst_excess: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """A study in numbers.

    Parameters
    ----------
    cases
        In the order of the study.
    scores
        One for each backend that answered a closed problem.
    largest_disagreement
        Largest relative difference between two answers that are both proved optimal, and how many
        problems had two or more.
    refused
        Rows without an answer.
    headline
        Sentences that say the most important.
    """

    cases: tuple[Case, ...]
    scores: tuple[Score, ...]
    largest_disagreement: tuple[float, int]
    refused: tuple[Row, ...]
    headline: tuple[str, ...]


def summarize(rows: Sequence[Row]) -> Summary:
    """Group the rows of a study by problem, and say what they show.

    Parameters
    ----------
    rows
        From `osscar.study.Study.run`.
    """
    answered = [row for row in rows if row.loss is not None]
    by_case: dict[tuple[str, int], list[Row]] = {}
    for row in answered:
        by_case.setdefault((row.instance, row.keep), []).append(row)
    cases = tuple(Case(tuple(group)) for group in by_case.values())
    scores = tuple(_scores(cases))
    disagreement = _disagreement(cases)
    refused = tuple(row for row in rows if row.loss is None)
    headline = tuple(_headline(cases, scores, disagreement))
    return Summary(cases, scores, disagreement, refused, headline)


def excess(row: Row, case: Case) -> float:
    """Return how far a row's loss lies above the case's lowest, relative to it."""
    return (_loss(row) - case.loss) / case.loss if case.loss > 0 else 0.0


def _scores(cases: Sequence[Case]) -> Iterable[Score]:
    pairs: dict[tuple[str, str], list[tuple[Row, Case]]] = {}
    for case in cases:
        for row in case.rows if case.closed else ():
            pairs.setdefault((row.kind, row.backend), []).append((row, case))
    for (kind, backend), mine in pairs.items():
        over = [max(0.0, excess(row, case)) for row, case in mine]
        yield Score(
            backend=backend,
            kind=kind,
            cases=len(mine),
            hits=sum(value <= HIT for value in over),
            mean_excess=statistics.fmean(over),
            worst_excess=max(over),
            seconds=statistics.median(row.seconds or 0.0 for row, _ in mine),
        )


def _disagreement(cases: Sequence[Case]) -> tuple[float, int]:
    several = [case for case in cases if len(case.proved) > 1]
    return max((excess(r, c) for c in several for r in c.proved), default=0.0), len(several)


def _headline(
    cases: Sequence[Case], scores: Sequence[Score], disagreement: tuple[float, int]
) -> Iterable[str]:
    windows = [case for case in cases if case.best.kind == WINDOW]
    layers = [case for case in cases if case.best.kind != WINDOW]
    for kind in dict.fromkeys(case.best.kind for case in layers):
        yield from _kind_headline(kind, [case for case in layers if case.best.kind == kind])
    if windows:
        yield _window_headline(windows, layers)
    for score in scores:
        if _kind_of(score.backend) is solvers.Kind.HEURISTIC:
            yield _score_headline(score)
    largest, several = disagreement
    if several:
        yield (
            f"where two or more exact backends finished ({several} problems), their optima differ "
            f"by at most {largest:.1e}"
        )


def _score_headline(score: Score) -> str:
    what = f"{score.cases} {score.kind} problems that are closed"
    if score.hits == score.cases:
        return f"{score.backend} found the optimum in all {what}"
    return (
        f"{score.backend} found the optimum in {score.hits} of {what}; on average it lies "
        f"{_share(score.mean_excess)} above it, at worst {_share(score.worst_excess)}"
    )


def _kind_headline(kind: str, cases: Sequence[Case]) -> Iterable[str]:
    closed = [case for case in cases if case.closed]
    if closed:
        slowest = max(min(row.seconds or 0.0 for row in case.proved) for case in closed)
        yield (
            f"{len(closed)} of {len(cases)} {kind} problems are solved to proven optimality, the "
            f"slowest in {slowest:.2g} s"
        )
    still = [case for case in cases if not case.closed and case.gap is not None]
    for sparsity in sorted({case.best.sparsity for case in still}):
        gaps = [c.gap for c in still if c.best.sparsity == sparsity if c.gap is not None]
        yield (
            f"{kind} at {sparsity:.0%} removed: the answer is within {min(gaps):.1%} to "
            f"{max(gaps):.1%} (median {statistics.median(gaps):.1%}) of the optimum in "
            f"{len(gaps)} problems that are not closed"
        )


def _window_headline(windows: Sequence[Case], layers: Sequence[Case]) -> str:
    """Say how often an exact window improves on what the whole layer's local search found.

    A window's loss of a choice is the whole layer's loss of that choice, so both compare directly.
    """
    incumbents = {
        (row.instance, row.keep): _loss(row)
        for case in layers
        for row in case.rows
        if row.backend == "local_search"
    }
    gains = []
    for case in windows:
        incumbent = incumbents.get(window_layer(case.best.instance))
        if case.closed and incumbent:
            gains.append(max(0.0, 1 - case.loss / incumbent))
    closed = sum(case.closed for case in windows)
    improved = [gain for gain in gains if gain > HIT]
    tail = f", by at most {_share(max(improved))} of the layer's loss" if improved else ""
    return (
        f"{closed} of {len(windows)} windows are solved to proven optimality; the layer's swap "
        f"optimum could be improved within {len(improved)} of them{tail}"
    )


def _share(value: float) -> str:
    """Return a share in per cent with two digits that count."""
    return f"{float(f'{100 * value:.2g}'):g}%"


def _gap(loss: float, bound: float | None) -> float | None:
    if bound is None:
        return None
    return 0.0 if loss <= 0 else max(0.0, (loss - max(bound, 0.0)) / loss)


def _loss(row: Row) -> float:
    assert row.loss is not None
    return row.loss


def _kind(row: Row) -> solvers.Kind:
    return _kind_of(row.backend)


def _kind_of(backend: str) -> solvers.Kind:
    return solvers.backend_class(backend).kind
