"""Rows that stay, eliminated before the problem is posed, against the whole problem."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from solvers import Consumer, ProblemError, SubsetProblem, VerificationError, refit, solve
from solvers.closed_forms.fixed_rows import eliminate_fixed
from solvers.linalg import symmetric
from solvers.linalg.symmetric import Symmetric

UNITS = [[0, 3], [1], [2, 4, 5], [6], [7]]
FIXED, M = 5, 3


def whole(seed=0, corrected=True):
    """Terms of least squares whose first rows stay: damped H, G, e, dense weights."""
    generator = torch.Generator().manual_seed(seed)
    p = FIXED + sum(map(len, UNITS))
    X = torch.randn(60, p, generator=generator, dtype=torch.float64)
    X[:, FIXED + 1] += 2 * X[:, 0]  # a unit that the fixed rows know much of
    X[:, 2] = 0  # and a fixed row that says nothing
    W0 = torch.randn(p, M, generator=generator, dtype=torch.float64)
    Y = X @ W0
    if corrected:
        Y = Y + torch.randn(60, M, generator=generator, dtype=torch.float64)
    added = 0.01 * (X.square().mean(0) + 1e-3)
    H = X.T @ X / 60 + torch.diag(added)
    e = float(Y.square().sum()) / 60 + float((added[:, None] * W0.square()).sum())
    return H, X.T @ Y / 60 + added[:, None] * W0, e, W0


def eliminated(H, G, e, W0, keep=2):
    matrix = Symmetric.zeros(len(H), H, cut=FIXED)
    for start, panel in matrix.spans():
        panel.copy_(H[start : start + len(panel), : start + len(panel)])
    rows, rest, own, least = eliminate_fixed(matrix, G.clone(), e, FIXED)
    consumer = Consumer.from_gram(rest, W0[FIXED:], G=own, e=least, units=UNITS, damp=0.0, scale=e)
    return rows, SubsetProblem((consumer,), keep)


def supports():
    for size in range(len(UNITS) + 1):
        yield from itertools.combinations(range(len(UNITS)), size)


@pytest.mark.parametrize("panel_rows", [2, 4, 256])
@pytest.mark.parametrize("corrected", [False, True])
def test_every_support_loses_what_it_does_with_the_fixed_rows_refitted(
    monkeypatch, panel_rows, corrected
):
    monkeypatch.setattr(symmetric, "PANEL_ROWS", panel_rows)
    H, G, e, W0 = whole(corrected=corrected)
    rows, problem = eliminated(H, G, e, W0)
    for support in supports():
        stay = [*range(FIXED), *(FIXED + row for unit in support for row in UNITS[unit])]
        exact = torch.zeros_like(G)
        exact[stay] = torch.linalg.solve(H[stay][:, stay], G[stay])
        least = float((exact * (H @ exact - 2 * G)).sum()) + e
        (W,), loss = refit(problem, torch.tensor(support, dtype=torch.int64))
        assert loss == pytest.approx(least, rel=1e-9, abs=1e-9 * e)
        torch.testing.assert_close(torch.cat([rows.refit(W), W]), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["local_search", "branch_and_bound"])
def test_a_solution_of_the_smaller_problem_is_proved_and_relative_to_the_whole(backend, tmp_path):
    H, G, e, W0 = whole()
    _, problem = eliminated(H, G, e, W0)
    assert problem.scale == e > problem.empty_loss
    solution = solve(problem, backend, bound=True)
    verified = solution.verify()
    assert solution.relative_loss == pytest.approx(verified.loss / e)
    best = min(
        refit(problem, torch.tensor(support))[1] for support in supports() if len(support) == 2
    )
    assert solution.loss == pytest.approx(best)
    problem.save(tmp_path / "problem.safetensors")
    again = SubsetProblem.load(tmp_path / "problem.safetensors")
    assert (again.scale, again.empty_loss) == (problem.scale, problem.empty_loss)
    assert solve(again, backend, bound=True).verify().loss == pytest.approx(best)
    (divided,) = (consumer.divided(e) for consumer in problem.consumers)
    assert divided.scale == 1.0
    assert divided.to("cpu").scale == 1.0


def test_losses_are_relative_to_nothing_that_they_exceed():
    _, problem = eliminated(*whole())
    (consumer,) = problem.consumers
    for scale in (consumer.e / 2, float("nan"), float("inf"), -1.0):
        with pytest.raises(ProblemError, match=r"scale is .*; it must be finite, and no less"):
            replace(consumer, scale=scale)
    with pytest.raises(ProblemError, match="scale"):
        replace(consumer, scale="1")


def test_a_scale_that_somebody_made_up_proves_no_bound():
    H, G, e, W0 = whole()
    _, problem = eliminated(H, G, e, W0)
    huge = replace(problem.consumers[0], scale=1e30)
    solution = solve(replace(problem, consumers=(huge,)), "branch_and_bound", bound=True)
    with pytest.raises(VerificationError, match="bound"):
        replace(solution, lower_bound=solution.loss * 1.5).verify()
