"""What the records of a study say: optima, gaps, how good heuristics are, whether solvers agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import solvers
from osscar.base.printable import are, counted
from osscar.report.proofs import proofs_in_words
from osscar.report.tables import share
from osscar.study.records import WINDOW, Instance, Proof, Record, window_layer
from solvers import Status

HIT = 1e-6
"""Relative excess over the optimum up to which a loss counts as the optimum; optima themselves are
known up to the gap tolerance of the study."""

SAME = 1e-12
"""Relative difference up to which two losses differ by rounding alone."""

_OPTIMAL = Status.OPTIMAL.name
_ROOT = "perspective"


@dataclass(frozen=True)
class Case:
    """All answers to one problem at one number of kept units.

    Parameters
    ----------
    records
        Those that have an answer, in the order of the study; there is at least one.
    refused
        Those that have none.
    """

    records: tuple[Record, ...]
    refused: tuple[Record, ...] = ()

    @property
    def best(self) -> Record:
        """The record of the lowest loss; of several the first."""
        return min(self.records, key=_loss)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The shares of units to remove that come to this number of kept units."""
        return self.best.sparsities or (self.best.sparsity,)

    @property
    def loss(self) -> float:
        """The lowest loss."""
        return _loss(self.best)

    @property
    def bound(self) -> float | None:
        """The highest lower bound that any record proved."""
        return max((r.lower_bound for r in self.records if r.lower_bound is not None), default=None)

    @property
    def gap(self) -> float | None:
        """From the lowest loss to the highest bound, as a share of the loss; None unbounded."""
        return _gap(self.loss, self.bound)

    @property
    def root_gap(self) -> float | None:
        """The same with the root bound alone."""
        root = next((r for r in self.records if r.backend == _ROOT), None)
        return _gap(self.loss, None if root is None else root.lower_bound)

    @property
    def closed(self) -> bool:
        """Whether some backend proved its answer optimal."""
        return any(r.status == _OPTIMAL for r in self.records)

    @property
    def proved(self) -> tuple[Record, ...]:
        """The records that are proved optimal."""
        return tuple(r for r in self.records if r.status == _OPTIMAL)

    @property
    def proof(self) -> Proof:
        """What its proof of optimality rests on at best; if it is open, its highest bound."""
        proofs = {record.proof for record in self.proved}
        if not self.closed:
            proofs = {record.proof for record in self.records if record.lower_bound == self.bound}
        best = (Proof.RECOMPUTED, Proof.WORD, Proof.RECORDED)
        return next((proof for proof in best if proof in proofs), Proof.NONE)

    @property
    def why_open(self) -> str:
        """Why it is not closed, in words."""
        return _why_open((*self.records, *self.refused))


