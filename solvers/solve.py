"""Solve a problem: dispatch to a backend, and refit on what it chose."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import time
from collections.abc import Mapping
from typing import Any

import torch

from solvers.bounds.perspective import BOUND_FROM, Perspective
from solvers.errors import BackendError
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, Selection
from solvers.refit import refit
from solvers.registry import backends, configured
from solvers.solution import Solution


def solve(
    problem: SubsetProblem,
    backend: str | Backend = "local_search",
    *,
    device: str | torch.device | None = None,
    bound: bool = False,
    options: Mapping[str, Any] | None = None,
    **more_options: Any,
) -> Solution:
    """Solve a subset problem with the named backend, and refit on what it chose.

    Parameters
    ----------
    problem
        What to solve.
    backend
        A registered name, or a backend object with its options set.
    device
        Where to compute; by default where the problem is.
    bound
        Whether to add the `perspective` lower bound where the backend gives none, so that
        `Solution.gap` is a number.
    options, **more_options
        Options of the named backend, as a mapping of their names or by name.

    Returns
    -------
    Solution
        Support, refitted weights, loss and certificate.

    Raises
    ------
    BackendError
        If the backend is unknown, unavailable, or cannot take this problem.
    ProblemError
        If the problem turns out to be ill posed (`Consumer.flaw`), before the backend starts.

    Examples
    --------
    >>> import torch
    >>> X, W0 = torch.randn(64, 6).double(), torch.randn(6, 3).double()
    >>> problem = SubsetProblem.from_gram(X.T @ X / 64, W0, keep=4)
    >>> solve(problem, "enumerate").loss <= solve(problem, "magnitude").loss
    True
    """
    if not isinstance(options, Mapping | None):
        raise BackendError(f"options is {reprlib.repr(options)}; it must map names to values")
    twice = sorted(set(options or {}) & set(more_options))
    if twice:
        raise BackendError(f"options {', '.join(twice)} are given twice, by name and in a mapping")
    given = {**(options or {}), **more_options}
    if isinstance(backend, str):
        name, chosen = backend, configured(backend, given)
    elif given:
        raise BackendError("options go with a backend's name; this backend object has its own")
    else:
        name, chosen = type(backend).__name__, backend
    if device is not None:
        problem = problem.to(device)
    refusal = chosen.capabilities.refusal(problem)
    if refusal is not None:
        raise BackendError(f"backend {name!r} {refusal}; choose another: {_takers(problem, name)}")
    problem.check_definite()
    start = time.perf_counter()
    try:
        selection = chosen.select(problem)
        support = selection.support.sort().values
        weights, loss = refit(problem, support)
        if bound and math.isinf(selection.lower_bound):
            selection = _with_bound(problem, selection)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise BackendError(
            f"backend {name!r}: H is too close to singular with {_damping(problem)}; build the "
            f"problem with a larger damp ({error})"
        ) from error
    return Solution(
        problem=problem,
        backend=name,
        support=support,
        weights=weights,
        loss=loss,
        status=selection.status,
        lower_bound=selection.lower_bound,
        bound_from=selection.bound_from,
        iterations=selection.iterations,
        history=selection.history,
        path=selection.path,
        gap_tolerance=selection.gap_tolerance,
        certificate=selection.certificate,
        seconds=time.perf_counter() - start,
    )


def _damping(problem: SubsetProblem) -> str:
    """Name the damping of each consumer, for an error message."""
    shares = [
        c.damping / max(float(c.H.diagonal().mean()) - c.damping, c.damping, 1e-300)
        for c in problem.consumers
    ]
    return f"damp={', '.join(f'{share:.2g}' for share in shares)}"


def _with_bound(problem: SubsetProblem, selection: Selection) -> Selection:
    value, certificate, _ = Perspective().bound(problem)
    return dataclasses.replace(
        selection, lower_bound=value, bound_from=BOUND_FROM, certificate=certificate
    )


def _takers(problem: SubsetProblem, refused: str) -> str:
    """Name the backends that take `problem`, for an error message."""
    takers = [
        info.name
        for info in backends()
        if info.name != refused
        and info.unavailable is None
        and info.capabilities.refusal(problem) is None
    ]
    return ", ".join(takers) or "none does"
