"""From a solution to its record and back: a record says what a verified solution says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

import solvers
from osscar.base.errors import StudyError
from osscar.study.certificates import Evidence, load_evidence
from osscar.study.records import Proof, Record
from solvers.protocol import DEFAULT_GAP_TOLERANCE

_SAID = tuple(
    sorted(
        {f.name for f in dataclasses.fields(solvers.SolutionRecord)} - {"backend", "proved_optimal"}
    )
)
"""The fields of a solution's own record that a study's record has under the same names."""


def claimed(record: Record, problem: solvers.SubsetProblem, certificate: Path) -> solvers.Solution:
    """Return the solution that a record stands for, with newly refitted weights.

    Parameters
    ----------
    record
        Of an answer, whatever it claims.
    problem
        What it answers.
    certificate
        The file of its certificate, if it names one.

    Raises
    ------
    StudyError
        If no solution of the problem can be like that.
    FileError
        If the certificate cannot be read.
    """
    units = record.support
    if len(set(units)) != problem.keep or not all(0 <= unit < problem.units for unit in units):
        raise StudyError(f"it keeps {units!r}, not {problem.keep} of {problem.units} units")
    if record.status not in solvers.Status.__members__:
        raise StudyError(f"its status is {record.status!r}")
    asked = record.options.get("gap_tolerance")
    allowed = max(asked if isinstance(asked, float) else 0.0, DEFAULT_GAP_TOLERANCE)
    if not 0 <= record.gap_tolerance <= allowed:
        raise StudyError(f"its gap tolerance is {record.gap_tolerance}, above {allowed}")
    support = torch.tensor(sorted(units), dtype=torch.int64)
    evidence = load_evidence(certificate, record.certificate) if record.certificate else Evidence()
    assert record.loss is not None
    return solvers.Solution(
        problem=problem,
        backend=record.backend,
        support=support,
        weights=solvers.refit(problem, support)[0],
        loss=record.loss,
        status=solvers.Status[record.status],
        lower_bound=-math.inf if record.lower_bound is None else record.lower_bound,
        bound_from=record.bound_from,
        iterations=record.iterations,
        seconds=record.seconds or 0.0,
        gap_tolerance=record.gap_tolerance,
        certificate=evidence.certificate,
        windows=evidence.windows,
    )


def answered(
    asked: Record, solution: solvers.Solution, certificate: str, unproved: Proof
) -> Record:
    """Return a record of a solution that has been verified just now.

    Parameters
    ----------
    asked
        The record with nothing answered.
    solution
        The answer.
    certificate
        Digest of the file of its certificate.
    unproved
        What its bound rests on if there is no certificate.
    """
    said = solution.record(solution.verify())
    rests_on = unproved if said.recomputed_bound is None else Proof.RECOMPUTED
    return dataclasses.replace(
        asked,
        **{name: getattr(said, name) for name in _SAID},
        proof=Proof.NONE if said.lower_bound is None else rests_on,
        gap_tolerance=solution.gap_tolerance,
        certificate=certificate,
    )