@dataclass(frozen=True)
class Open:
    """What could not be closed.

    Parameters
    ----------
    instance, keep, units
        The problem.
    gap
        Of the best answer; None where there is no answer or no bound.
    why
        In words.
    """

    instance: str
    keep: int
    units: int
    gap: float | None
    why: str


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
class Overview:
    """What became of the problems of one kind at one share removed.

    Parameters
    ----------
    kind, sparsity
        What the units are, and what share of them leaves.
    problems, proved
        How many there are, and how many of them are solved to proven optimality.
    gaps
        Of those that are open, where there is a bound, ascending.
    seconds
        Of the slowest of the proofs, each by the fastest backend; None if there is none.
    """

    kind: str
    sparsity: float
    problems: int
    proved: int
    gaps: tuple[float, ...]
    seconds: float | None

    @classmethod
    def of(cls, kind: str, sparsity: float, cases: Sequence[Case]) -> Overview:
        """Count cases."""
        still = sorted(c.gap for c in cases if not c.closed and c.gap is not None)
        times = [min(r.seconds or 0.0 for r in c.proved) for c in cases if c.closed]
        proved = sum(case.closed for case in cases)
        return cls(kind, sparsity, len(cases), proved, tuple(still), max(times, default=None))

    @property
    def median_gap(self) -> float | None:
        """The median gap of those that are open."""
        return statistics.median(self.gaps) if self.gaps else None


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
    still_open
        Problems without a proven optimum, also those without any answer.
    trivial
        Problems in which there is nothing to choose.
    answer
        How far from optimal, in one sentence.
    overviews
        One for each kind of unit and share removed.
    headline
        The findings in sentences.
    """

    cases: tuple[Case, ...]
    scores: tuple[Score, ...]
    largest_disagreement: tuple[float, int]
    refused: tuple[Record, ...]
    still_open: tuple[Open, ...]
    trivial: tuple[Instance, ...]
    answer: str
    overviews: tuple[Overview, ...]
    headline: tuple[str, ...]


def summarize(records: Sequence[Record], trivial: Sequence[Instance] = ()) -> Summary:
    """Group the records of a study by problem, and say what they show.

    Parameters
    ----------
    records
        From `osscar.study.directory.Study.run`.
    trivial
        From `osscar.study.directory.Study.trivial`.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.instance, record.keep), []).append(record)
    cases: list[Case] = []
    still_open: list[Open] = []
    for group in groups.values():
        answered = tuple(record for record in group if record.loss is not None)
        refused = tuple(record for record in group if record.loss is None)
        case = Case(answered, refused) if answered else None
        if case is not None:
            cases.append(case)
        if case is None or not case.closed:
            first, gap = group[0], None if case is None else case.gap
            still_open.append(Open(first.instance, first.keep, first.units, gap, _why_open(group)))
    scores = tuple(_scores(cases))
    disagreement = _disagreement(cases)
    return Summary(
        cases=tuple(cases),
        scores=scores,
        largest_disagreement=disagreement,
        refused=tuple(record for record in records if record.loss is None),
        still_open=tuple(still_open),
        trivial=tuple(trivial),
        answer=_answer(cases),
        overviews=tuple(_overviews(cases)),
        headline=tuple(_headline(cases, disagreement, trivial)),
    )


def excess(record: Record, case: Case) -> float:
    """Return how far a record's loss lies above the case's lowest, relative to it."""
    return (_loss(record) - case.loss) / case.loss if case.loss > 0 else 0.0


def _scores(cases: Sequence[Case]) -> Iterable[Score]:
    pairs: dict[tuple[str, str], list[tuple[Record, Case]]] = {}
    for case in cases:
        for record in case.records if case.closed else ():
            pairs.setdefault((record.kind, record.backend), []).append((record, case))
    for (kind, backend), mine in pairs.items():
        over = [max(0.0, excess(record, case)) for record, case in mine]
        yield Score(
            backend=backend,
            kind=kind,
            cases=len(mine),
            hits=sum(value <= HIT for value in over),
            mean_excess=statistics.fmean(over),
            worst_excess=max(over),
            seconds=statistics.median(record.seconds or 0.0 for record, _ in mine),
        )


def _overviews(cases: Sequence[Case]) -> Iterable[Overview]:
    """Yield an overview of each kind and share; windows come last."""
    kinds = dict.fromkeys(case.best.kind for case in cases)
    for kind in sorted(kinds, key=lambda kind: kind == WINDOW):
        mine = [case for case in cases if case.best.kind == kind]
        for sparsity in sorted({s for case in mine for s in case.sparsities}):
            yield Overview.of(kind, sparsity, [c for c in mine if sparsity in c.sparsities])


def _answer(cases: Sequence[Case]) -> str:
    """Say how far from optimal the answers to whole problems are."""
    layers = [case for case in cases if case.best.kind != WINDOW]
    if not layers:
        return "Nothing was solved: see the refusals below."
    proved = sum(case.closed for case in layers)
    if proved == len(layers):
        every = "The one problem is" if proved == 1 else f"All {proved} problems are"
        return f"{every} solved to proven optimality."
    still = [case for case in layers if not case.closed]
    gaps = [case.gap for case in still if case.gap is not None]
    said = f"{proved} of {counted(len(layers), 'problem')} {are(proved)} solved "
    said += "to proven optimality"
    if not gaps:
        return f"{said}; of the others nothing is known."
    which = "the other" if len(still) == 1 else f"the other {len(still)}"
    known = "" if len(gaps) == len(still) else f" that have a bound ({len(gaps)})"
    far = share(gaps[0], 2)
    if gaps[1:]:
        median = share(statistics.median(gaps), 2)
        far = f"{share(min(gaps), 2)} to {share(max(gaps), 2)} (median {median})"
    return f"{said}; in {which}{known} the answer is within {far} of the optimum."


