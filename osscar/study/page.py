"""What an optimality-gap study shows: its cases, tables, and the page in its directory."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import solvers
from osscar.base.files import write_text
from osscar.base.printable import are, decimals, percent, pluralize, share
from osscar.report.sections import (
    Section,
    Table,
    Text,
    facts,
    settings,
    settings_table,
    stages_table,
    table,
)
from osscar.report.shown import Shown, columns, page
from osscar.study.records import (
    INCUMBENT,
    ROOT_BOUND,
    SPARSITIES,
    WINDOW,
    Instance,
    ProofBasis,
    Record,
    window_layer,
)
from solvers import Status

HIT = 1e-6
"""Relative excess over the optimum up to which a loss counts as the optimum; optima themselves are
known up to the gap tolerance of the study."""


@dataclass(frozen=True)
class Case:
    """All records of one problem at one number of kept units, in the order of the study."""

    records: tuple[Record, ...]

    @cached_property
    def answers(self) -> tuple[Record, ...]:
        """The records that have an answer; `best` and `loss` are there where one does."""
        return tuple(record for record in self.records if record.loss is not None)

    @cached_property
    def best(self) -> Record:
        """The record of the lowest loss; of several the first."""
        return min(self.answers, key=_loss)

    @property
    def loss(self) -> float:
        """The lowest loss."""
        return _loss(self.best)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The shares of units to remove that come to this number of kept units."""
        return self.records[0].sparsities

    @cached_property
    def bound(self) -> float | None:
        """The highest lower bound that any record proved."""
        return max((r.lower_bound for r in self.answers if r.lower_bound is not None), default=None)

    @property
    def relative_bound(self) -> float | None:
        """The same, not below zero, relative to the loss of removing everything."""
        if self.bound is None or self.loss <= 0:
            return None if self.bound is None else 0.0
        return max(0.0, self.bound) / self.loss * (self.best.relative_loss or 0.0)

    @property
    def gap(self) -> float | None:
        """From the lowest loss to the highest bound, as a share of the loss; None unbounded."""
        return self._gap(self.bound)

    @property
    def root_gap(self) -> float | None:
        """The same with the root bound alone."""
        root = (r.lower_bound for r in self.answers if r.backend == ROOT_BOUND)
        return self._gap(next(root, None))

    @property
    def limit_gap(self) -> float | None:
        """The least gap that a root bound can leave, however long it is searched for."""
        limits = (r.bound_limit for r in self.answers if r.bound_limit is not None)
        return self._gap(min(limits, default=None))

    def _gap(self, bound: float | None) -> float | None:
        if bound is None:
            return None
        return 0.0 if self.loss <= 0 else max(0.0, (self.loss - max(bound, 0.0)) / self.loss)

    @cached_property
    def proved(self) -> tuple[Record, ...]:
        """The records that are proved optimal; it is closed if there is one."""
        return tuple(r for r in self.answers if r.status == Status.OPTIMAL.name)

    @property
    def closed(self) -> bool:
        """Whether some backend proved its answer optimal."""
        return bool(self.proved)

    @property
    def proof(self) -> ProofBasis:
        """What its proof of optimality rests on at best; if it is open, its highest bound."""
        bounded = (r for r in self.answers if r.lower_bound == self.bound)
        proofs = {record.proof for record in self.proved or bounded}
        best = (ProofBasis.RECOMPUTED, ProofBasis.WORD)
        return next((proof for proof in best if proof in proofs), ProofBasis.NONE)

    @property
    def seconds(self) -> float:
        """The time of the fastest proof."""
        return min(record.seconds or 0.0 for record in self.proved)

    @property
    def why_open(self) -> str:
        """How each exact backend ended, and why the others gave nothing; empty if it is closed."""
        if self.closed:
            return ""
        exact = [
            record
            for record in self.records
            if solvers.backend_class(record.backend).kind is solvers.BackendKind.EXACT
        ]
        ends = {f"{r.backend}: {r.status.lower().replace('_', ' ')}" for r in exact if not r.error}
        ends |= {f"{r.backend}: {r.error}" for r in self.records if r.error}
        if not exact:
            ends.add(f"no exact backend was asked: {pluralize(self.records[0].units, 'unit')}")
        return "; ".join(sorted(ends))

    def excess(self, record: Record) -> float:
        """Return how far a record's loss lies above the lowest, relative to it."""
        return (_loss(record) - self.loss) / self.loss if self.loss > 0 else 0.0


def _loss(record: Record) -> float:
    assert record.loss is not None
    return record.loss


