"""The certificate of a bound as a file beside its record, so that nobody need believe the bound."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osscar.core.errors import StudyError
from osscar.core.files import file_digest
from solvers import ProblemError
from solvers.certificate import Certificate, MultiplierCertificate
from solvers.storage import read, write
from solvers.tree_certificate import TreeCertificate

_KIND = "certificate"
_MULTIPLIERS, _TREE = "multipliers", "tree"
_ROOT = "root."
"""In front of the names of the tensors that are the root's of a tree."""

_WHOLE = {"parent": torch.int64, "sides": torch.int8}
"""What the formats of tensors are that do not hold real numbers."""

_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save_certificate(path: Path, certificate: Certificate | None) -> str:
    """Write a certificate, and return the digest of the file; "" if it is of no kind known here.

    Raises
    ------
    ProblemError
        If the file cannot be written.
    """
    if isinstance(certificate, MultiplierCertificate):
        write(path, {_KIND: _MULTIPLIERS}, _tensors(certificate))
    elif isinstance(certificate, TreeCertificate):
        tensors = _tensors(certificate)
        if certificate.root is not None:
            tensors |= {_ROOT + name: value for name, value in _tensors(certificate.root).items()}
        write(path, {_KIND: _TREE}, tensors)
    else:
        return ""
    return file_digest(path)


def load_certificate(path: Path, sha256: str) -> Certificate:
    """Read what `save_certificate` wrote.

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
        return _certificate(header, tensors)
    except (ProblemError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is not a certificate: {error}") from error


def _tensors(certificate: MultiplierCertificate | TreeCertificate) -> dict[str, Tensor]:
    fields = {f.name: getattr(certificate, f.name) for f in dataclasses.fields(certificate)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def _certificate(header: dict[str, Any], tensors: dict[str, Tensor]) -> Certificate:
    for name, value in tensors.items():
        expected = _WHOLE.get(name.removeprefix(_ROOT))
        if value.dtype != expected if expected else value.dtype not in _REAL:
            raise ValueError(f"{name} is of {value.dtype}")
    if header.get(_KIND) == _MULTIPLIERS:
        return _multipliers(tensors)
    if header.get(_KIND) != _TREE:
        raise ValueError(f"it is of the kind {header.get(_KIND)!r}")
    root = {n.removeprefix(_ROOT): t for n, t in tensors.items() if n.startswith(_ROOT)}
    own = {name: value for name, value in tensors.items() if not name.startswith(_ROOT)}
    if own["sides"].ndim != 2 or not own["sides"].numel():
        raise ValueError("it has no nodes")
    return TreeCertificate(root=_multipliers(root) if root else None, **own)


def _multipliers(tensors: dict[str, Tensor]) -> MultiplierCertificate:
    return MultiplierCertificate(**tensors)
