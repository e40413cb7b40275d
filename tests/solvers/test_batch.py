"""Many nodes at once: the same conditioning as one by one, valid bounds, nodes in order."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import SubsetProblem, refit_loss
from solvers.bounds.batch import TermsBatch, bound_nodes, dominating
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.tree_certificate import FREE, KEPT, REMOVED
from solvers.exact.frontier import Frontier, Nodes
from tests.solvers.test_perspective import random_problem


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
    support = [unit for unit in range(problem.units) if unit not in gone]
    return refit_loss(problem, torch.tensor(support))


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(3, 8),
    width=st.integers(1, 2),
    responses=st.sampled_from([1, 5]),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    consumers=st.integers(1, 2),
)
@settings(max_examples=20, deadline=None)
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


def test_leaves_are_enumerated():
    problem = random_problem(3, 7, 2, 4, 4, consumers=2)
    root = RemovalTerms.of(problem)
    sides = torch.full((3, 7), FREE, dtype=torch.int8)
    sides[0, [1, 4]] = torch.tensor([REMOVED, KEPT], dtype=torch.int8)
    sides[1, [0, 6]] = torch.tensor([KEPT, REMOVED], dtype=torch.int8)
    sides[2, [2, 3]] = torch.tensor([KEPT, REMOVED], dtype=torch.int8)
    terms = TermsBatch.of(root, sides)
    costs, places = terms.cheapest(5, 2)
    for index, row in enumerate(sides):
        free, choices, found = losses(problem, row)
        loss = terms.constant + float(terms.spent[index] + costs[index])
        assert loss == pytest.approx(float(found.min()), rel=1e-9)
        best = tuple(free[place] for place in places[index].tolist())
        assert float(found[choices.index(best)]) == pytest.approx(loss, rel=1e-9)


def test_a_node_has_the_least_diagonal_of_its_shape():
    factors = torch.randn(5, 12, 9, generator=torch.Generator().manual_seed(0)).double()
    Q, shape = factors @ factors.mT, torch.linspace(0.5, 2, 12).double().expand(5, 12)
    growth, q = dominating(Q, shape, 1e-7)
    assert torch.allclose(q, growth[:, None] * shape * Q.diagonal(dim1=1, dim2=2))
    least = [torch.linalg.eigvalsh(torch.diag_embed(q * part) - Q)[:, 0] for part in (1, 1 - 1e-6)]
    assert bool((least[0] > 0).all())
    assert bool((least[1] < 0).all())


def test_units_that_cost_nothing_give_a_finite_bound():
    (consumer,) = random_problem(1, 6, 1, 3, 3).consumers
    silent = replace(consumer, G=torch.zeros_like(consumer.G), e=0.0)
    root = RemovalTerms.of(SubsetProblem((silent,), 3))
    terms = TermsBatch.of(root, torch.full((2, 6), FREE, dtype=torch.int8))
    half, one = torch.full((2, 6), 0.5).double(), torch.ones(2, 6).double()
    bound = bound_nodes(terms, half, one, half, 8)
    assert bool(torch.isfinite(bound.cost).all())
    assert bool((bound.cost <= 0).all())


def test_the_frontier_gives_nodes_in_order_and_loses_none():
    generator = torch.Generator().manual_seed(0)
    frontier = Frontier(3, torch.device("cpu"))
    bounds = torch.rand(3000, generator=generator).double()
    sides = torch.randint(0, 3, (3000, 3), generator=generator).to(torch.int8)
    for part in torch.arange(3000).split(700):
        frontier.push(Nodes(bounds[part], sides[part], torch.zeros(len(part), 3), part))
    taken = []
    while frontier.least < 0.9:
        nodes = frontier.pop(64, 0.9)
        assert float(nodes.bound.max()) < 0.9
        taken += list(zip(nodes.bound.tolist(), nodes.sides.tolist(), strict=True))
    expected = sorted(zip(bounds.tolist(), sides.tolist(), strict=True))
    assert sorted(taken) == [pair for pair in expected if pair[0] < 0.9]
    assert [bound for bound, _ in taken] == sorted(bound for bound, _ in taken)
    assert frontier.least == float(bounds[bounds >= 0.9].min())
