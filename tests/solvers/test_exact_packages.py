"""Backends that go through other packages: limits, licences, and what their cuts promise."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from solvers import BackendError, Status, backend_class, solve
from solvers.exact.gurobi import licence_errors
from solvers.exact.outer_approximation import MixedInteger, Search
from solvers.exact.perspective_miqp import PerspectiveProgram
from tests.solvers.instances import INSTANCES, Data, build, random_data


def needs(name):
    reason = backend_class(name).available()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


FORMULATIONS = {"perspective": "perspective program", "outer_approximation": "outer approximation"}

exact = pytest.mark.parametrize(
    ("backend", "choice"),
    [
        pytest.param("highs", {}, id="highs", marks=needs("highs")),
        *(
            pytest.param(
                "gurobi", {"formulation": name}, id=f"gurobi-{name}", marks=needs("gurobi")
            )
            for name in FORMULATIONS
        ),
    ],
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


@pytest.mark.parametrize(
    "name", ["scalar", "correlated", "dead", "wide_output", "ragged", "ragged_consumers"]
)
def test_the_perspective_program_has_the_cost_of_every_support_worth_a_look(name):
    instance = INSTANCES[name]
    problem = instance.problem
    search = Search(problem, MixedInteger(10.0))
    program = PerspectiveProgram.of(search)
    free = program.terms.units.tolist()
    everything = set(range(problem.units))
    for removed in combinations(range(problem.units), search.removals):
        cost = (instance.loss(everything - set(removed)) - search.terms.constant) / search.unit
        if not set(removed) <= set(free):
            assert cost > 1
            continue
        x = np.array([float(unit in removed) for unit in free])
        whole = split = 0.0
        for consumer in program.consumers:
            y = consumer.best_change(x)
            u = y - consumer.V * x[consumer.unit, None]
            whole += (u * (consumer.K @ u)).sum()
            split += (u * (consumer.rest @ u)).sum() + consumer.per_unit(y, len(x)).sum()
            split += consumer.per_unit(consumer.V, len(x)) @ x
            assert cost > 1 + 1e-9 or (np.abs(y) <= consumer.reach[:, None]).all()
        assert [whole, split] == pytest.approx([cost, cost], rel=1e-6, abs=1e-8)
    for consumer in program.consumers:
        assert np.linalg.eigvalsh(consumer.rest)[0] > 0
        assert consumer.split.min() > 0


@needs("gurobi")
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_both_formulations_equal_enumeration(formulation):
    for name in ("correlated", "nearly_singular", "ties", "ragged_consumers", "sparse"):
        instance = INSTANCES[name]
        solution = solve(instance.problem, "gurobi", formulation=formulation)
        slack = 1e-8 * instance.problem.scale
        assert solution.status is Status.OPTIMAL
        assert solution.bound_from.startswith(FORMULATIONS[formulation])
        assert solution.loss == pytest.approx(instance.optimum(), abs=slack)
        assert solution.lower_bound <= instance.optimum() + slack
        solution.verify()


@exact
def test_a_time_limit_is_a_status_with_a_valid_bound(backend, choice):
    instance = hard()
    solution = solve(instance.problem, backend, time_limit=0.0, **choice)
    optimum = solve(instance.problem, "enumerate").loss
    assert solution.status is Status.TIME_LIMIT
    assert 0 < solution.lower_bound <= optimum * (1 + 1e-9)
    assert 0 < solution.gap < 1
    solution.verify()


@exact
def test_a_loose_gap_tolerance_ends_the_search_early(backend, choice):
    instance = hard()
    solution = solve(instance.problem, backend, gap_tolerance=0.6, **choice)
    assert solution.status is Status.OPTIMAL
    assert 1e-4 < solution.gap <= 0.6
    solution.verify()


@exact
def test_the_worst_start_still_reaches_the_optimum(backend, choice):
    problem = build("trap", [random_data(0, 10, 5, samples=20)], 5).problem
    best = solve(problem, "enumerate")
    worst = tuple(best.removed.tolist())
    assert solve(problem, "local_search", start=worst).loss > 1.1 * best.loss
    solution = solve(problem, backend, start=worst, **choice)
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
def test_a_perspective_program_beyond_the_licence_says_so_and_auto_does_without(size_limit):
    problem = build("large", [random_data(3, 20, 12)], 10).problem
    message = (
        r"perspective program of \d+ variables exceeds the licence, which takes 200 variables .*"
        "full licence, or use formulation='outer_approximation', branch_and_bound or highs"
    )
    with pytest.raises(BackendError, match=message):
        solve(problem, "gurobi", formulation="perspective", time_limit=0.0)
    assert solve(problem, "gurobi", time_limit=0.0).bound_from.startswith("outer approximation")


@needs("gurobi")
def test_copies_told_apart_by_damping_alone_go_to_outer_approximation():
    data = random_data(1256, 3, 1)
    X, W0 = np.repeat(data.X, 2, axis=1), np.repeat(data.W0, 2, axis=0)
    problem = build("copies", [Data(X, X @ W0, W0)], 3, damp=1e-7).problem
    best = solve(problem, "enumerate")
    for formulation in ("auto", "perspective"):
        solution = solve(problem, "gurobi", formulation=formulation)
        assert solution.loss == pytest.approx(best.loss)
        assert 0 < solution.lower_bound <= best.loss
        solution.verify()
    assert solve(problem, "gurobi").bound_from.startswith("outer approximation")


@needs("gurobi")
def test_a_licence_limit_names_the_limit_and_what_to_use_instead(size_limit):
    message = "model of 2001 units exceeds the licence, which takes 2000 variables .* or use highs"
    with (
        pytest.raises(BackendError, match=message),
        licence_errors("model of 2001 units", "2000 variables", "highs"),
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
