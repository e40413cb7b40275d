"""The exact search: equal to enumeration, valid when it is stopped, never wrong about a fixing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Status, solve
from tests.solvers.test_perspective import random_problem


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 12),
    width=st.integers(1, 2),
    responses=st.sampled_from([1, 4, 30]),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    consumers=st.integers(1, 2),
)
@settings(max_examples=10, deadline=None)
def test_equals_enumeration(seed, n, width, responses, share, spread, consumers):
    keep = 1 + round(share * (n - 1))
    problem = random_problem(
        seed, n, width, responses, keep, spread=spread, consumers=consumers, damp=1e-4
    )
    optimum = solve(problem, "enumerate").loss
    solution = solve(problem, "branch_and_bound", gap_tolerance=1e-7)
    assert solution.status is Status.OPTIMAL
    assert solution.loss == pytest.approx(optimum, rel=2e-7, abs=1e-10 * problem.scale)
    assert solution.lower_bound <= optimum + 1e-12 * problem.scale
    solution.verify()


@pytest.fixture(scope="module")
def hard():
    return random_problem(5, 18, 1, 10, 9, spread=0.5)


@pytest.fixture(scope="module")
def optimum(hard):
    return solve(hard, "branch_and_bound", time_limit=float("inf")).loss


@pytest.mark.parametrize("limit", [0, 1, 7, 20])
def test_node_limit_returns_a_valid_bound(hard, optimum, limit):
    solution = solve(hard, "branch_and_bound", node_limit=limit)
    assert solution.status is Status.NODE_LIMIT
    assert solution.iterations == limit
    assert solution.lower_bound <= optimum * (1 + 1e-12)
    assert solution.loss >= optimum * (1 - 1e-3)
    solution.verify()


def test_gap_tolerance_is_what_optimal_means(hard):
    loose = solve(hard, "branch_and_bound", gap_tolerance=0.1)
    assert loose.status is Status.OPTIMAL
    assert loose.gap <= 0.1 + 1e-12
    assert loose.gap_tolerance == 0.1
    loose.verify()


def test_bad_start_is_improved_upon():
    problem = random_problem(6, 12, 1, 5, 6, spread=0.3)
    best = solve(problem, "enumerate")
    worst = tuple(best.removed.tolist())
    solution = solve(problem, "branch_and_bound", start=worst)
    assert solution.support.tolist() == best.support.tolist()
