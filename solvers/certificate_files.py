"""Certificates as files of tensors, which anyone can load and check against the problem."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from solvers import storage
from solvers.certificates.certificate import EnumerationCertificate, MultiplierCertificate
from solvers.certificates.tree_certificate import Certificate, TreeCertificate
from solvers.errors import ProblemError
from solvers.protocol import WindowCertificate
from solvers.solution import Solution

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


def save_certificate(path: str | os.PathLike[str], solution: Solution) -> bool:
    """Write what proves a solution to a ``.safetensors`` file; return whether anything does.

    Raises ProblemError if the file has another suffix, or cannot be written.
    """
    kind = _KINDS.get(type(solution.certificate), "")
    if not kind and not solution.windows:
        return False
    tensors = {_MARK: torch.zeros(1, dtype=torch.int8)}
    if kind:
        tensors |= _tensors(solution.certificate, "bound.")
    for index, window in enumerate(solution.windows):
        tensors[f"{index}.{_UNITS}"] = window.units
        tensors |= _tensors(window.certificate, f"{index}.")
    storage.write(path, {_KIND: kind, _WINDOWS: len(solution.windows)}, tensors)
    return True


def load_certificate(
    path: str | os.PathLike[str],
) -> tuple[Certificate | None, tuple[WindowCertificate, ...]]:
    """Read what `save_certificate` wrote: the certificate of the bound, and those of windows.

    ``certificate.bound(problem)`` is what the certificate of the bound proves.

    Raises ProblemError if the file is missing, or holds no certificate.
    """
    header, tensors = storage.read(path)
    try:
        kind = header[_KIND]
        proof = _certificate(kind, _part(tensors, "bound.")) if kind else None
        windows = (_part(tensors, f"{index}.") for index in range(header[_WINDOWS]))
        return proof, tuple(map(_window, windows))
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise ProblemError(f"{path} is not a certificate: {error}") from error


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


def _certificate(kind: str, tensors: dict[str, Tensor]) -> Any:
    """Return a certificate of a kind, of which a tree may have a root."""
    made = next(of for of, name in _KINDS.items() if name == kind)
    root = _part(tensors, f"{_ROOT}.")
    own = {name: value for name, value in tensors.items() if not name.startswith(f"{_ROOT}.")}
    more = (
        {_ROOT: MultiplierCertificate(**root) if root else None} if made is TreeCertificate else {}
    )
    return made(**own, **more)


def _window(tensors: dict[str, Tensor]) -> WindowCertificate:
    units = tensors.pop(_UNITS)
    return WindowCertificate(units, _certificate(_KINDS[TreeCertificate], tensors))
