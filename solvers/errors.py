"""What can go wrong, as exceptions that say what was wrong and what to do."""

from __future__ import annotations

import sys
import warnings

import torch

_PACKAGES = ("osscar", "solvers", "graph")
"""What a warning does not point at: `solvers`, and who calls it in this distribution."""


class SolverError(Exception):
    """Base of every error that `solvers` raises on purpose."""


class ProblemError(SolverError, ValueError):
    """A subset problem is not well posed: a field has a wrong shape, value or size."""


class BackendError(SolverError):
    """A backend is unknown, not installed, or cannot take the problem."""


class VerificationError(SolverError):
    """A solution claims something that recomputation from its problem contradicts."""


def require(condition: bool, otherwise: str) -> None:
    """Refuse a claim (VerificationError) unless a condition holds; with NaN none does."""
    if not condition:
        raise VerificationError(otherwise)


def warn(message: str) -> None:
    """Warn at the line outside of these packages that led to it, however deep they are nested.

    The line is part of the file's name, as what stands in it says nothing of what is warned of.
    """
    frame = caller = sys._getframe(1)
    inside = True
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        own = module.partition(".")[0] in _PACKAGES or module == "contextlib"
        if inside and not own:
            caller = frame
        inside, frame = own, frame.f_back  # type: ignore[assignment]
    warnings.warn_explicit(
        message,
        UserWarning,
        f"{caller.f_code.co_filename}:{caller.f_lineno}",
        0,
        module=caller.f_globals.get("__name__"),
        registry=caller.f_globals.setdefault("__warningregistry__", {}),
    )


_SHORTAGES = ("can't allocate memory", "_STATUS_ALLOC_FAILED", "CUDA out of memory")
"""In errors of torch on a CPU, of cuBLAS, cuDNN and the like, and of the CUDA runtime."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    said = isinstance(error, RuntimeError) and any(one in str(error) for one in _SHORTAGES)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)
