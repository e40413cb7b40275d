"""Conditional windows: their loss is the whole layer's, and searching them improves it."""

from __future__ import annotations

import pytest
import torch

from solvers import ProblemError, Status, refit, solve
from solvers.closed_forms.windows import apply_window, window_problem
from tests.solvers.instances import INSTANCES
from tests.solvers.test_perspective import random_problem

CASES = [
    *("scalar", "target", "wide_output", "blocks", "permuted", "ragged", "two_consumers"),
    *("ragged_consumers", "sparse"),
]


@pytest.mark.parametrize("name", CASES)
def test_window_loss_is_the_loss_of_the_whole(name):
    problem = INSTANCES[name].problem
    support = torch.arange(problem.keep)
    units = torch.tensor([problem.units - 1, 1, 0, problem.keep])
    window = window_problem(problem, support, units)
    assert window.units == 4
    for chosen in torch.combinations(torch.arange(4), window.keep):
        whole = apply_window(support, units, chosen)
        assert len(whole) == problem.keep
        _, loss = refit(problem, whole)
        assert refit(window, chosen)[1] == pytest.approx(loss, rel=1e-9, abs=1e-10)


def test_a_consumer_without_a_row_in_the_window_is_a_constant():
    problem = INSTANCES["sparse"].problem
    support, units = torch.tensor([0, 1, 3]), torch.tensor([0, 4])
    window = window_problem(problem, support, units)
    assert window.consumers[1].H.shape == (1, 1)
    solution = solve(window, "enumerate")
    solution.verify()
    whole = refit(problem, apply_window(support, units, solution.support))[1]
    assert solution.loss == pytest.approx(whole, rel=1e-12)
    solve(problem, "window_search", units=2).verify()


def test_window_of_everything_is_the_problem():
    problem = INSTANCES["scalar"].problem
    window = window_problem(problem, torch.arange(4), torch.arange(9))
    assert window.keep == problem.keep
    torch.testing.assert_close(window.consumers[0].H, problem.consumers[0].H)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "must name units"),
        ([0, 9], "must name units from 0 to 8"),
        ([0, 0], "twice"),
        ([6, 7], "no kept unit"),
    ],
)
def test_bad_windows_are_refused(units, message):
    problem = INSTANCES["scalar"].problem
    with pytest.raises(ProblemError, match=message):
        window_problem(problem, torch.arange(4), torch.tensor(units, dtype=torch.int64))


def test_search_reaches_the_optimum_where_one_window_holds_everything():
    for seed in range(2):
        problem = random_problem(seed, 11, 1, 4, 5, spread=1.0)
        solution = solve(problem, "window_search")
        assert solution.status is Status.WINDOW_OPTIMAL
        assert solution.loss == pytest.approx(solve(problem, "enumerate").loss, rel=2e-5)


def test_search_never_loses_and_can_win():
    gains = []
    for seed in (3, 4):
        problem = random_problem(seed, 30, 1, 3, 15, spread=1.0)
        start = solve(problem, "local_search").loss
        solution = solve(problem, "window_search", units=14, windows=4)
        solution.verify()
        assert list(solution.history) == sorted(solution.history, reverse=True)
        gains.append(start - solution.loss)
    assert min(gains) >= -1e-12
    assert max(gains) > 0


def test_unsolved_windows_claim_nothing():
    problem = random_problem(0, 30, 1, 20, 15, spread=1.0)
    solution = solve(problem, "window_search", units=28, windows=1, time_limit=0.0)
    assert solution.status is Status.FEASIBLE
