"""What every backend promises, own or a user's: one suite over all that are registered."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
import torch

from solvers import (
    BackendError,
    BackendKind,
    Status,
    backend_class,
    backend_names,
    make_backend,
    solve,
)
from solvers.linalg import symmetric
from tests.solvers.instances import INSTANCES

TOLERANCE = 1e-8
BOUND_TOLERANCE = 1e-11
"""Relative to the scale: as far as the reference, which is a least-squares fit, can be believed."""

CERTIFIED = ("branch_and_bound", "enumerate", "perspective")
"""Backends of this package that account for rounding: their bounds are compared exactly."""

AGAIN = ("ties", "shuffled_consumers")
"""Instances that are solved a second time."""

LONG = ("cvxpy", "group_lasso", "gurobi", "highs")
SOME = ("correlated", "dead", "shuffled_consumers")
"""Instances on which backends that take long always run, and on the others with the slow tests."""


@cache
def solution_of(backend, name):
    """Solve each pair once for all tests."""
    return solve(INSTANCES[name].problem, backend)


def _case(backend, name):
    marks = [pytest.mark.slow] if backend in LONG and name not in SOME else []
    return pytest.param(backend, INSTANCES[name], id=f"{name}-{backend}", marks=marks)


@pytest.mark.parametrize(
    ("backend", "instance"), [_case(b, name) for name in INSTANCES for b in backend_names()]
)
def test_keeps_its_promises(backend, instance, monkeypatch):
    """It refuses what it cannot take; else support, loss, bound and status are what they say."""
    cls, problem = backend_class(backend), instance.problem
    if cls.available() is not None:
        pytest.skip(f"{backend}: {cls.available()}")
    refusal = cls.capabilities.refusal(problem)
    if refusal is not None:
        with pytest.raises(BackendError, match="choose another") as error:
            solve(problem, backend)
        assert refusal in str(error.value)
        return
    solution = solution_of(backend, instance.name)
    slack, certain = TOLERANCE * problem.scale, BOUND_TOLERANCE * problem.scale
    support, removed = solution.support.tolist(), solution.removed.tolist()
    # The support is feasible, and the loss that of a refit.
    assert solution.backend == backend
    assert support == sorted(set(support))
    assert len(support) == problem.keep
    assert sorted(support + removed) == list(range(problem.units))
    assert solution.loss == pytest.approx(instance.loss(support), abs=slack)
    assert 0 <= solution.relative_loss <= 1 + TOLERANCE
    # No loss lies below the optimum, and no bound above it.
    assert solution.loss >= instance.optimum - certain
    assert solution.lower_bound <= instance.optimum + certain
    if math.isfinite(solution.lower_bound):
        assert solution.bound_from
        assert 0 <= solution.gap <= 1
    if cls.kind is BackendKind.EXACT:
        assert solution.status is Status.OPTIMAL
        assert solution.loss == pytest.approx(instance.optimum, abs=slack)
    if cls.kind is BackendKind.BOUND:
        assert math.isfinite(solution.lower_bound)
    if backend in CERTIFIED:
        assert Fraction(solution.lower_bound) <= instance.exact_optimum
    if backend == "local_search":
        assert solution.status is Status.SWAP_OPTIMAL
        assert solution.loss <= solution_of("greedy", instance.name).loss + slack
        assert list(solution.history) == sorted(set(solution.history), reverse=True)
    # It verifies itself.
    report = solution.verify()
    assert report.loss == pytest.approx(solution.loss, abs=slack)
    assert solution.seconds > 0
    if instance.name in AGAIN:
        assert_solved_alike(solution, backend, monkeypatch)


def assert_solved_alike(solution, backend, monkeypatch):
    """Solve again: the answer is the same, and problem and threads are left alone.

    And so it is whatever panels H is held in, but where all hangs on ties.
    """
    problem, threads = solution.problem, torch.get_num_threads()
    tensors = [t for c in problem.consumers for t in (*c.hessian.panels, c.G, c.W0, c.rows)]
    before = [tensor.clone() for tensor in tensors]
    again = solve(problem, make_backend(backend))
    assert torch.equal(solution.support, again.support)
    assert (solution.loss, solution.status) == (again.loss, again.status)
    assert all(map(torch.equal, tensors, before))
    assert torch.get_num_threads() == threads
    if problem.name == "ties":
        return
    monkeypatch.setattr(symmetric, "PANEL_ROWS", 4)
    held = tuple(replace(consumer, H=consumer.H) for consumer in problem.consumers)
    found = solve(replace(problem, consumers=held), backend)
    assert torch.equal(found.support, solution.support)
    assert found.loss == pytest.approx(solution.loss, rel=1e-9)
    found.verify()
