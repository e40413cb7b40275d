"""What can go wrong, as exceptions that say what was wrong and what to do."""

from __future__ import annotations


class SolverError(Exception):
    """Base of every error that `solvers` raises on purpose."""


class ProblemError(SolverError, ValueError):
    """A subset problem is not well posed: a field has a wrong shape, value or size."""


class BackendError(SolverError):
    """A backend is unknown, not installed, or cannot take the problem."""


class VerificationError(SolverError):
    """A solution claims something that recomputation from its problem contradicts."""
