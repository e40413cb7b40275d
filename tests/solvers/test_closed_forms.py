"""Every closed form that a search relies on, against refits by brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Consumer, Status, SubsetProblem, refit, solve
from solvers.closed_forms import elimination, pivot
from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.pivot import PivotState, best_swap, candidates, swap_gains
from solvers.closed_forms.row_blocks import by_unit, unit_rows
from solvers.exact.enumeration import Enumerate
from solvers.linalg import gram, symmetric
from tests.solvers.instances import (
    build,
    exact_optimum,
    random_data,
    shuffled_units,
)

properties = settings(max_examples=20, deadline=None, derandomize=True)
panels = st.sampled_from([5, 256])
"""Rows of panels in which units do not fit, and of one panel."""


@st.composite
def cases(draw, max_units=7):
    """An instance of any shape, and a support that is neither empty nor full."""
    seed = draw(st.integers(0, 2**32 - 1))
    n = draw(st.integers(2, max_units))
    damp = draw(st.sampled_from([1e-4, 1e-2, 1.0]))
    noise = draw(st.sampled_from([None, 0.0, 1.0]))
    data, units = [], []
    for c in range(draw(st.integers(1, 2))):
        width = draw(st.integers(1, 3))
        m = draw(st.sampled_from([1, 2, 4, 40]))
        data.append(random_data([seed, c], n * width, m, noise=noise or 0.0))
        units.append(shuffled_units(seed, n, width))
    keep = draw(st.integers(1, n - 1))
    support = np.sort(np.random.default_rng(seed).permutation(n)[:keep]).tolist()
    return build("drawn", data, keep, units, damp, given=noise is not None), support


def state_of(instance, support) -> PivotState:
    return PivotState.on_support(instance.problem, torch.tensor(support))


def plain_state(consumer, kept):
    """N and K by the formulas of `solvers.closed_forms.pivot`."""
    H, G = by_unit(consumer)
    inside = kept.repeat_interleave(consumer.width)
    A = torch.linalg.inv(H[inside][:, inside])
    N, U = torch.empty_like(H), torch.empty_like(G)
    S, R = torch.nonzero(inside).flatten(), torch.nonzero(~inside).flatten()
    cross = A @ H[S][:, R]
    N[S[:, None], S], N[S[:, None], R], N[R[:, None], S] = -A, cross, cross.T
    N[R[:, None], R] = H[R][:, R] - H[R][:, S] @ cross
    U[S] = A @ G[S]
    U[R] = G[R] - H[R][:, S] @ U[S]
    return N, U @ U.T


def assert_sound(state, tolerance=1e-8):
    """N and K are those of the formulas, relative to their largest entries, and of all pairs."""
    leave, enter = state.support, state.removed
    for part, consumer in zip(state.consumers, state.problem.consumers, strict=True):
        rows, columns = (
            (some[:, None] * part.width + torch.arange(part.width)).flatten()
            for some in (leave, enter)
        )
        place = unit_rows(part._place, part.width)
        N, K = part.N.rows(place), (part.U @ part.U.T)[place]
        found = (N[:, place], K[:, place]), part.pairs(leave, enter)
        for expected, whole, pairs in zip(plain_state(consumer, state.kept), *found, strict=True):
            slack = tolerance * float(expected.abs().max())
            assert float((whole - expected).abs().max()) <= slack
            of_pairs = expected[rows][:, columns]
            assert not of_pairs.numel() or float((pairs - of_pairs).abs().max()) <= slack


# ---- what leaves, enters, and is exchanged -------------------------------------------------------


@properties
@given(cases())
def test_removal_losses_and_addition_gains(case):
    instance, support = case
    state, loss = state_of(instance, support), instance.loss(support)
    slack = 1e-8 * instance.problem.scale
    assert refit(instance.problem, torch.tensor(support))[1] == pytest.approx(loss, abs=slack)
    losses, gains = state.removal_losses(), state.addition_gains()
    for unit in range(instance.problem.units):
        exchanged = instance.loss({*support} ^ {unit})
        if unit in support:
            assert float(losses[unit]) == pytest.approx(exchanged - loss, abs=slack)
            assert gains[unit] == -torch.inf
        else:
            assert float(gains[unit]) == pytest.approx(loss - exchanged, abs=slack)
            assert losses[unit] == torch.inf


@properties
@given(cases())
def test_swap_gains(case):
    instance, support = case
    state, scale = state_of(instance, support), instance.problem.scale
    gains = swap_gains(state, state.support, state.removed)
    pairs = list(itertools.product(state.support.tolist(), state.removed.tolist()))
    loss = instance.loss(support)
    brute = {(i, j): loss - instance.loss({*support} - {i} | {j}) for i, j in pairs}
    assert gains.flatten().tolist() == pytest.approx(list(brute.values()), abs=1e-8 * scale)
    best = best_swap(state)
    assert best.gain == pytest.approx(max(brute.values()), abs=1e-8 * scale)
    assert brute[tuple(best.units.tolist())] == pytest.approx(best.gain, abs=1e-8 * scale)


@properties
@given(cases(), st.data())
def test_some_units_are_exchanged_among_themselves_as_among_all(case, data):
    instance, support = case
    state = state_of(instance, support)
    count = data.draw(st.integers(1, 4))
    found = candidates(state, count)
    assert found.gain == pytest.approx(best_swap(state).gain, rel=1e-9, abs=1e-300)
    leave, enter = (found.units[state.kept[found.units] == kept] for kept in (True, False))
    assert len(leave) == len(enter) == min(count, len(state.support), len(state.removed))
    gains = swap_gains(state, state.support, state.removed)
    for best, units, side in (
        (gains.amax(1), leave, state.support),
        (gains.amax(0), enter, state.removed),
    ):
        least = best[torch.isin(side, units)].min()
        assert len(side) == len(units) or best[~torch.isin(side, units)].max() <= least
    if data.draw(st.booleans()):  # of which those that stay are not the first
        found = replace(found, units=found.units.flip(0))
    part, scale = state.part(found.units), instance.problem.scale
    for _ in range(2):
        swap = best_swap(part)
        if not len(swap.units):
            return
        leave, enter = found.units[swap.units].split(1)
        assert swap.gain == pytest.approx(float(swap_gains(state, leave, enter)), abs=1e-9 * scale)
        part.sweep(swap.units)
        state.sweep(torch.cat([leave, enter]))
        assert torch.equal(part.kept, state.kept[found.units])


@properties
@given(cases(), st.data(), panels)
def test_sweeping_equals_factorizing_afresh(case, data, rows):
    """Single units, groups that enter, groups that leave, and both at once."""
    instance, support = case
    problem = instance.problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "PANEL_ROWS", rows)
        patch.setattr(gram, "TILE_ROWS", rows)
        state, kept = state_of(instance, support), set(support)
        assert_sound(state)
        for _ in range(4):
            units = st.integers(0, problem.units - 1)
            moved = data.draw(st.lists(units, min_size=1, max_size=3, unique=True))
            if kept ^ set(moved):
                state.sweep(moved)
                kept ^= set(moved)
                assert state.support.tolist() == sorted(kept)
                assert_sound(state)
                told, loss = state.loss(), refit(problem, state.support)[1]
                wide = any(c.G.shape[1] > len(c.rows) * c.width for c in problem.consumers)
                exact = pytest.approx(loss, abs=1e-8 * problem.scale)
                assert told is None if wide else told == exact


def test_the_first_candidates_are_the_best_exchange_and_no_nan_is_passed_over(monkeypatch):
    data = random_data(5, 24, 3, noise=1.0)
    state = state_of(build("drawn", [data], 12), range(12))
    best, few = best_swap(state), candidates(state, 3)
    assert few.gain == pytest.approx(best.gain)
    assert [int(few.units[0]), int(few.units[3])] == best.units.tolist()
    monkeypatch.setattr(pivot, "_PASS_ROWS", 4)
    monkeypatch.setattr(pivot, "_PASS_ELEMENTS", 1)

    def spoiled(state, leave, enter):
        found = swap_gains(state, leave, enter)
        return found * torch.nan if 0 in leave else found

    monkeypatch.setattr(pivot, "swap_gains", spoiled)
    assert np.isnan(best_swap(state).gain)


# ---- elimination ---------------------------------------------------------------------------------


@properties
@given(cases(max_units=12), panels, st.sampled_from([(3, 2), (3, 1), (64, 2)]))
def test_elimination_removes_the_cheapest_and_its_losses_add_up(case, rows, batches):
    """In one batch or many, with rows at hand that stay for some or are not enough."""
    (instance, _), (pending, cached) = case, batches
    problem, n = instance.problem, instance.problem.units
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "PANEL_ROWS", rows)
        patch.setattr(elimination, "_PENDING_ROWS", pending)
        patch.setattr(elimination, "_CACHED", cached)
        removals = eliminate(problem, n - 1)
    kept, loss = set(range(n)), refit(problem, torch.arange(n))[1]
    for removed, risen in removals:
        left = {unit: torch.tensor(sorted(kept - {unit})) for unit in kept}
        rises = {unit: refit(problem, stay)[1] - loss for unit, stay in left.items()}
        assert risen == pytest.approx(rises[removed], abs=1e-8 * problem.scale)
        assert risen == pytest.approx(min(rises.values()), abs=1e-8 * problem.scale)
        kept.remove(removed)
        loss += rises[removed]
    assert support_after(removals, problem).tolist() == sorted(kept)


def test_elimination_factorizes_once_unless_its_updates_have_drifted(monkeypatch):
    """What drift hides: updates that are wrong would be done again, one by one, from the start."""
    problem = build("drawn", [random_data(9, 30, 6, samples=90)], 10).problem
    monkeypatch.setattr(elimination, "_PENDING_ROWS", 6)  # rows at hand stay for the next batch
    right, front, made = eliminate(problem, problem.units - 1), elimination._Elimination, []

    class Noting(front):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(elimination, "_Elimination", Noting)
    assert eliminate(problem, problem.units - 1) == right
    assert len(made) == 1
    made.clear()
    monkeypatch.setattr(front, "_drift", lambda self: float(len(made) == 1))
    again = eliminate(problem, problem.units - 1)
    assert [unit for unit, _ in again] == [unit for unit, _ in right]
    assert len(made) == 2


@pytest.mark.parametrize(
    "order",
    [[*range(9)], [7, 8, *range(7)], [0, 1, 7, 8, *range(2, 7)], [0, 1, 7, *range(2, 7), 8]],
)
def test_rows_of_units_that_left_are_not_read_again(order):
    """Once rows were compacted, their places would be those of other units."""
    # inv(H) is U U' and a diagonal; the weights of the last two units are zero.
    u = torch.tensor([(1, 0), (0.95, 0.2), *((0.5, 0.62 + 0.001 * i) for i in range(5))]).double()
    H, weights = torch.eye(9).double(), torch.zeros(9).double()
    H[:7, :7] = torch.linalg.inv(u @ u.T + (1 - u.square().sum(1)).clamp(min=0.0).diag())
    weights[:7] = u.sum(1)
    W0 = torch.zeros(9 * 16, 1).double()
    W0[::16, 0] = weights[order]
    wide = torch.kron(H[order][:, order].contiguous(), torch.eye(16).double())
    problem = SubsetProblem.from_gram(wide, W0, units=9, keep=4, damp=1e-6)
    assert {order[removed] for removed, _ in eliminate(problem, 2)} == {7, 8}
    assert solve(problem, "local_search").status is Status.SWAP_OPTIMAL


@pytest.mark.parametrize("name", ["A", "W", "K"])
def test_lost_digits_are_noticed(name):
    problem = build("drawn", [random_data(9, 30, 6)], 10).problem
    front = elimination._Elimination(problem, torch.arange(30))
    assert not front.drifted()
    (part,) = front._parts
    if name == "A":
        part.A.add_diagonal(1e-5 * part.A.diagonal())
    elif name == "K":
        part.begin(1, front._penalty > 0)
        part.cache_rows(torch.arange(30))
        part.cache.rows[0].mul_(1 + 1e-5)
    else:
        part.W.mul_(1 + 1e-5)
    assert front.drifted()


@pytest.mark.parametrize("seed", [17, 40])
def test_enumeration_is_no_more_certain_than_its_arithmetic(seed):
    """Near a singular H its bound lay above the exact optimum, by less than its own rounding."""
    generator = torch.Generator().manual_seed(seed)
    left, right, X, W, noise = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((6, 3), (3, 6), (17, 6), (6, 3), (17, 3))
    )
    X = X @ (left @ right + 1e-3 * torch.eye(6).double())
    Y = X @ W + noise
    rows = torch.arange(6)[:, None]
    H, G, e = X.T @ X / 17, X.T @ Y / 17, float(Y.square().sum() / 17)
    problem = SubsetProblem((Consumer((H + H.T) / 2, G, e, torch.zeros_like(G), rows),), keep=4)
    selection = Enumerate().select(problem)
    exact = exact_optimum(problem)
    assert Fraction(selection.lower_bound) <= exact
    assert selection.lower_bound == pytest.approx(float(exact), rel=1e-3)
