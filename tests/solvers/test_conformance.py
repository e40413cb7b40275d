"""What every backend promises, own or a user's: one suite over all that are registered."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from solvers import (
    BackendError,
    BackendKind,
    Consumer,
    Status,
    SubsetProblem,
    backend_class,
    backend_names,
    make_backend,
    solve,
)
from solvers.closed_forms.pivot import PivotState
from solvers.closed_forms.swaps import best_swap, candidates, swap_gains
from solvers.heuristics import local_search
from solvers.linalg import symmetric
from tests.solvers.instances import INSTANCES, exact_optimum

TOLERANCE = 1e-8
BOUND_TOLERANCE = 1e-11
"""Relative to the scale: as far as the reference, which is a least-squares fit, can be believed."""

CERTIFIED = ("branch_and_bound", "enumerate", "perspective")
"""Backends of this package that account for rounding: their bounds are compared exactly."""

DETERMINISTIC = ("scalar", "ties", "ragged", "ragged_consumers")
"""Instances that are solved a second time."""

instances = pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES.keys())


@cache
def solution_of(name, instance_name):
    """Solve each pair once for all tests."""
    return solve(INSTANCES[instance_name].problem, name)


@cache
def _exact_optimum(name):
    return exact_optimum(INSTANCES[name].problem)


LONG = ("cvxpy", "group_lasso", "gurobi", "highs", "window_search")
SOME = ("scalar", "correlated", "ties", "dead", "keep_all", "blocks", "ragged_consumers", "sparse")
"""Instances on which backends that take long always run, and on the others with the slow tests."""


def _case(backend, name):
    marks = [pytest.mark.slow] if backend in LONG and name not in SOME else []
    return pytest.param(backend, INSTANCES[name], id=f"{name}-{backend}", marks=marks)


@pytest.mark.parametrize(
    ("backend", "instance"), [_case(b, name) for name in INSTANCES for b in backend_names()]
)
def test_keeps_its_promises(backend, instance):
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
    assert solution.loss >= instance.optimum() - certain
    assert solution.lower_bound <= instance.optimum() + certain
    if math.isfinite(solution.lower_bound):
        assert solution.bound_from
        assert 0 <= solution.gap <= 1
    if cls.kind is BackendKind.EXACT:
        assert solution.status is Status.OPTIMAL
        assert solution.loss == pytest.approx(instance.optimum(), abs=slack)
    if cls.kind is BackendKind.BOUND:
        assert math.isfinite(solution.lower_bound)
    if backend in CERTIFIED:
        assert Fraction(solution.lower_bound) <= _exact_optimum(instance.name)
    # It verifies itself.
    report = solution.verify()
    assert report.loss == pytest.approx(solution.loss, abs=slack)
    assert solution.seconds > 0
    if instance.name in DETERMINISTIC:
        assert_solved_alike(solution, backend)


def assert_solved_alike(solution, backend):
    """Solve again: the answer is the same, and problem and threads are left alone."""
    problem = solution.problem
    tensors = [
        tensor for c in problem.consumers for tensor in (*c.hessian.panels, c.G, c.W0, c.rows)
    ]
    before = [tensor.clone() for tensor in tensors]
    threads = torch.get_num_threads()
    again = solve(problem, make_backend(backend))
    assert torch.equal(solution.support, again.support)
    assert solution.loss == again.loss
    assert solution.status is again.status
    assert solution.lower_bound == pytest.approx(again.lower_bound, rel=1e-9)
    assert all(map(torch.equal, tensors, before))
    assert torch.get_num_threads() == threads


@instances
def test_exchanges_of_many_units_end_where_none_helps(instance, monkeypatch):
    """Also where units of several rows do not fit into panels of a power of two."""
    monkeypatch.setattr(symmetric, "PANEL_ROWS", 4)
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    monkeypatch.setattr(local_search, "_AT_ONCE", 5)
    start = tuple(range(instance.problem.keep))  # far from the best
    for options in ({}, {"start": start}, {"start": start, "max_swaps": 2}):
        found = solve(instance.problem, "local_search", options=options)
        found.verify()
        assert found.loss == pytest.approx(
            instance.loss(found.support), abs=1e-8 * instance.problem.scale
        )
        assert found.iterations <= options.get("max_swaps", 10_000)
        if found.status is Status.SWAP_OPTIMAL:
            state = PivotState.on_support(instance.problem, found.support)
            assert best_swap(state).gain <= 1e-6 * found.loss + 1e-12 * instance.problem.scale


@pytest.mark.parametrize("few", [0, 1 << 18])
def test_exchanges_end_where_nothing_is_left_to_lose(few, monkeypatch):
    """Gains are then rounding, by which the same units would come and go."""
    monkeypatch.setattr(local_search, "_FEW_PAIRS", few)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 8, generator=generator).double()
    W0 = torch.randn(8, 5, generator=generator).double()
    W0[3:] = 0
    problem = SubsetProblem.from_gram(X.T @ X / 64, W0, keep=4)
    found = solve(problem, "local_search", start=(4, 5, 6, 7))
    assert found.loss <= 1e-15 * problem.scale
    assert found.iterations < 20
    assert found.status is Status.SWAP_OPTIMAL
    found.verify()


@pytest.mark.parametrize("backend", ["local_search", "greedy", "enumerate", "branch_and_bound"])
def test_a_consumer_may_read_none_of_what_is_kept(backend):
    H, W0 = 2 * torch.eye(4).double(), torch.ones(4, 3).double()
    W0[3] = 9
    other = Consumer.from_gram(H[:3, :3], W0[:3] / 100, units=[[0], [1], [2], []])
    found = solve(SubsetProblem((Consumer.from_gram(H, W0), other), 1), backend)
    assert found.support.tolist() == [3]
    found.verify()


def pairs_of_inputs(pairs):
    """Return a problem of which the second half of inputs are to take the places of the first.

    Each has its own partner, with all of which as much is gained, and with any other much is lost.
    """
    partners = pairs + torch.randperm(pairs, generator=torch.Generator().manual_seed(1))
    one = torch.arange(pairs)
    H, W0 = torch.eye(2 * pairs).double(), torch.zeros(2 * pairs, pairs).double()
    H[one, partners] = H[partners, one] = 0.95
    W0[one, one], W0[partners, one] = 1.0, 1.3
    return SubsetProblem.from_gram(H, W0, keep=pairs, damp=0.0)


def test_many_exchanges_that_gain_the_same_find_their_partners(monkeypatch):
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    monkeypatch.setattr(local_search, "_AT_ONCE", 4)
    problem = pairs_of_inputs(40)
    state = PivotState.on_support(problem, torch.arange(40))
    best = candidates(state, 4)
    pair = best.units[[0]], best.units[[4]]
    assert float(swap_gains(state, *pair)) == best.gain == best_swap(state).gain
    found = solve(problem, "local_search", start=tuple(range(40)), max_swaps=40)
    assert found.support.tolist() == list(range(40, 80))
    assert found.status is Status.SWAP_OPTIMAL


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_exchanges_do_not_depend_on_the_scale_of_the_inputs(scale):
    for seed in (10, 17):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(80, 27, generator=generator).double()
        X = X[:, torch.randint(0, 13, (27,), generator=generator)]  # many of them twice
        H, W0 = X.T @ X / 80, torch.randn(27, 4, generator=generator).double()
        expected, found = (
            solve(
                SubsetProblem.from_gram(given, W0, keep=4, units=9),
                "local_search",
                start=(0, 1, 2, 3),
            )
            for given in (H, H * scale)
        )
        assert torch.equal(found.support, expected.support)
        assert found.status is expected.status is Status.SWAP_OPTIMAL


@instances
def test_local_search_is_no_worse_than_its_start(instance):
    greedy, local = (solution_of(name, instance.name) for name in ("greedy", "local_search"))
    assert local.loss <= greedy.loss + TOLERANCE * instance.problem.scale
    assert local.status is Status.SWAP_OPTIMAL
    assert all(np.diff(local.history) < 0)


@pytest.mark.parametrize("name", ["scalar", "correlated", "blocks", "ragged_consumers"])
def test_searches_beat_a_random_support(name):
    instance = INSTANCES[name]
    random = np.mean([solve(instance.problem, "random", seed=seed).loss for seed in range(8)])
    for backend in ("greedy", "local_search", "multistage"):
        assert solution_of(backend, name).loss < random
