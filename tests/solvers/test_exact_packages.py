"""Backends that go through other packages: limits, licences, and what their cuts promise."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from solvers import BackendError, Status, backend_class, solve
from solvers.exact.gurobi import _licence_errors
from solvers.exact.outer_approximation import MixedInteger, Search
from tests.solvers.instances import INSTANCES, build, random_data


def needs(name):
    reason = backend_class(name).available()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


exact = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=needs(name)) for name in ("highs", "gurobi")]
)


def hard():
    """Too many units to close at once, few enough that the optimum is known."""
    return build("hard", [random_data(5, 14, 8, samples=28)], 7)


@pytest.mark.parametrize("name", ["scalar", "correlated", "ragged", "ragged_consumers"])
def test_cuts_are_valid_at_every_support_and_tight_at_their_own(name):
    instance = INSTANCES[name]
    problem = instance.problem
    master = Search(problem, MixedInteger(10.0))
    n, r = problem.units, master.removals
    supports = list(combinations(range(n), r))
    points = np.array([[float(j in removed) for j in range(n)] for removed in supports])
    losses = np.array([instance.loss(set(range(n)) - set(removed)) for removed in supports])
    costs = (losses - master.terms.constant) / master.unit
    fractional = np.random.default_rng(0).dirichlet(np.ones(n), size=3) * r
    for point in [*points[:: max(1, len(points) // 7)], *np.minimum(fractional, 1.0)]:
        for slopes, constant in (master.root_cut(), *master.cuts_at(point)):
            assert (points @ slopes - constant <= costs + 1e-8).all()
    for point, cost in zip(points, costs, strict=True):
        slopes, constant = master.cut(point)
        assert point @ slopes - constant == pytest.approx(cost, abs=1e-8 * costs.max())


@exact
def test_a_time_limit_is_a_status_with_a_valid_bound(backend):
    instance = hard()
    solution = solve(instance.problem, backend, time_limit=0.0)
    optimum = solve(instance.problem, "enumerate").loss
    assert solution.status is Status.TIME_LIMIT
    assert 0 < solution.lower_bound <= optimum * (1 + 1e-9)
    assert 0 < solution.gap < 1
    solution.verify()


@exact
def test_a_loose_gap_tolerance_ends_the_search_early(backend):
    instance = hard()
    solution = solve(instance.problem, backend, gap_tolerance=0.6)
    assert solution.status is Status.OPTIMAL
    assert 1e-4 < solution.gap <= 0.6
    solution.verify()


@exact
def test_the_worst_start_still_reaches_the_optimum(backend):
    problem = build("trap", [random_data(0, 10, 5, samples=20)], 5).problem
    best = solve(problem, "enumerate")
    worst = tuple(best.removed.tolist())
    assert solve(problem, "local_search", start=worst).loss > 1.1 * best.loss
    solution = solve(problem, backend, start=worst)
    assert solution.status is Status.OPTIMAL
    assert torch.equal(solution.support, best.support)
    assert solution.history[0] > 1.1 * best.loss


@pytest.fixture
def size_limit():
    """The error of a licence that is limited in size; a full one has none."""
    import gurobipy

    with gurobipy.Env(params={"OutputFlag": 0}) as env, gurobipy.Model(env=env) as model:
        model.addMVar(2001, vtype="B")
        try:
            model.optimize()
        except gurobipy.GurobiError as error:
            return error
    pytest.skip("a full licence is installed")


@needs("gurobi")
def test_a_licence_limit_names_the_limit_and_what_to_use_instead(size_limit):
    message = "of 2001 units exceeds the licence, which takes 2000 variables .* or use branch_and"
    with (
        pytest.raises(BackendError, match=message),
        _licence_errors("outer approximation of 2001 units"),
    ):
        raise size_limit


@needs("cvxpy")
@pytest.mark.parametrize("name", ["scalar", "target", "ragged", "two_consumers"])
def test_optimizing_the_diagonal_tightens_the_bound(name):
    instance = INSTANCES[name]
    bounds = {
        relaxation: solve(instance.problem, "cvxpy", relaxation=relaxation).lower_bound
        for relaxation in ("second_order", "semidefinite")
    }
    assert bounds["second_order"] < bounds["semidefinite"] <= instance.optimum() * (1 + 1e-9)


def test_group_lasso_ends_with_the_asked_size_and_beats_chance():
    instance = build("layer", [random_data(3, 40, 10, samples=200, noise=0.5)], 20)
    lasso = solve(instance.problem, "group_lasso")
    chance = np.mean([solve(instance.problem, "random", seed=s).loss for s in range(8)])
    assert lasso.loss < 0.8 * chance
    assert torch.equal(lasso.support, lasso.support.unique())
