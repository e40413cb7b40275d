"""The search for widths, held against trying all of them."""

import ctypes
import itertools
import os
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest
import scipy.optimize
from hypothesis import example, given, settings
from hypothesis import strategies as st

from osscar.allocation import search
from osscar.allocation.knapsack import Knapsack
from osscar.allocation.search import Search


@dataclass
class Tables:
    """A cost that is a table for each group, and for some groups together."""

    single: dict
    together: dict = field(default_factory=dict)

    @property
    def coupled(self):
        return frozenset(map(frozenset, self.together))

    def over(self, name, counts, kept):
        at = {**kept, name: counts}
        several = [table[tuple(at[n] for n in names)] for names, table in self.together.items()]
        return sum(several, self.single[name][counts] + 0.0)

    def of(self, kept):
        single = sum(float(table[kept[name]]) for name, table in self.single.items())
        return single + sum(
            float(table[tuple(kept[n] for n in names)]) for names, table in self.together.items()
        )


def stairs(random, shape):
    """Return a table that rises along each dimension, by steps in some places only."""
    table = random.exponential(size=shape) * (random.random(shape) < 0.4)
    for axis in range(len(shape)):
        table = table.cumsum(axis)
    return table


def falling(random, widths):
    """Return losses of so many widths, convex or not, some of them equal, down to zero."""
    falls = random.exponential(size=widths - 1) ** 3 * (random.random(widths - 1) < 0.8)
    return np.append(falls[::-1].cumsum()[::-1], 0.0) * 10.0 ** random.integers(-6, 3)


def every_choice(losses):
    """Return all choices of widths."""
    counts = itertools.product(*(range(len(some)) for some in losses.values()))
    return [dict(zip(losses, widths, strict=True)) for widths in counts]


def searched(losses, costs):
    """Return a search over groups that may keep any number of units from none on."""
    options = {name: np.arange(len(some)) for name, some in losses.items()}
    return Search(options, losses, {}, costs)


def problem(seed, together):
    """Return losses, costs and limits, of which some allow just what one choice costs."""
    random = np.random.default_rng(seed)
    names = "abcd"[: random.integers(1, 5)]
    losses = {name: falling(random, int(random.integers(2, 7))) for name in names}
    costs = []
    for _ in range(random.integers(1, 3)):
        several = {}
        for _ in range(random.integers(1, 4) if together and len(names) > 1 else 0):
            size = min(len(names), int(random.integers(2, 4)))
            own = tuple(sorted(random.choice([*names], size, replace=False).tolist()))
            several[own] = stairs(random, tuple(len(losses[name]) for name in own))
        costs.append(Tables({n: stairs(random, (len(losses[n]),)) for n in names}, several))
    every = every_choice(losses)
    if random.random() < 0.3:
        some = every[random.integers(len(every))]
        return losses, costs, [cost.of(some) for cost in costs]
    ends = [[cost.of(every[i]) for cost in costs] for i in (0, -1)]
    return losses, costs, [a + random.random() * (b - a) for a, b in zip(*ends, strict=True)]


def nothing(losses):
    """Return what HiGHS takes for nothing beside the largest loss."""
    return 1e-12 * max(some[0] for some in losses.values()) + 1e-300


def within(kept, costs, limits):
    pairs = zip(costs, limits, strict=True)
    return all(cost.of(kept) <= limit * (1 + 2e-12) for cost, limit in pairs)


@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
@example(3242, True, False)  # losses of 1e-6 beside one of 4,000
@settings(max_examples=50)
def test_widths_on_stairs_are_those_that_trying_everything_finds(seed, together, falls):
    """Costs add up, or are products of two and three groups; limits are one or two.

    More units may cost less, as odd channels take longer than even ones; the fewest cost least.
    """
    losses, costs, limits = problem(seed, together)
    random = np.random.default_rng(seed)
    for cost in costs if falls else ():
        for table in (*cost.single.values(), *cost.together.values()):
            table[1:] += random.exponential(size=table[1:].shape)
    own = searched(losses, costs)
    best = min(own.loss(kept) for kept in every_choice(losses) if within(kept, costs, limits))
    kept, bound = own.choose(limits)
    assert within(kept, costs, limits)
    assert best * (1 - 1e-12) <= own.loss(kept) <= 1.001 * best + nothing(losses)
    assert bound <= best * (1 + 1e-9)
    for name, count in () if falls else kept.items():  # of widths that lose the same, the least
        assert count == 0 or losses[name][count - 1] > losses[name][count]


