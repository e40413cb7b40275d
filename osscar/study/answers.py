"""From a verified solution to its record, and to a file of tensors that proves it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import solvers
from osscar.base.files import atomic_write
from osscar.study.records import ProofBasis, Record
from solvers import Solution
from solvers.certificates.certificate import MultiplierCertificate


def answered(asked: Record, solution: Solution, directory: Path, certificate: str) -> Record:
    """Verify a solution, write what proves it to a file of the study, and return its record."""
    said = solution.record(solution.verify())
    fields = {field.name for field in dataclasses.fields(Record)}
    rests_on = ProofBasis.WORD if said.recomputed_bound is None else ProofBasis.RECOMPUTED
    with atomic_write(directory / certificate) as partial:
        proved = solvers.save_certificate(partial, solution)
    return dataclasses.replace(
        asked,
        **{name: value for name, value in vars(said).items() if name in fields},
        proof=ProofBasis.NONE if said.lower_bound is None else rests_on,
        bound_limit=_limit(solution),
        certificate=certificate if proved else "",
    )


def _limit(solution: Solution) -> float | None:
    """Return what no bound of that kind can exceed; None where the certificate does not tell."""
    if not isinstance(solution.certificate, MultiplierCertificate):
        return None
    try:
        return solution.certificate.limit(solution.problem)
    except solvers.VerificationError:  # rounded, they are no moments
        return None