def proofs_in_words(proofs: Iterable[ProofBasis]) -> str:
    """Say how many proofs do not rest on the solver's word."""
    counts = Counter(proofs)
    if counts[ProofBasis.RECOMPUTED] == counts.total():
        return "every proof was recomputed from its problem alone"
    return (
        f"{counts[ProofBasis.RECOMPUTED]} of the proofs were recomputed, "
        f"{counts[ProofBasis.WORD]} are {ProofBasis.WORD}"
    )


if TYPE_CHECKING:
    from osscar.study.directory import Study
    from osscar.study.records import StudyDesign

REPORT_FILE = "report.html"


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """A study in numbers.

    Parameters
    ----------
    cases
        Those with an answer, in the order of the study.
    unanswered
        Those without.
    trivial
        Problems in which there is nothing to choose.
    """

    cases: tuple[Case, ...]
    unanswered: tuple[Case, ...] = ()
    trivial: tuple[Instance, ...] = ()

    def __repr__(self) -> str:
        return f"Summary({self.answer!r})"

    def sections(self) -> Iterator[Section]:
        """Return what a page shows of it."""
        return sections(self)

    @property
    def layers(self) -> list[Case]:
        """The cases that are whole problems."""
        return [case for case in self.cases if case.best.kind != WINDOW]

    @property
    def windows(self) -> list[Case]:
        """The others."""
        return [case for case in self.cases if case.best.kind == WINDOW]

    @property
    def closed(self) -> list[Case]:
        """The cases with a proven optimum."""
        return [case for case in self.cases if case.closed]

    @property
    def answer(self) -> str:
        """How far from optimal the answers to whole problems are, in one sentence."""
        layers = self.layers
        if not layers:
            return "Nothing was solved: see the reasons below."
        proved = sum(case.closed for case in layers)
        said = f"{proved} of {pluralize(len(layers), 'problem')} {are(proved)} solved to proven "
        said += "optimality"
        still = [case.gap for case in layers if not case.closed]
        known = [gap for gap in still if gap is not None]
        if known:
            said += f"; the gap of the others is at most {share(max(known), 2)}"
        if len(known) < len(still):
            said += f"; {len(still) - len(known)} have no bound"
        return f"{said}."

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what else is known, each with a name."""
        if self.closed:
            yield "proofs", proofs_in_words(case.proof for case in self.closed)
        if self.windows:
            yield "windows", self._of_windows()
        for case in self.unanswered:
            yield "no answer", f"{case.records[0].instance}: {case.why_open}"
        named = ", ".join(instance.name for instance in self.trivial)
        yield "nothing to choose", f"{named} (one unit each)" if named else ""

    def _of_windows(self) -> str:
        """Say how often an exact window improves on what the whole layer's local search found.

        A window's loss of a choice is the whole layer's loss of that choice, so both compare.
        """
        incumbents = {
            (record.instance, record.keep): record.loss
            for case in self.layers
            for record in case.answers
            if record.backend == INCUMBENT
        }
        closed = [case for case in self.windows if case.closed]
        found = ((case, incumbents.get(window_layer(case.best.instance))) for case in closed)
        gains = [1 - case.loss / incumbent for case, incumbent in found if incumbent]
        improved = [gain for gain in gains if gain > HIT]
        tail = f", by at most {share(max(improved), 2)} of the layer's loss" if improved else ""
        return (
            f"{len(closed)} of {len(self.windows)} solved to proven optimality; "
            f"{len(improved)} improve on the layer's local search{tail}"
        )


def summarize(records: Sequence[Record], trivial: Sequence[Instance] = ()) -> Summary:
    """Group the records of a study (`Study.run`) by problem, beside its `Study.trivial`."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.instance, record.keep), []).append(record)
    cases = [Case(tuple(group)) for group in groups.values()]
    return Summary(
        tuple(case for case in cases if case.answers),
        tuple(case for case in cases if not case.answers),
        tuple(trivial),
    )


def write_report(
    study: Study,
    design: StudyDesign,
    records: Sequence[Record],
    summary: Summary,
    *,
    jobs: int = 1,
    stages: Mapping[str, float] | None = None,
) -> Path:
    """Write the page into the study's directory; return its path."""
    source = dict(study.source)
    removed = ", ".join(map(share, SPARSITIES))
    if "problems" in source:
        source["problems"] = [one["file"] for one in source["problems"]]
        removed = f"as each problem says, or {removed}"
    shown = [
        *sections(summary),
        stages_table(stages or {}, "Where the time of this run went"),
        table(
            "Every solve",
            {**columns(Record), "command": lambda row: row["command"]},
            ({**vars(record), "command": record.command} for record in records),
            note="The command solves it again in the directory of the study.",
            folded=True,
        ),
        settings_table(
            settings({**source, "processes at once": jobs}),
            settings(asdict(design), type(design), chosen={"sparsities": removed}),
        ),
    ]
    path = study.directory / REPORT_FILE
    write_text(path, page("How far from optimal?", shown))
    return path


