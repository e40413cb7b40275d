"""From a solution to its record and back: a record says what a verified solution says.

What proves a solution is a file of tensors beside its record, so that nobody need believe the
record.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import solvers
from osscar.base.errors import JournalError
from osscar.base.files import atomic_write, file_digest
from osscar.study.records import ProofBasis, Record
from solvers import ProblemError, Solution
from solvers.certificates.certificate import EnumerationCertificate, MultiplierCertificate
from solvers.certificates.tree_certificate import Certificate, TreeCertificate
from solvers.protocol import DEFAULT_GAP_TOLERANCE, WindowCertificate
from solvers.storage import read, write


def claimed(record: Record, problem: solvers.SubsetProblem, certificate: Path) -> Solution:
    """Return the solution that a record stands for, with newly refitted weights."""
    units = record.support
    if len(set(units)) != problem.keep or not all(0 <= unit < problem.units for unit in units):
        raise JournalError(f"it keeps {units!r}, not {problem.keep} of {problem.units} units")
    if record.status not in solvers.Status.__members__:
        raise JournalError(f"its status is {record.status!r}")
    asked = record.options.get("gap_tolerance")
    allowed = max(asked if isinstance(asked, float) else 0.0, DEFAULT_GAP_TOLERANCE)
    if not 0 <= record.gap_tolerance <= allowed:
        raise JournalError(f"its gap tolerance is {record.gap_tolerance}, above {allowed}")
    support = torch.tensor(sorted(units), dtype=torch.int64)
    proof: Certificate | None = None
    windows: tuple[WindowCertificate, ...] = ()
    if record.certificate:
        proof, windows = load_certificate(certificate, record.certificate)
    assert record.loss is not None
    return Solution(
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
        certificate=proof,
        windows=windows,
    )


def answered(asked: Record, solution: Solution, certificate: str, unproved: ProofBasis) -> Record:
    """Return a record of a solution, which is verified.

    Nothing is answered yet in `asked`; the file of its certificate has a digest; and `unproved` is
    what its bound rests on if there is no certificate.
    """
    said = solution.record(solution.verify())
    fields = {field.name for field in dataclasses.fields(Record)}
    rests_on = unproved if said.recomputed_bound is None else ProofBasis.RECOMPUTED
    return dataclasses.replace(
        asked,
        **{name: value for name, value in vars(said).items() if name in fields},
        proof=ProofBasis.NONE if said.lower_bound is None else rests_on,
        bound_limit=_limit(solution),
        gap_tolerance=solution.gap_tolerance,
        certificate=certificate,
    )


def _limit(solution: Solution) -> float | None:
    """Return what no bound of that kind can exceed; None where the certificate does not tell."""
    if not isinstance(solution.certificate, MultiplierCertificate):
        return None
    try:
        return solution.certificate.limit(solution.problem)
    except solvers.VerificationError:  # rounded, they are no moments
        return None


# ---- certificates as files ---------------------------------------------------------------

_KIND, _WINDOWS = "certificate", "windows"
_KINDS: dict[type, str] = {
    MultiplierCertificate: "multipliers",
    TreeCertificate: "tree",
    EnumerationCertificate: "enumeration",
}
_ROOT, _UNITS = "root", "units"
"""The parts of a tree and of a window that are not the tree's own tensors."""

_MARK = "marks"
"""A tensor of no meaning: a file of tensors holds at least one."""

_WHOLE = {"parent": torch.int64, "sides": torch.int8, _UNITS: torch.int64, _MARK: torch.int8}
"""The formats of tensors that do not hold real numbers."""

_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_WINDOWS = 10**6


def save_certificate(path: Path, solution: Solution) -> str:
    """Write what proves a solution, and return the digest of the file; "" if nothing does."""
    kind = _KINDS.get(type(solution.certificate), "")
    if not kind and not solution.windows:
        return ""
    tensors = {_MARK: torch.zeros(1, dtype=torch.int8)}
    if kind:
        tensors |= _tensors(solution.certificate, "bound.")
    for index, window in enumerate(solution.windows):
        tensors[f"{index}.{_UNITS}"] = window.units
        tensors |= _tensors(window.certificate, f"{index}.")
    with atomic_write(path) as partial:
        write(partial, {_KIND: kind, _WINDOWS: len(solution.windows)}, tensors)
    return file_digest(path)


def load_certificate(
    path: Path, sha256: str
) -> tuple[Certificate | None, tuple[WindowCertificate, ...]]:
    """Read what `save_certificate` wrote: that of the bound, and those of windows."""
    if file_digest(path) != sha256:
        raise JournalError(f"{path} is not the certificate that its record names")
    try:
        header, tensors = read(path)
        for name, value in tensors.items():
            expected = _WHOLE.get(name.rpartition(".")[2])
            if value.dtype != expected if expected else value.dtype not in _REAL:
                raise ValueError(f"{name} is of {value.dtype}")
        kind, windows = header.get(_KIND), header.get(_WINDOWS)
        if not isinstance(windows, int) or not 0 <= windows <= _MOST_WINDOWS:
            raise ValueError(f"it has {windows!r} windows")
        proof = _certificate(kind, _part(tensors, "bound.")) if kind else None
        return proof, tuple(_window(_part(tensors, f"{index}.")) for index in range(windows))
    except (ProblemError, KeyError, TypeError, ValueError) as error:
        raise JournalError(f"{path} is not a certificate: {error}") from error


def _tensors(certificate: Any, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a certificate, and of its root if it is a tree, by their names."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(certificate):
        value = getattr(certificate, field.name)
        if isinstance(value, Tensor):
            found[prefix + field.name] = value
        elif value is not None:
            found |= _tensors(value, f"{prefix}{field.name}.")
    return found


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _certificate(kind: object, tensors: dict[str, Tensor]) -> Certificate:
    if kind == _KINDS[MultiplierCertificate]:
        return MultiplierCertificate(**tensors)
    if kind == _KINDS[EnumerationCertificate]:
        return EnumerationCertificate()
    if kind == _KINDS[TreeCertificate]:
        return _tree(tensors)
    raise ValueError(f"it is of the kind {kind!r}")


def _window(tensors: dict[str, Tensor]) -> WindowCertificate:
    own = {name: value for name, value in tensors.items() if name != _UNITS}
    return WindowCertificate(tensors[_UNITS], _tree(own))


def _tree(tensors: dict[str, Tensor]) -> TreeCertificate:
    root = _part(tensors, f"{_ROOT}.")
    own = {name: value for name, value in tensors.items() if not name.startswith(f"{_ROOT}.")}
    if own["sides"].ndim != 2 or not own["sides"].numel():
        raise ValueError("it has no nodes")
    return TreeCertificate(root=MultiplierCertificate(**root) if root else None, **own)
