"""Every closed form that a search relies on, against refits by brute force."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Consumer, SubsetProblem, refit, solve
from solvers.closed_forms import elimination, swaps
from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.pivot import PivotState
from solvers.closed_forms.swaps import best_swap, candidates, swap_gains
from solvers.exact.enumeration import Enumerate
from tests.solvers.instances import (
    INSTANCES,
    Instance,
    build,
    exact_optimum,
    random_data,
    shuffled_units,
)

properties = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def cases(draw, max_units=7):
    """An instance of any shape, and a support that is neither empty nor full."""
    seed = draw(st.integers(0, 2**32 - 1))
    n = draw(st.integers(2, max_units))
    damp = draw(st.sampled_from([1e-4, 1e-2, 1.0]))
    noise = draw(st.sampled_from([0.0, 1.0]))
    data, units = [], []
    for c in range(draw(st.integers(1, 2))):
        widths = draw(
            st.one_of(st.just([1] * n), st.lists(st.integers(1, 3), min_size=n, max_size=n))
        )
        data.append(random_data([seed, c], sum(widths), draw(st.integers(1, 4)), noise=noise))
        units.append(shuffled_units(seed, widths))
    keep = draw(st.integers(1, n - 1))
    support = np.sort(np.random.default_rng(seed).permutation(n)[:keep]).tolist()
    return build("drawn", data, keep, units, damp), support


def state_of(instance: Instance, support) -> PivotState:
    return PivotState.on_support(instance.problem, torch.tensor(support))


def assert_same(state: PivotState, other: PivotState, tolerance=1e-8):
    """Equal supports, and N and K equal relative to their largest entries."""
    assert torch.equal(state.kept, other.kept)
    for a, b in zip(state.consumers, other.consumers, strict=True):
        assert torch.equal(a.kept, b.kept)
        units = torch.arange(len(a.kept))
        for x, y in ((a.N_rows(units), b.N_rows(units)), (a.K_rows(units), b.K_rows(units))):
            assert float((x - y).abs().max()) <= tolerance * float(y.abs().max())


@properties
@given(cases())
def test_refit(case):
    instance, support = case
    _, loss = refit(instance.problem, torch.tensor(support))
    assert loss == pytest.approx(instance.loss(support), abs=1e-9 * instance.problem.scale)


@properties
@given(cases())
def test_removal_losses_and_addition_gains(case):
    instance, support = case
    state, loss = state_of(instance, support), instance.loss(support)
    losses, gains = state.removal_losses(), state.addition_gains()
    slack = 1e-8 * instance.problem.scale
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
    state = state_of(instance, support)
    leave, enter = state.support, state.removed
    gains = swap_gains(state, leave, enter)
    scale = instance.problem.scale
    brute = {
        (i, j): instance.loss(support) - instance.loss({*support} - {i} | {j})
        for i in leave.tolist()
        for j in enter.tolist()
    }
    for row, i in enumerate(leave.tolist()):
        for column, j in enumerate(enter.tolist()):
            assert float(gains[row, column]) == pytest.approx(brute[i, j], abs=1e-8 * scale)
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
    if data.draw(st.booleans()):  # of which products are not kept
        found = replace(found, units=found.units.flip(0))
    part, scale = state.part(found.units), instance.problem.scale
    if data.draw(st.booleans()):
        part.hold_products()
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
@given(cases(), st.data())
def test_sweeping_equals_factorizing_afresh(case, data):
    """Single units, groups that enter, groups that leave, and both at once."""
    instance, support = case
    n = instance.problem.units
    state, kept = state_of(instance, support), set(support)
    for _ in range(4):
        moved = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3, unique=True))
        if kept ^ set(moved):
            state.sweep(moved)
            kept ^= set(moved)
            assert_same(state, state_of(instance, sorted(kept)))


@properties
@given(cases())
def test_elimination_removes_the_cheapest_and_its_losses_add_up(case):
    instance, _ = case
    n = instance.problem.units
    removals = eliminate(instance.problem, n - 1)
    scale, kept = instance.problem.scale, set(range(n))
    for removed, risen in removals:
        rises = {u: instance.loss(kept - {u}) - instance.loss(kept) for u in kept}
        assert risen == pytest.approx(rises[removed], abs=1e-8 * scale)
        assert risen == pytest.approx(min(rises.values()), abs=1e-8 * scale)
        kept.remove(removed)
    assert support_after(removals, instance.problem).tolist() == sorted(kept)


def large(width=1, consumers=1, n=150, **options) -> Instance:
    """More units than one batch of pending removals holds."""
    data = [random_data([9, c], n * width, 6, samples=2 * n * width) for c in range(consumers)]
    return build("large", data, n // 3, [n] * consumers, **options)


@pytest.mark.parametrize(("width", "consumers"), [(1, 1), (3, 1), (1, 2)])
def test_lazy_elimination_equals_eager(width, consumers):
    instance = large(width, consumers)
    eager = PivotState.full(instance.problem)
    removals = eliminate(instance.problem, 145)
    assert len(removals) == 145
    for removed, risen in removals:
        losses = eager.removal_losses()
        unit = int(losses.argmin())
        assert removed == unit
        assert risen == pytest.approx(float(losses[unit]), rel=1e-7)
        eager.sweep([unit])
    assert_same(eager, PivotState.on_support(instance.problem, eager.support))


def test_state_does_not_drift_over_hundreds_of_sweeps():
    instance = large(n=60, damp=1e-4)
    state = state_of(instance, range(20))
    generator = np.random.default_rng(0)
    for _ in range(400):
        leave = int(generator.choice(state.support.numpy()))
        enter = int(generator.choice(state.removed.numpy()))
        state.sweep([leave, enter])
    assert_same(state, PivotState.on_support(instance.problem, state.support), 1e-9)


@pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES.keys())
def test_greedy_path_is_the_loss_at_every_size(instance):
    """The path is checked against refits on the supports that its order implies."""
    problem = instance.problem
    path = solve(problem.with_keep(1), "greedy").history[::-1]
    assert len(path) == problem.units
    for k in range(1, problem.units + 1):
        loss = instance.loss(solve(problem.with_keep(k), "greedy").support)
        assert path[k - 1] == pytest.approx(loss, abs=1e-7 * problem.scale)


def undamped(data, n) -> Instance:
    """An instance with less damping than `from_gram` would let it have."""
    X, Y, W0 = (torch.from_numpy(array) for array in (data.X, data.Y, data.W0))
    H, N, p = X.T @ X / len(X), len(X), X.shape[1]
    damping = 1e-9 * float(H.diagonal().mean())
    consumer = Consumer(
        H=(H + H.T) / 2 + damping * torch.eye(p),
        G=X.T @ Y / N + damping * W0,
        e=float(Y.square().sum() / N + damping * W0.square().sum()),
        W0=W0,
        rows=torch.arange(p).view(n, p // n),
        damping=damping,
    )
    return Instance("undamped", SubsetProblem((consumer,), 2), (data,))


@pytest.mark.parametrize("width", [1, 4])
def test_elimination_is_honest_on_a_nearly_singular_hessian(width):
    """Rank 30 of 120 with almost no damping: updates alone would lose every digit."""
    generator = np.random.default_rng(1)
    mix = generator.normal(size=(120, 30)) @ generator.normal(size=(30, 120))
    data, n = random_data(2, 120, 5, samples=400, mix=mix), 120 // width
    instance = undamped(data, n)
    problem = instance.problem
    removals = eliminate(problem, n - 5)
    kept = set(range(n))
    for step, (removed, risen) in enumerate(removals):
        if step % (n // 6) == 5 // width:
            loss, slack = instance.loss(kept), 1e-7 * problem.scale
            rises = {unit: instance.loss(kept - {unit}) - loss for unit in sorted(kept)}
            assert risen == pytest.approx(rises[removed], abs=slack, rel=1e-4)
            assert rises[removed] <= 1.001 * min(rises.values()) + slack
        kept.remove(removed)


def test_elimination_factorizes_once_unless_its_updates_have_drifted(monkeypatch):
    """What drift hides: updates that are wrong would be done again, one by one, from the start."""
    problem = INSTANCES["ragged_consumers"].problem
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


def test_the_first_candidates_are_the_best_exchange_and_no_nan_is_passed_over(monkeypatch):
    data = random_data(5, 24, 3, noise=1.0)
    state = state_of(build("drawn", [data], 12, [[[unit] for unit in range(24)]], 0.01), range(12))
    best, few = best_swap(state), candidates(state, 3)
    assert few.gain == pytest.approx(best.gain)
    assert [int(few.units[0]), int(few.units[3])] == best.units.tolist()
    monkeypatch.setattr(swaps, "_PASS_ROWS", 4)
    monkeypatch.setattr(swaps, "_PASS_ELEMENTS", 1)
    gains = swap_gains

    def spoiled(state, leave, enter):
        found = gains(state, leave, enter)
        return found * torch.nan if 0 in leave else found

    monkeypatch.setattr(swaps, "swap_gains", spoiled)
    assert np.isnan(best_swap(state).gain)


def test_drift_is_noticed():
    instance = INSTANCES["ragged_consumers"]
    state = state_of(instance, [0, 2, 3])
    assert state.drift() < 1e-12
    next(state.consumers[1].N.spans())[1][2] += 1e-4
    assert state.drift() > 1e-5