@pytest.mark.parametrize("together", [False, True])
def test_what_is_over_a_limit_by_less_than_the_solver_tells_apart_gives_way_to_the_next(together):
    apart, limit = np.array([0.0, 1.0]), 2 - 5e-7
    single = {"a": apart, "b": apart * (not together)}
    costs = Tables(single, {("a", "b"): np.outer(apart, apart)} if together else {})
    losses = {name: np.array([1.0, 0.0]) for name in single}
    own = searched(losses, [costs])
    kept, *_ = own.choose([limit])
    assert costs.of(kept) <= 1
    assert own.loss(kept) == 1


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_where_too_many_widths_multiply_some_are_searched_and_nothing_is_proved(seed):
    losses, costs, limits = problem(seed, together=True)
    own = searched(losses, costs)
    with mock.patch.object(search, "_TOGETHER", 0):
        kept, bound = own.choose(limits)
    assert within(kept, costs, limits)
    assert (bound is None) == any(cost.coupled for cost in costs)
    best = min(own.loss(kept) for kept in every_choice(losses) if within(kept, costs, limits))
    assert own.loss(kept) <= 1.001 * best + nothing(losses)


def test_a_chain_of_wide_groups_is_searched_around_what_was_found():
    """Few widths of each at a time come as near as all of them at once."""
    random = np.random.default_rng(0)
    losses = {name: np.linspace(1, 0, 24) ** random.integers(2, 5) for name in "abcd"}
    widths = np.arange(24.0)
    products = dict.fromkeys([("a", "b"), ("b", "c"), ("c", "d")], np.outer(widths, widths))
    cost = Tables(dict.fromkeys(losses, widths), products)
    own = searched(losses, [cost])
    limit = 0.5 * cost.of(dict.fromkeys(losses, 23))
    exact = own.choose([limit])
    assert own.loss(exact.kept) - exact.bound <= 1e-3 * exact.bound
    with mock.patch.object(search, "_TOGETHER", 300):
        some = own.choose([limit])
    assert some.bound is None
    assert within(some.kept, [cost], [limit])
    assert own.loss(some.kept) <= 1.002 * own.loss(exact.kept)


@pytest.mark.parametrize(
    ("losses", "unit", "limit", "kept"),
    [
        ([[1.0, 5e-324, 0.0]], 2.0, 2.0, [1]),
        ([[1.0, 0.0], [1.0, 0.0], [1.5, 0.0]], 1.0, 2 * (1 - 3e-8), [0, 0, 1]),  # HiGHS takes two
        ([[0.0, 0.0, 0.0]], 1.0, 2.0, [0]),
        ([[3.0, 1.0, 0.0]], 7e9, 7e9, [1]),
        ([[3.0, 1.0, 0.0]], 7e9, 7e9 - 1, [0]),
        ([[3.0, 1.0, 0.0]], 1.0, -1.0, [0]),  # the least, if nothing is within
    ],
)
def test_limits_are_kept_to_the_last_of_billions(losses, unit, limit, kept):
    losses = {str(index): np.array(some) for index, some in enumerate(losses)}
    cost = Tables({name: unit * np.arange(len(some)) for name, some in losses.items()})
    found = searched(losses, [cost]).choose([limit])
    assert [*found.kept.values()] == kept
    assert (found.bound is None) == (limit < 0)


@pytest.mark.parametrize("together", [False, True])
def test_the_frontier_is_about_the_least_loss_at_each_cost(together):
    random = np.random.default_rng(1)
    losses = {name: np.linspace(1, 0, 24) ** 2 * random.random() for name in "abc"}
    widths = np.arange(24.0)
    products = {("a", "b"): np.outer(widths, widths)} if together else {}
    cost = Tables(dict.fromkeys(losses, widths), products)
    own = searched(losses, [cost])
    dense = cost.of(dict.fromkeys(losses, 23))
    costs, lost = map(np.array, zip(*own.frontier(), strict=True))
    assert (np.diff(costs) > 0).all()
    assert (np.diff(lost) <= 0).all()
    assert (costs[0], costs[-1], lost[-1]) == (0, dense, 0)
    assert lost[0] == pytest.approx(sum(some[0] for some in losses.values()))
    for share in (0.3, 0.6, 0.9):
        least = own.loss(own.choose([share * dense]).kept)
        hull = np.interp(share * dense, costs, lost)  # which is lower where costs multiply
        assert (0.5 if together else 0.9) * least <= hull <= 1.1 * least


@pytest.mark.parametrize("closed", [False, True])
def test_what_highs_prints_stays_off_standard_output(capfd, closed):
    original, c, kept = scipy.optimize.milp, ctypes.CDLL(None), os.dup(1)

    def printing(*args, **options):
        c.puts(b"HighsMipSolverData")  # as it does now and then, whatever its options are
        return original(*args, **options)

    table = np.array([0.0, 1.0, 3.0])
    with mock.patch("scipy.optimize.milp", printing):
        if closed:
            os.close(1)
        opened = len(os.listdir("/dev/fd"))
        knapsack = Knapsack([table, table], [np.array([[2.0], [1.0], [0.0]])] * 2)
        assert knapsack._integer(np.array([2.0]), 1.0)[0] is not None
        assert len(os.listdir("/dev/fd")) == opened
    os.dup2(kept, 1)
    os.close(kept)
    c.fflush(None)
    assert "Highs" not in capfd.readouterr().out or closed
