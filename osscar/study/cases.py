"""What the records of one problem say: its optimum, its gap, and what proves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import solvers
from osscar.base.printable import pluralize
from osscar.study.records import ROOT_BOUND, ProofBasis, Record
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