def sections(summary: Summary) -> Iterator[Section]:
    """Yield what a study shows of itself."""
    yield Text((summary.answer,), look="answer")
    yield overview_table(summary)
    yield facts("What else was found", summary.facts())
    yield scores_table(summary)
    yield cases_table(summary.layers)
    yield cases_table(summary.windows, "Windows")


# ---- tables ------------------------------------------------------------------------------


def overview_table(summary: Summary) -> Table:
    """Return one row for each kind of units and share removed; windows come last."""
    kinds = dict.fromkeys(case.best.kind for case in summary.cases)
    rows = []
    for kind in sorted(kinds, key=lambda kind: kind == WINDOW):
        mine = [case for case in summary.cases if case.best.kind == kind]
        for sparsity in sorted({one for case in mine for one in case.sparsities}):
            cases = [case for case in mine if sparsity in case.sparsities]
            closed = [case.seconds for case in cases if case.closed]
            gaps = [case.gap for case in cases if not case.closed and case.gap is not None]
            rows.append(
                (
                    *(kind, share(sparsity), str(len(cases)), str(len(closed))),
                    percent(statistics.median(gaps)) if gaps else "",
                    percent(max(gaps, default=None)),
                    f"{max(closed):.2g}" if closed else "",
                )
            )
    columns = ("units", "removed >", "problems >", "proved optimal >", "median gap of others >")
    return Table(
        "Overview",
        (*columns, "widest gap >", "slowest proof, s >"),
        tuple(rows),
        note="Losses are relative to the loss of removing every unit, and recomputed in float64 "
        "from each problem alone.",
    )


def cases_table(cases: Sequence[Case], title: str = "Best answers") -> Table:
    """Return one row for each problem and number of kept units."""
    windows = (
        "The units of a window are chosen anew and exactly, while the others of its layer stay as "
        "local_search left them. A window that cannot be improved is no bound on the layer."
    )
    return table(
        title,
        {
            "problem": lambda case: case.best.instance,
            "removed >": lambda case: ", ".join(map(share, case.sparsities)),
            "kept >": lambda case: f"{case.best.keep} of {case.best.units}",
            "loss >": lambda case: decimals(case.best.relative_loss),
            "bound >": lambda case: decimals(case.relative_bound),
            "gap >": lambda case: percent(case.gap),
            "root gap >": lambda case: percent(case.root_gap),
            "limit >": lambda case: (
                "none known" if case.limit_gap == 0 else percent(case.limit_gap)
            ),
            "found by": lambda case: case.best.backend,
            "proof": lambda case: case.proof,
            "why open": lambda case: case.why_open,
        },
        cases,
        note=(windows if title == "Windows" else LIMIT),
        folded=title == "Windows",
    )


LIMIT = (
    "Limit: the gap that every root bound leaves, however long it is searched for. Proof: what the "
    "optimum, or the bound of what is open, rests on: recomputed from the problem and a "
    "certificate alone, or the solver's word where it gives none."
)


def scores_table(summary: Summary) -> Table:
    """Return one row for each backend and kind of problems whose optimum is known."""
    pairs: dict[tuple[str, str], list[tuple[Record, Case]]] = {}
    for case in summary.closed:
        for record in case.answers:
            pairs.setdefault((record.backend, record.kind), []).append((record, case))

    def excess(row: Any) -> list[float]:
        return [max(0.0, case.excess(record)) for record, case in row[1]]

    def hits(row: Any) -> str:
        count = sum(value <= HIT for value in excess(row))
        return f"{count} ({count / len(row[1]):.0%})"

    return table(
        "Backends on problems with a proven optimum",
        {
            "backend": lambda row: row[0][0],
            "problems": lambda row: row[0][1],
            "solved >": lambda row: str(len(row[1])),
            "optimal >": hits,
            "mean excess >": lambda row: percent(statistics.fmean(excess(row)), 3),
            "worst >": lambda row: percent(max(excess(row))),
            "median seconds >": lambda row: decimals(
                statistics.median(record.seconds or 0.0 for record, _ in row[1]), 3
            ),
        },
        pairs.items(),
    )
