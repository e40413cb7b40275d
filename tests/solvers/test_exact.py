"""Exact searches: stopped, they are valid; nodes at once are bounded as one by one; cuts hold."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Status, backend_class, refit_loss, solve
from solvers.bounds.batch import TermsBatch, bound_nodes
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.tree_certificate import FREE, KEPT, REMOVED
from solvers.exact.outer_approximation import Highs, Search
from tests.solvers.instances import INSTANCES, build, random_data, random_problem

# ---- whole searches ------------------------------------------------------------------------------


def needs(name):
    reason = backend_class(name).available()
    return pytest.mark.skipif(reason is not None, reason=str(reason))


exact = pytest.mark.parametrize(
    "backend", ["branch_and_bound", *(pytest.param(n, marks=needs(n)) for n in ("highs", "gurobi"))]
)
HARD = build("hard", [random_data(5, 14, 8, samples=28)], 7)
"""Too many units to close at once, few enough that the optimum is known."""


@exact
def test_a_search_that_is_stopped_has_a_valid_bound(backend):
    optimum = solve(HARD.problem, "enumerate").loss
    solution = solve(HARD.problem, backend, time_limit=0.0)
    assert solution.status is Status.TIME_LIMIT
    assert 0 < solution.lower_bound <= optimum * (1 + 1e-9)
    assert 0 < solution.gap < 1
    solution.verify()


@pytest.mark.parametrize("limit", [0, 1, 7])
def test_node_limit_returns_a_valid_bound(limit):
    solution = solve(HARD.problem, "branch_and_bound", node_limit=limit)
    assert solution.status is Status.NODE_LIMIT
    assert solution.iterations == limit
    assert solution.lower_bound <= solve(HARD.problem, "enumerate").loss * (1 + 1e-12)
    solution.verify()


@exact
def test_a_loose_gap_tolerance_ends_the_search_early(backend):
    solution = solve(HARD.problem, backend, gap_tolerance=0.6)
    assert solution.status is Status.OPTIMAL
    assert 1e-4 < solution.gap <= solution.gap_tolerance == 0.6
    shown, checked = solution.record(solution.verify()), solution.verify()
    proved = max(solution.lower_bound, min(checked.lower_bound, shown.loss))
    if math.isfinite(checked.lower_bound):  # the bound shown is the one proved, not the stop
        assert shown.lower_bound == proved
        assert shown.gap <= solution.gap


@exact
def test_the_worst_start_still_reaches_the_optimum(backend):
    problem = build("trap", [random_data(0, 6, 5, samples=12)], 3).problem
    best = solve(problem, "enumerate")
    worst = tuple(best.removed.tolist())
    assert solve(problem, "local_search", start=worst).loss > 1.1 * best.loss
    solution = solve(problem, backend, start=worst)
    assert solution.status is Status.OPTIMAL
    assert torch.equal(solution.support, best.support)
    assert solution.history[0] > 1.1 * best.loss


# ---- many nodes at once --------------------------------------------------------------------------


def random_sides(seed, n, removals, nodes):
    """Nodes of unequal sizes, each with a unit free to go and one to stay."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.full((nodes, n), FREE, dtype=torch.int8)
    for row in sides:
        order = torch.randperm(n, generator=generator)
        goes = int(torch.randint(0, removals, (1,), generator=generator))
        stays = int(torch.randint(0, n - removals, (1,), generator=generator))
        row[order[:goes]], row[order[goes : goes + stays]] = REMOVED, KEPT
    return sides


def losses(problem, row):
    """Return the free units of a node, their choices, (c, r), and the losses of these."""
    gone, free = ([u for u, side in enumerate(row.tolist()) if side == s] for s in (REMOVED, FREE))
    choices = list(combinations(free, problem.units - problem.keep - len(gone)))
    found = [left(problem, {*gone, *choice}) for choice in choices]
    return free, choices, torch.tensor(found, dtype=torch.float64)


def left(problem, gone) -> float:
    return refit_loss(problem, torch.tensor([u for u in range(problem.units) if u not in gone]))


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(3, 8),
    width=st.integers(1, 2),
    responses=st.sampled_from([1, 5]),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    consumers=st.integers(1, 2),
)
@settings(max_examples=10, deadline=None)
def test_bounds_of_unequal_nodes_hold(seed, n, width, responses, spread, consumers):
    problem = random_problem(
        seed, n, width, responses, 1 + seed % (n - 1), spread=spread, consumers=consumers
    )
    root = RemovalTerms.of(problem)
    sides = random_sides(seed, n, root.removals, nodes=5)
    terms = TermsBatch.of(root, sides)
    share = torch.rand(terms.units.shape, generator=torch.Generator().manual_seed(seed)).double()
    bound = bound_nodes(terms, share, torch.full_like(share, 1.25), share, steps=8)
    longer = bound
    for _ in range(12):  # each ends where a step brings a thousandth
        longer = bound_nodes(terms, share, torch.full_like(share, 1.25), longer.point, steps=300)
    slack = 1e-9 * problem.scale
    assert bool((longer.cost <= bound.most + slack).all())
    assert bool((longer.cost > longer.most - 1e-3 * problem.scale).all())
    values = terms.certified(bound.cost)
    rises = {REMOVED: bound.if_removed(terms), KEPT: bound.if_kept(terms)}
    for index, row in enumerate(sides):
        free, choices, found = losses(problem, row)
        spent = terms.constant + float(terms.spent[index])
        assert terms.units[index][terms.free[index]].tolist() == free
        assert int(terms.removals[index]) == len(choices[0])
        gone = torch.nonzero(row == REMOVED).flatten().tolist()
        assert spent == pytest.approx(left(problem, gone), abs=slack)
        assert float(values[index]) <= float(found.min()) + slack
        for place, unit in enumerate(free):
            inside = torch.tensor([unit in choice for choice in choices])
            for side, some in ((REMOVED, inside), (KEPT, ~inside)):
                rise = max(float(rises[side][index, place]), 0.0)
                assert spent + float(bound.cost[index]) + rise <= float(found[some].min()) + slack


# ---- through other packages ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scalar", "correlated", "shuffled_consumers"])
def test_cuts_are_valid_at_every_support_and_tight_at_their_own(name):
    instance = INSTANCES[name]
    problem = instance.problem
    master = Search(problem, Highs(10.0))
    n, r = problem.units, master.terms.removals
    supports = list(combinations(range(n), r))
    points = np.array([[float(j in removed) for j in range(n)] for removed in supports])
    lost = np.array([instance.loss(set(range(n)) - set(removed)) for removed in supports])
    costs = (lost - master.terms.constant) / master.unit
    fractional = np.random.default_rng(0).dirichlet(np.ones(n), size=3) * r
    for point in [*points[:: max(1, len(points) // 7)], *np.minimum(fractional, 1.0)]:
        for slopes, constant in (master.root_cut(), *master.cuts_at(point)):
            assert (points @ slopes - constant <= costs + 1e-8).all()
    for point, cost in zip(points, costs, strict=True):
        slopes, constant = master.cut(point)
        assert point @ slopes - constant == pytest.approx(cost, abs=1e-8 * costs.max())
