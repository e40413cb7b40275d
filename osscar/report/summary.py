"""What the records of a study say: optima, gaps, how good heuristics are, whether solvers agree."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import solvers
from osscar.base.numbers import share
from osscar.base.printable import are, pluralize
from osscar.base.shown import Shown
from osscar.study.records import ROOT_BOUND, WINDOW, Instance, ProofBasis, Record, window_layer
from solvers import Status

HIT = 1e-6
"""Relative excess over the optimum up to which a loss counts as the optimum; optima themselves are
known up to the gap tolerance of the study."""

_SAME = 1e-12
"""Relative difference up to which two losses differ by rounding alone."""


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
        best = (ProofBasis.RECOMPUTED, ProofBasis.WORD, ProofBasis.RECORDED)
        return next((proof for proof in best if proof in proofs), ProofBasis.NONE)

    @property
    def seconds(self) -> float:
        """The time of the fastest proof."""
        return min(record.seconds or 0.0 for record in self.proved)

    @property
    def why_open(self) -> str:
        """How each exact backend ended, and why the others gave nothing, in words."""
        exact = [record for record in self.records if _is_exact(record)]
        ends = {f"{r.backend}: {r.status.lower().replace('_', ' ')}" for r in exact if not r.error}
        for record in self.records:
            if record.error:
                named = record.error.startswith(record.backend)
                ends.add(record.error if named else f"{record.backend}: {record.error}")
        if not exact:
            units = pluralize(self.records[0].units, "unit")
            ends.add(f"no exact backend was asked: {units}")
        return "; ".join(sorted(ends))

    def excess(self, record: Record) -> float:
        """Return how far a record's loss lies above the lowest, relative to it."""
        return (_loss(record) - self.loss) / self.loss if self.loss > 0 else 0.0


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """A study in numbers and sentences.

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
    def still_open(self) -> list[Case]:
        """What has no proven optimum, also where there is no answer at all."""
        return [*(case for case in self.cases if not case.closed), *self.unanswered]

    @property
    def refused(self) -> list[Record]:
        """The records without an answer."""
        every = (*self.cases, *self.unanswered)
        return [record for case in every for record in case.records if record.loss is None]

    @property
    def largest_disagreement(self) -> tuple[float, int]:
        """How far proved optima of one problem are apart, and how many problems have several."""
        several = [case for case in self.cases if len(case.proved) > 1]
        return max((c.excess(r) for c in several for r in c.proved), default=0.0), len(several)

    @property
    def answer(self) -> str:
        """How far from optimal the answers to whole problems are, in one sentence."""
        layers = self.layers
        if not layers:
            return "Nothing was solved: see the refusals below."
        proved = sum(case.closed for case in layers)
        if proved == len(layers):
            every = "The one problem is" if proved == 1 else f"All {proved} problems are"
            return f"{every} solved to proven optimality."
        still = [case for case in layers if not case.closed]
        gaps = [case.gap for case in still if case.gap is not None]
        said = f"{proved} of {pluralize(len(layers), 'problem')} {are(proved)} solved "
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

    @property
    def headline(self) -> list[str]:
        """The findings in sentences."""
        return list(self._headline())

    def _headline(self) -> Iterator[str]:
        for kind in dict.fromkeys(case.best.kind for case in self.layers):
            cases = [case for case in self.layers if case.best.kind == kind]
            closed = [case for case in cases if case.closed]
            if closed:
                yield (
                    f"{len(closed)} of {pluralize(len(cases), f'{kind} problem')} "
                    f"{are(len(closed))} solved to proven optimality, the slowest in "
                    f"{max(case.seconds for case in closed):.2g} s; "
                    f"{proofs_in_words(case.proof for case in closed)}"
                )
        if self.windows:
            yield self._of_windows()
        largest, several = self.largest_disagreement
        if several:
            agree = "are the same" if largest <= _SAME else f"differ by at most {largest:.1e}"
            found = pluralize(several, "problem")
            yield f"where two or more exact backends finished ({found}), their optima {agree}"
        if self.trivial:
            named = ", ".join(instance.name for instance in self.trivial)
            yield f"there is nothing to choose in {named}: a problem of one unit has one support"

    def _of_windows(self) -> str:
        """Say how often an exact window improves on what the whole layer's local search found.

        A window's loss of a choice is the whole layer's loss of that choice, so both compare.
        """
        incumbents = {
            (record.instance, record.keep): _loss(record)
            for case in self.layers
            for record in case.answers
            if record.backend == "local_search"
        }
        closed = [case for case in self.windows if case.closed]
        found = ((case, incumbents.get(window_layer(case.best.instance))) for case in closed)
        gains = [1 - case.loss / incumbent for case, incumbent in found if incumbent]
        improved = [gain for gain in gains if gain > HIT]
        tail = f", by at most {share(max(improved), 2)} of the layer's loss" if improved else ""
        proofs = f"; {proofs_in_words(case.proof for case in closed)}" if closed else ""
        return (
            f"{len(closed)} of {pluralize(len(self.windows), 'window')} {are(len(closed))} "
            f"solved to proven optimality{proofs}; the layer's swap optimum could be improved "
            f"within {len(improved) or 'none'} of them{tail}"
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


def _is_exact(record: Record) -> bool:
    """Tell whether a record is of an exact backend."""
    return solvers.backend_class(record.backend).kind is solvers.BackendKind.EXACT


def _loss(record: Record) -> float:
    assert record.loss is not None
    return record.loss


# ---- what proofs rest on, in the same words wherever they are printed ---------------------

_UNCHECKED = {
    ("lower_bound",): "the bound is the solver's word",
    ("lower_bound", "status"): "the bound, and the status that rests on it, are the solver's word",
    ("status",): (
        "the status is the solver's word, as rounding could hide an exchange that lowers the loss"
    ),
}


def proofs_in_words(proofs: Iterable[ProofBasis]) -> str:
    """Say how many proofs do not rest on the solver's word."""
    counts = Counter(proofs)
    if counts[ProofBasis.RECOMPUTED] == counts.total():
        return "every proof was recomputed from its problem alone"
    said = [f"{counts[ProofBasis.RECOMPUTED]} of the proofs were recomputed"]
    said += [
        f"{counts[proof]} are {proof}"
        for proof in (ProofBasis.WORD, ProofBasis.RECORDED)
        if counts[proof]
    ]
    return ", ".join(said)


def not_recomputed_in_words(names: Sequence[str]) -> str:
    """Say which claims a verification did not recompute (`solvers.Verification`); '' if none."""
    return f"not recomputed: {_UNCHECKED[tuple(names)]}" if names else ""
