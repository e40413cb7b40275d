"""Solve a problem: dispatch to a backend, and refit on what it chose."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from solvers.bounds.root import Perspective
from solvers.closed_forms.refit import refit
from solvers.errors import BackendError, SolverError, VerificationError, is_shortage
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, Selection
from solvers.registry import BACKENDS, make_backend
from solvers.solution import Solution
from solvers.verification import check_claim, check_support


def solve(
    problem: SubsetProblem,
    backend: str | Backend = "local_search",
    *,
    device: str | torch.device | None = None,
    bound: bool = False,
    bound_rounds: int = Perspective.rounds,
    options: Mapping[str, Any] | None = None,
    **more_options: Any,
) -> Solution:
    """Solve a subset problem with the named backend, and refit on what it chose.

    Parameters
    ----------
    problem
        What to solve.
    backend
        A registered name, ``file.py:Class`` or ``module:Class`` of your own, whose code is run, or
        a backend object with its options set.
    device
        Where to compute; by default where the problem is.
    bound
        Whether to add the `perspective` lower bound where the backend gives none, so that
        `Solution.gap` is a number.
    bound_rounds
        How long that bound is searched for, the `rounds` of the backend: each takes about a third
        of the time that none takes.
    options, **more_options
        Options of the named backend, as a mapping of their names or by name.

    Returns
    -------
    Solution
        Support, refitted weights, loss and certificate.

    Raises
    ------
    BackendError
        If the backend is unknown, unavailable, cannot take this problem, fails, or answers with
        what is no answer.
    ProblemError
        If `problem` turns out to be ill posed (`Consumer.violation`), before the backend starts.

    Examples
    --------
    >>> import torch
    >>> X, W0 = torch.randn(64, 6).double(), torch.randn(6, 3).double()
    >>> problem = SubsetProblem.from_gram(X.T @ X / 64, W0, keep=4)
    >>> solve(problem, "enumerate").loss <= solve(problem, "magnitude").loss
    True
    """
    name, chosen = chosen_backend(backend, options, more_options)
    bounding = make_backend("perspective", rounds=bound_rounds)
    assert isinstance(bounding, Perspective)
    if device is not None:
        problem = problem.to(device)
    refusal = chosen.capabilities.refusal(problem)
    if refusal is not None:
        raise BackendError(f"backend {name!r} {refusal}; choose another (`osscar backends`)")
    problem.check_definite()
    start = time.perf_counter()
    try:
        selection = checked_selection(name, answer_of(name, chosen, problem), problem)
        weights, loss = refit(problem, selection.support)
        if bound and math.isinf(selection.lower_bound):
            claims, _ = bounding.bound(problem)
            selection = dataclasses.replace(selection, **claims)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise BackendError(
            f"backend {name!r}: H is too close to singular; build the problem with a larger damp "
            f"({error})"
        ) from error
    return Solution(
        problem=problem,
        backend=name,
        weights=weights,
        loss=loss,
        seconds=time.perf_counter() - start,
        **vars(selection),
    )


def answer_of(name: str, chosen: Any, problem: Any) -> Any:
    """Return what a backend answers with; an error that it raises by accident is named as such."""
    try:
        return chosen.select(problem)
    except (SolverError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        raise
    except Exception as error:
        if is_shortage(error):
            raise  # which is not the backend's fault
        raise BackendError(
            f"backend {name!r} failed with {type(error).__name__}: {error}"
        ) from error


def chosen_backend(
    backend: Any, options: Any, more_options: Mapping[str, Any], group: str = BACKENDS
) -> tuple[str, Any]:
    """Return the name of a backend and the backend, its options set."""
    given = dict(**(options or {}), **more_options)  # the same name twice is a TypeError
    if isinstance(backend, str):
        return backend, make_backend(backend, group, **given)
    if given:
        raise BackendError("options go with a backend's name; this backend object has its own")
    return type(backend).__name__, backend


def checked_selection(name: str, selection: Any, problem: Any) -> Selection:
    """Return what a backend answered with, in plain types (BackendError); `verify` checks it."""
    try:
        checked: Selection = dataclasses.replace(
            selection,
            support=torch.as_tensor(selection.support).sort().values,
            lower_bound=float(selection.lower_bound),
            gap_tolerance=float(selection.gap_tolerance),
            iterations=int(selection.iterations),
            history=tuple(map(float, selection.history)),
            bound_from=str(selection.bound_from),
        )
        check_claim(checked)
        check_support(problem, checked.support)
    except (AttributeError, ValueError, VerificationError, TypeError) as error:
        raise BackendError(f"backend {name!r} did not return a valid selection: {error}") from error
    return checked
