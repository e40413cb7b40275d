"""Backends that go through other packages: limits, licences, and what their cuts promise."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from solvers import BackendError, Status, backend_class, solve
from solvers.bounds.conic import Conic
from solvers.exact.gurobi import licence_errors
from solvers.exact.outer_approximation import Limits, Master
from tests.solvers.instances import INSTANCES, build, random_data


def needs(name):
    reason = backend_class(name).available()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


EXACT = [pytest.param(name, marks=needs(name)) for name in ("highs", "gurobi")]


def hard():
    """Too many units to close at once, few enough that the optimum is known."""
    return build("hard", [random_data(5, 14, 8, samples=28)], 7)


@pytest.mark.parametrize("name", ["scalar", "correlated", "ragged", "ragged_consumers"])
def test_cuts_are_valid_at_every_support_and_tight_at_their_own(name):
    instance = INSTANCES[name]
    problem = instance.problem
    master = Master(problem, Limits(10.0, 1e-4))
    n, r = problem.units, master.removals
    supports = list(combinations(range(n), r))
    points = np.array([[float(j in removed) for j in range(n)] for removed in supports])
    losses = np.array([instance.loss(set(range(n)) - set(removed)) for removed in supports])
    costs = (losses - master.terms.constant) / master.unit
    fractional = np.random.default_rng(0).dirichlet(np.ones(n), size=3) * r
    for point in [*points[:: max(1, len(points) // 7)], *np.minimum(fractional, 1.0)]:
        for cut in (master.root_cut(), *master.cuts_at(point)):
            assert (points @ cut.slopes - cut.constant <= costs + 1e-8).all()
    for point, cost in zip(points, costs, strict=True):
        cut = master.cut(point)
        assert point @ cut.slopes - cut.constant == pytest.approx(cost, abs=1e-8 * costs.max())


@pytest.mark.parametrize("backend", EXACT)
def test_a_time_limit_is_a_status_with_a_valid_bound(backend):
    instance = hard()
    solution = solve(instance.problem, backend, time_limit=0.0)
    optimum = solve(instance.problem, "enumerate").loss
    assert solution.status is Status.TIME_LIMIT
    assert 0 < solution.lower_bound <= optimum * (1 + 1e-9)
    assert 0 < solution.gap < 1
    solution.verify()


@pytest.mark.parametrize("backend", EXACT)
def test_a_bound_is_valid_wherever_the_clock_stops_the_search(backend):
    """How far it gets in that time is the machine's affair; what it then claims is not."""
    instance = hard()
    solution = solve(instance.problem, backend, time_limit=0.3)
    optimum = solve(instance.problem, "enumerate").loss
    assert solution.status in (Status.TIME_LIMIT, Status.OPTIMAL)
    assert 0 < solution.lower_bound <= optimum * (1 + 1e-9)
    assert (solution.status is Status.OPTIMAL) == (solution.gap <= 1e-4)
    solution.verify()


@pytest.mark.parametrize("backend", EXACT)
def test_a_loose_gap_tolerance_ends_the_search_early(backend):
    instance = hard()
    solution = solve(instance.problem, backend, gap_tolerance=0.6)
    assert solution.status is Status.OPTIMAL
    assert 1e-4 < solution.gap <= 0.6
    solution.verify()


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(
    "options", [{"time_limit": -1.0}, {"gap_tolerance": 1.0}, {"time_limit": float("nan")}]
)
def test_bad_limits(backend, options):
    with pytest.raises(BackendError, match=r"time_limit is .* and gap_tolerance"):
        solve(INSTANCES["scalar"].problem, backend, **options)


@needs("gurobi")
def test_a_licence_limit_names_the_limit_and_what_to_use_instead():
    import gurobipy

    with gurobipy.Env(params={"OutputFlag": 0}) as env, gurobipy.Model(env=env) as model:
        model.addMVar(2001, vtype="B")
        message = "2001 units exceeds the licence, which takes 2000 .* branch_and_bound or highs"
        try:
            model.optimize()
        except gurobipy.GurobiError as limit:
            with pytest.raises(BackendError, match=message), licence_errors(2001):
                raise limit
        else:
            pytest.skip("a full licence is installed")


@needs("gurobi")
def test_other_gurobi_errors_are_not_hidden():
    import gurobipy

    with pytest.raises(gurobipy.GurobiError), licence_errors(3):
        raise gurobipy.GurobiError(gurobipy.GRB.Error.OUT_OF_MEMORY, "out of memory")


@needs("highs")
def test_highs_prints_nothing():
    code = (
        "import torch, solvers;"
        "p = solvers.SubsetProblem.from_gram(torch.eye(4), torch.rand(4, 2), keep=2);"
        "solvers.solve(p, 'highs')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == ""


@needs("cvxpy")
@pytest.mark.parametrize("name", ["scalar", "target", "ragged", "two_consumers"])
def test_optimizing_the_diagonal_tightens_the_bound(name):
    instance = INSTANCES[name]
    bounds = {
        relaxation: solve(instance.problem, "cvxpy", relaxation=relaxation).lower_bound
        for relaxation in ("second_order", "semidefinite")
    }
    assert bounds["second_order"] < bounds["semidefinite"] <= instance.optimum() * (1 + 1e-9)


@needs("cvxpy")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": "linear"}, "choose semidefinite or second_order"),
        ({"rounds": 0}, "rounds is 0"),
        ({"solver": "NONE_SUCH"}, "'NONE_SUCH' is not installed; choose from .*CLARABEL"),
    ],
)
def test_bad_conic_options(options, message):
    with pytest.raises(BackendError, match=message):
        solve(INSTANCES["scalar"].problem, Conic(**options))


def test_group_lasso_ends_with_the_asked_size_and_beats_chance():
    instance = build("layer", [random_data(3, 40, 10, samples=200, noise=0.5)], 20)
    lasso = solve(instance.problem, "group_lasso")
    chance = np.mean([solve(instance.problem, "random", seed=s).loss for s in range(8)])
    assert lasso.loss < 0.8 * chance
    assert torch.equal(lasso.support, lasso.support.unique())
    with pytest.raises(BackendError, match="bisections is 0"):
        solve(instance.problem, "group_lasso", bisections=0)
