"""What proves an answer, as a file beside its record, so that nobody need believe the record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osscar.base.errors import StudyError
from osscar.base.files import file_digest, fsynced
from solvers import ProblemError, Solution
from solvers.certificates.certificate import (
    EnumerationCertificate,
    MultiplierCertificate,
)
from solvers.certificates.tree_certificate import Certificate, TreeCertificate
from solvers.protocol import WindowCertificate
from solvers.storage import read, write

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


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an answer's claims are recomputed from.

    Parameters
    ----------
    certificate
        Of its lower bound.
    windows
        Of its being optimal within each of them.
    """

    certificate: Certificate | None = None
    windows: tuple[WindowCertificate, ...] = ()


def save_evidence(path: Path, solution: Solution) -> str:
    """Write what proves a solution, and return the digest of the file; "" if nothing does.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    kind = _KINDS.get(type(solution.certificate), "")
    if not kind and not solution.windows:
        return ""
    tensors = {_MARK: torch.zeros(1, dtype=torch.int8)}
    if kind:
        tensors |= _tensors(solution.certificate, "bound.")
    for index, window in enumerate(solution.windows):
        tensors[f"{index}.{_UNITS}"] = window.units
        tensors |= _tensors(window.certificate, f"{index}.")
    with fsynced(path):
        write(path, {_KIND: kind, _WINDOWS: len(solution.windows)}, tensors)
    return file_digest(path)


def load_evidence(path: Path, sha256: str) -> Evidence:
    """Read what `save_evidence` wrote.

    Raises
    ------
    StudyError
        If the file is another than the one with this digest, or holds no certificate.
    FileError
        If it cannot be read.
    """
    if file_digest(path) != sha256:
        raise StudyError(f"{path} is not the certificate that its record names")
    try:
        header, tensors = read(path)
        return _evidence(header, tensors)
    except (ProblemError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is not a certificate: {error}") from error


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


def _evidence(header: dict[str, Any], tensors: dict[str, Tensor]) -> Evidence:
    for name, value in tensors.items():
        expected = _WHOLE.get(name.rpartition(".")[2])
        if value.dtype != expected if expected else value.dtype not in _REAL:
            raise ValueError(f"{name} is of {value.dtype}")
    kind, windows = header.get(_KIND), header.get(_WINDOWS)
    if not isinstance(windows, int) or not 0 <= windows <= _MOST_WINDOWS:
        raise ValueError(f"it has {windows!r} windows")
    return Evidence(
        _certificate(kind, _part(tensors, "bound.")) if kind else None,
        tuple(_window(_part(tensors, f"{index}.")) for index in range(windows)),
    )


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