def _disagreement(cases: Sequence[Case]) -> tuple[float, int]:
    several = [case for case in cases if len(case.proved) > 1]
    return max((excess(r, c) for c in several for r in c.proved), default=0.0), len(several)


def _why_open(records: Sequence[Record]) -> str:
    """Say of each exact backend how it ended, and of the others why they gave nothing."""
    exact = [record for record in records if is_exact(record)]
    ends = {f"{r.backend}: {r.status.lower().replace('_', ' ')}" for r in exact if not r.error}
    ends |= {_said(record) for record in records if record.error}
    if not exact:
        ends.add(f"no exact backend was asked: {counted(records[0].units, 'unit')}")
    return "; ".join(sorted(ends))


def _said(record: Record) -> str:
    """Return a record's error with the backend in front, once."""
    return (
        record.error
        if record.error.startswith(record.backend)
        else f"{record.backend}: {record.error}"
    )


def _headline(
    cases: Sequence[Case],
    disagreement: tuple[float, int],
    trivial: Sequence[Instance],
) -> Iterable[str]:
    windows = [case for case in cases if case.best.kind == WINDOW]
    layers = [case for case in cases if case.best.kind != WINDOW]
    for kind in dict.fromkeys(case.best.kind for case in layers):
        yield from _kind_headline(kind, [case for case in layers if case.best.kind == kind])
    if windows:
        yield _window_headline(windows, layers)
    largest, several = disagreement
    if several:
        agree = "are the same" if largest <= SAME else f"differ by at most {largest:.1e}"
        found = counted(several, "problem")
        yield f"where two or more exact backends finished ({found}), their optima {agree}"
    if trivial:
        yield (
            f"there is nothing to choose in {', '.join(i.name for i in trivial)}: a problem of one "
            "unit has one support"
        )


def _proofs(closed: Sequence[Case]) -> str:
    return proofs_in_words(case.proof for case in closed)


def _kind_headline(kind: str, cases: Sequence[Case]) -> Iterable[str]:
    closed = [case for case in cases if case.closed]
    if closed:
        slowest = max(min(record.seconds or 0.0 for record in case.proved) for case in closed)
        yield (
            f"{len(closed)} of {counted(len(cases), f'{kind} problem')} "
            f"{are(len(closed))} solved to proven optimality, the slowest in {slowest:.2g} s; "
            f"{_proofs(closed)}"
        )


def _window_headline(windows: Sequence[Case], layers: Sequence[Case]) -> str:
    """Say how often an exact window improves on what the whole layer's local search found.

    A window's loss of a choice is the whole layer's loss of that choice, so both compare directly.
    """
    incumbents = {
        (record.instance, record.keep): _loss(record)
        for case in layers
        for record in case.records
        if record.backend == "local_search"
    }
    gains = []
    for case in windows:
        incumbent = incumbents.get(window_layer(case.best.instance))
        if case.closed and incumbent:
            gains.append(max(0.0, 1 - case.loss / incumbent))
    closed = [case for case in windows if case.closed]
    improved = [gain for gain in gains if gain > HIT]
    tail = f", by at most {share(max(improved), 2)} of the layer's loss" if improved else ""
    return (
        f"{len(closed)} of {counted(len(windows), 'window')} "
        f"{are(len(closed))} solved to proven optimality"
        f"{'; ' + _proofs(closed) if closed else ''}; the layer's swap optimum could be improved "
        f"within {len(improved)} of them{tail}"
    )


def _gap(loss: float, bound: float | None) -> float | None:
    if bound is None:
        return None
    return 0.0 if loss <= 0 else max(0.0, (loss - max(bound, 0.0)) / loss)


def _loss(record: Record) -> float:
    assert record.loss is not None
    return record.loss


def is_exact(record: Record) -> bool:
    """Tell whether a record is of an exact backend."""
    return solvers.backend_class(record.backend).kind is solvers.BackendKind.EXACT
