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
from solvers.closed_forms.swaps import Swap, best_swap, promising, swap_gains
from solvers.heuristics import local_search
from solvers.linalg import symmetric
from tests.solvers.instances import INSTANCES, exact_optimum

TOLERANCE = 1e-8
BOUND_TOLERANCE = 1e-11
"""Relative to the scale: as far as the reference, which is a least-squares fit, can be believed."""

CERTIFIED = ("branch_and_bound", "enumerate", "perspective")
"""Backends of this package that account for rounding: their bounds are compared exactly."""

backend = pytest.mark.parametrize("backend", backend_names())
instance = pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES.keys())


def runnable(name, instance):
    """Skip, with its reason, a backend that is missing or that declares it cannot take this."""
    cls = backend_class(name)
    reason = cls.available()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    refusal = cls.capabilities.refusal(instance.problem)
    if refusal is not None:
        pytest.skip(f"{name} {refusal}")
    return cls


@cache
def solution_of(name, instance_name):
    """Solve each pair once for all tests."""
    return solve(INSTANCES[instance_name].problem, name)


@backend
@instance
def test_refuses_what_it_cannot_take(backend, instance):
    cls = backend_class(backend)
    refusal = cls.capabilities.refusal(instance.problem)
    if cls.available() is not None:
        pytest.skip(f"{backend}: {cls.available()}")
    if refusal is None:
        assert solution_of(backend, instance.name).backend == backend
    else:
        with pytest.raises(BackendError) as error:
            solve(instance.problem, backend)
        assert refusal in str(error.value)
        assert "choose another" in str(error.value)


@backend
@instance
def test_support_is_feasible_and_the_loss_is_that_of_a_refit(backend, instance):
    runnable(backend, instance)
    solution = solution_of(backend, instance.name)
    problem = instance.problem
    support = solution.support.tolist()
    assert support == sorted(set(support))
    assert len(support) == problem.keep
    assert set(support) <= set(range(problem.units))
    assert set(support) | set(solution.removed.tolist()) == set(range(problem.units))
    assert solution.loss == pytest.approx(instance.loss(support), abs=TOLERANCE * problem.scale)
    assert 0 <= solution.relative_loss <= 1 + TOLERANCE


@backend
@instance
def test_never_beats_the_optimum_and_the_bound_never_lies_above_it(backend, instance):
    cls = runnable(backend, instance)
    solution = solution_of(backend, instance.name)
    slack = TOLERANCE * instance.problem.scale
    certain = BOUND_TOLERANCE * instance.problem.scale
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


@pytest.mark.parametrize("backend", CERTIFIED)
@instance
def test_certified_bounds_hold_in_exact_arithmetic(backend, instance):
    bound = Fraction(solution_of(backend, instance.name).lower_bound)
    assert bound <= _exact_optimum(instance.name)


@cache
def _exact_optimum(name):
    return exact_optimum(INSTANCES[name].problem)


@backend
@instance
def test_verifies_itself(backend, instance):
    runnable(backend, instance)
    solution = solution_of(backend, instance.name)
    report = solution.verify()
    assert report.loss == pytest.approx(solution.loss, abs=TOLERANCE * instance.problem.scale)
    assert solution.seconds > 0


@backend
@pytest.mark.parametrize("name", ["scalar", "ties", "ragged", "ragged_consumers"])
def test_is_deterministic_and_leaves_the_problem_alone(backend, name):
    instance = INSTANCES[name]
    runnable(backend, instance)
    tensors = [(c.H, c.G, c.W0, c.rows) for c in instance.problem.consumers]
    before = [[tensor.clone() for tensor in group] for group in tensors]
    threads = torch.get_num_threads()
    first = solution_of(backend, name)
    again = solve(instance.problem, make_backend(backend))
    assert torch.equal(first.support, again.support)
    assert first.loss == again.loss
    assert first.status is again.status
    assert first.lower_bound == pytest.approx(again.lower_bound, rel=1e-9)
    for group, copies in zip(tensors, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, copies, strict=True))
    assert torch.get_num_threads() == threads


@instance
@pytest.mark.parametrize(("count", "panel"), [(2, 256), (5, 4), (64, 256)])
def test_exchanges_of_many_units_end_where_none_helps(instance, count, panel, monkeypatch):
    """Also where units of several rows do not fit into panels of a power of two."""
    monkeypatch.setattr(symmetric, "PANEL_ROWS", panel)
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    monkeypatch.setattr(local_search, "_AT_ONCE", count)
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


def test_units_of_any_width_are_exchanged_at_once(monkeypatch):
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    monkeypatch.setattr(symmetric, "PANEL_ROWS", 4)  # no whole number of units
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(90, 30, generator=generator).double()
    W0 = torch.randn(30, 4, generator=generator).double()
    problem = SubsetProblem.from_gram(X.T @ X / 90, W0, keep=5, units=10)
    found = solve(problem, "local_search", start=tuple(range(5)))
    assert found.iterations > 0
    assert found.status is Status.SWAP_OPTIMAL
    found.verify()


@pytest.mark.parametrize("few", [0, 1 << 18])
@pytest.mark.parametrize("seed", range(4))
def test_exchanges_end_where_nothing_is_left_to_lose(seed, few, monkeypatch):
    """Gains are then rounding, by which the same units would come and go."""
    monkeypatch.setattr(local_search, "_FEW_PAIRS", few)
    generator = torch.Generator().manual_seed(seed)
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


def test_products_of_units_that_are_exchanged_at_once_are_multiplied_out_once(monkeypatch):
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    scored, score = [], local_search._best_swap

    def watched(state):
        scored.append([consumer._cross is not None for consumer in state.consumers])
        assert all(consumer.U.shape[1] <= len(consumer.U) for consumer in state.consumers)
        return score(state)

    monkeypatch.setattr(local_search, "_best_swap", watched)
    problem = pairs_of_inputs(6)
    solve(problem, "local_search", start=tuple(range(6)))
    assert len(scored) > 3
    assert all(map(all, scored))


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
    best = promising(state, 4)
    pair = best.units[[0]], best.units[[4]]
    assert float(swap_gains(state, *pair)) == best.gain == best_swap(state).gain
    found = solve(problem, "local_search", start=tuple(range(40)), max_swaps=40)
    assert found.support.tolist() == list(range(40, 80))
    assert found.status is Status.SWAP_OPTIMAL


@pytest.mark.parametrize("scale", [1e-60, 1e-20, 1e20, 1e60])
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


@instance
def test_where_no_unit_is_the_partner_of_another_the_best_is_exchanged(instance, monkeypatch):
    start = {"start": tuple(range(instance.problem.keep))}
    expected = solve(instance.problem, "local_search", options=start)
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    monkeypatch.setattr(local_search, "_best_swap", lambda part: Swap(-1, -1, -math.inf))
    found = solve(instance.problem, "local_search", options=start)
    assert found.support.tolist() == expected.support.tolist()
    assert (found.iterations, found.status) == (expected.iterations, expected.status)


@instance
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
