"""What the searches and scores of this package promise beyond `test_conformance`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from solvers import Status, SubsetProblem, refit, solve
from solvers.closed_forms.pivot import PivotState, best_swap, candidates, swap_gains
from solvers.closed_forms.schur import window_problem
from solvers.heuristics import local_search
from solvers.linalg import symmetric
from tests.solvers.instances import INSTANCES, build, random_data

# ---- exchanges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["correlated", "ties", "dead", "permuted", "shuffled_consumers"])
def test_exchanges_of_many_units_end_where_none_helps(name, monkeypatch):
    """Also where units of several rows do not fit into panels of a power of two."""
    monkeypatch.setattr(symmetric, "PANEL_ROWS", 4)
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    monkeypatch.setattr(local_search, "_AT_ONCE", 5)
    instance = INSTANCES[name]
    problem = instance.problem
    start = tuple(range(problem.keep))  # far from the best
    for options in ({}, {"start": start}, {"start": start, "max_swaps": 1}):
        found = solve(problem, "local_search", options=options)
        found.verify()
        assert found.status in (Status.SWAP_OPTIMAL, Status.ITERATION_LIMIT)
        loss = instance.loss(found.support)
        assert found.loss == pytest.approx(loss, abs=1e-8 * problem.scale)
        assert found.iterations <= options.get("max_swaps", 10_000)
        if found.status is Status.SWAP_OPTIMAL:
            state = PivotState.on_support(problem, found.support)
            assert best_swap(state).gain <= 1e-6 * found.loss + 1e-12 * problem.scale


@pytest.mark.parametrize("few", [0, 1 << 18])
def test_exchanges_end_where_nothing_is_left_to_lose(few, monkeypatch):
    """Gains are then rounding, by which the same units would come and go."""
    monkeypatch.setattr(local_search, "_FEW_PAIRS", few)
    H, _, _, W0 = random_data(0, 8, 5, samples=64).tensors()
    W0[3:] = 0
    found = solve(SubsetProblem.from_gram(H, W0, keep=4), "local_search", start=(4, 5, 6, 7))
    assert found.loss <= 1e-15 * found.problem.scale
    assert found.iterations < 20
    assert found.status is Status.SWAP_OPTIMAL
    found.verify()


def test_many_exchanges_that_gain_the_same_find_their_partners(monkeypatch):
    """The second half of inputs are to take the places of the first, each that of its partner.

    With that as much is gained by all, and with any other much is lost.
    """
    monkeypatch.setattr(local_search, "_FEW_PAIRS", 0)
    monkeypatch.setattr(local_search, "_AT_ONCE", 4)
    pairs, one = 40, torch.arange(40)
    partners = pairs + torch.randperm(pairs, generator=torch.Generator().manual_seed(1))
    H, W0 = torch.eye(2 * pairs).double(), torch.zeros(2 * pairs, pairs).double()
    H[one, partners] = H[partners, one] = 0.95
    W0[one, one], W0[partners, one] = 1.0, 1.3
    problem = SubsetProblem.from_gram(H, W0, keep=pairs, damp=0.0)
    state = PivotState.on_support(problem, one)
    best = candidates(state, 4)
    pair = best.units[[0]], best.units[[4]]
    assert float(swap_gains(state, *pair)) == best.gain == best_swap(state).gain
    found = solve(problem, "local_search", start=tuple(range(pairs)), max_swaps=pairs)
    assert found.support.tolist() == list(range(pairs, 2 * pairs))
    assert found.status is Status.SWAP_OPTIMAL


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_exchanges_do_not_depend_on_the_scale_of_the_inputs(scale):
    for seed in (10, 17):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(80, 27, generator=generator).double()
        X = X[:, torch.randint(0, 13, (27,), generator=generator)]  # many of them twice
        H, W0 = X.T @ X / 80, torch.randn(27, 4, generator=generator).double()
        problems = [SubsetProblem.from_gram(h, W0, keep=4, units=9) for h in (H, H * scale)]
        expected, found = (solve(p, "local_search", start=(0, 1, 2, 3)) for p in problems)
        assert torch.equal(found.support, expected.support)
        assert found.status is expected.status is Status.SWAP_OPTIMAL


def test_multistage():
    for name in ("correlated", "permuted", "shuffled_consumers"):
        problem = INSTANCES[name].problem
        one_by_one = solve(problem, "multistage", stage_size=1, max_batches=0)
        assert torch.equal(one_by_one.support, solve(problem, "greedy").support)
    problem = INSTANCES["nearly_singular"].problem
    with_swaps = solve(problem, "multistage", stage_size=5, batch_size=1)
    without = solve(problem, "multistage", stage_size=5, max_batches=0)
    assert with_swaps.loss < 0.8 * without.loss
    assert with_swaps.history[0] == pytest.approx(without.loss)


def test_searches_beat_chance():
    layer = build("layer", [random_data(3, 40, 10, samples=200, noise=0.5)], 20)
    for instance in (INSTANCES["correlated"], INSTANCES["shuffled_consumers"], layer):
        random = np.mean([solve(instance.problem, "random", seed=s).loss for s in range(8)])
        for backend in ("greedy", "local_search", "multistage", "group_lasso"):
            assert solve(instance.problem, backend).loss < 0.9 * random


# ---- windows: their loss is the whole layer's ----------------------------------------------------


def whole_support(support, units, chosen):
    """Return a support with its part inside a window replaced by some of its units."""
    return torch.tensor(sorted({*support.tolist()} - {*units.tolist()} | {*units[chosen].tolist()}))


@pytest.mark.parametrize("name", ["target", "permuted", "shuffled_consumers"])
def test_window_loss_is_the_loss_of_the_whole(name):
    problem = INSTANCES[name].problem
    support = torch.arange(problem.keep)
    units = torch.tensor([problem.units - 1, 1, 0, problem.keep])
    window = window_problem(problem, support, units)
    assert window.units == 4
    for chosen in torch.combinations(torch.arange(4), window.keep):
        whole = whole_support(support, units, chosen)
        assert len(whole) == problem.keep
        loss = refit(problem, whole)[1]
        assert refit(window, chosen)[1] == pytest.approx(loss, rel=1e-9, abs=1e-10)
