"""Moments of removals: what bounds follow from them, and what no bound can exceed."""

from __future__ import annotations

import contextlib
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Consumer, SubsetProblem, VerificationError, refit_loss, solve
from solvers.bounds.perspective import Perspective
from solvers.bounds.quadratic import tighten
from solvers.bounds.relaxation import Effort, Moments, alternate, relax
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import MultiplierCertificate
from tests.solvers.test_perspective import random_problem, unpacked

SLACK = 1e-12


def drawn_moments(problem, seed, supports=40):
    """Mean and covariance of removals at random: moments by their definition."""
    generator = torch.Generator().manual_seed(seed)
    n, r = problem.units, problem.units - problem.keep
    indicators = torch.zeros(supports, n).double()
    favoured = torch.rand(n, generator=generator)
    for row in indicators:
        row[(favoured + 2 * torch.rand(n, generator=generator)).argsort()[:r]] = 1
    indicators = torch.cat([indicators, indicators.roll(1, 1), indicators.roll(2, 1)])
    mean = indicators.mean(0)
    return mean, indicators.T @ indicators / len(indicators) - mean[:, None] * mean, indicators


def certificate_of(mean, covariance, q):
    scale = (mean * (1 - mean)).rsqrt()
    correlation = (covariance * scale[:, None] * scale).float()
    packed = correlation[torch.ones(len(mean), len(mean)).tril(-1).bool()]
    return MultiplierCertificate(mean, torch.ones_like(mean), packed, q, mean)


def plain_limit(problem, mean, second):
    """The limit by its formula, with an inverse, for units of equal width."""
    total = 0.0
    for c in problem.consumers:
        rows = c.rows.flatten()
        A = torch.linalg.inv(c.H)[rows][:, rows]
        W = (torch.linalg.inv(c.H) @ c.G)[rows]
        x = mean.repeat_interleave(c.width)[:, None]
        X = second.repeat_interleave(c.width, 0).repeat_interleave(c.width, 1)
        total += c.e - float((c.G * torch.linalg.solve(c.H, c.G)).sum())
        total += float((x * W * torch.linalg.solve(A * X, x * W)).sum())
    return total


@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 3),
    responses=st.sampled_from([1, 4, 40]),
    consumers=st.integers(1, 2),
)
@settings(max_examples=5, deadline=None)
def test_no_common_multipliers_exceed_the_limit(seed, width, responses, consumers):
    """For moments of removals drawn at random: feasible, whatever the code thinks of them."""
    n, keep = 6, 1 + seed % 4
    problem = random_problem(seed, n, width, responses, keep, spread=0.5, consumers=consumers)
    mean, covariance, indicators = drawn_moments(problem, seed)
    if not float((mean * (1 - mean)).min()) > 0.01:
        return
    covariance = covariance + 1e-6 * torch.eye(n)  # all draws have one sum
    second = covariance + mean[:, None] * mean
    second.diagonal().copy_(mean)
    q = torch.full((n,), 1e9).double()
    scale = (mean * (1 - mean)).rsqrt()
    covariance.diagonal().copy_(mean * (1 - mean))
    shrunk = 1 / (1 + 1e-4 * float(scale.square().max()))
    off = covariance - torch.diag(covariance.diagonal())
    certificate = certificate_of(mean, torch.diag(covariance.diagonal()) + shrunk * off, q)
    limit = certificate.limit(problem)
    second = torch.diag(mean * (1 - mean)) + shrunk * off + mean[:, None] * mean
    assert limit == pytest.approx(plain_limit(problem, mean, second), rel=1e-5)
    for backend in ("perspective", "branch_and_bound"):
        found = solve(problem, backend, options={"node_limit": 1} if backend[0] == "b" else {})
        if backend == "perspective" or isinstance(found.certificate.root, MultiplierCertificate):
            bound = found.lower_bound if backend == "perspective" else 0.0
            assert bound <= limit + SLACK * problem.scale
    # What is lost on average with removals drawn like that is no less: one Y serves all of them.
    losses = [refit_loss(problem, torch.nonzero(row == 0).flatten()) for row in indicators]
    assert sum(losses) / len(losses) >= limit * (1 - 1e-2) - SLACK * problem.scale


def test_the_search_comes_close_to_its_limit():
    problem = random_problem(3, 14, 1, 60, 7, spread=0.15)
    terms, optimum = RemovalTerms.of(problem), solve(problem, "enumerate").loss
    cost = optimum - terms.constant
    apart = relax(terms, Effort(rounds=0))
    values = [relax(terms, Effort(rounds)) for rounds in (4, 40)]
    gaps = [(optimum - found.value) / cost for found in (apart, *values)]
    left = [(found.certificate.limit(problem) - found.value) / cost for found in values]
    assert gaps[0] > gaps[1] > gaps[2] - 1e-9
    assert left[1] < left[0]
    assert left[1] < 0.06


def test_more_than_one_row_and_consumer():
    problem = random_problem(8, 10, 3, 7, 5, spread=0.3, consumers=2)
    apart, together = (solve(problem, "perspective", rounds=rounds) for rounds in (0, 12))
    assert apart.lower_bound < together.lower_bound
    limit = together.certificate.limit(problem)
    mean = together.certificate.share
    scale = (mean * (1 - mean)).sqrt()
    correlation = unpacked(together.certificate) + torch.eye(10)
    second = correlation * scale[:, None] * scale + mean[:, None] * mean
    assert float(torch.linalg.eigvalsh(correlation)[0]) > 0
    assert float(mean.sum()) == pytest.approx(5, abs=1e-12)
    assert limit == pytest.approx(plain_limit(problem, mean, second), rel=1e-9)


def degenerate():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 8, generator=generator).double()
    W0 = torch.randn(8, 3, generator=generator).double()
    twins = X.clone()
    twins[:, 4:] = twins[:, :4]
    silent = X.clone()
    silent[:, :3] = 0
    binary = torch.cat([1e3 * W0[:4], 1e-3 * W0[4:]])
    yield "twins", SubsetProblem.from_gram(twins.T @ twins / 60, W0, keep=4)
    yield "zero columns", SubsetProblem.from_gram(silent.T @ silent / 60, W0, keep=4)
    yield "all that goes is zero", SubsetProblem.from_gram(silent.T @ silent / 60, W0, keep=5)
    yield "nothing to explain", SubsetProblem.from_gram(X.T @ X / 60, 0 * W0, keep=4)
    yield "clear cut", SubsetProblem.from_gram(X.T @ X / 60, binary, keep=4)
    yield "one goes", SubsetProblem.from_gram(X.T @ X / 60, W0, keep=7)
    yield "one stays", SubsetProblem.from_gram(X.T @ X / 60, W0, keep=1)
    yield "two units", SubsetProblem.from_gram(X[:, :2].T @ X[:, :2] / 60, W0[:2], keep=1)
    noise = Consumer.from_gram(X.T @ X / 60, W0, G=torch.zeros(8, 3).double(), e=1.0)
    yield "G = 0", SubsetProblem((noise,), 4)


@pytest.mark.parametrize("name", dict(degenerate()))
@pytest.mark.parametrize("rounds", [0, 1, 8])
def test_degenerate_problems(name, rounds):
    problem = dict(degenerate())[name]
    solution = solve(problem, "perspective", rounds=rounds)
    kept = combinations(range(problem.units), problem.keep)
    optimum = min(refit_loss(problem, torch.tensor(units)) for units in kept)
    assert 0 <= solution.lower_bound <= optimum + SLACK * problem.scale
    assert solution.verify().not_recomputed == ()
    with contextlib.suppress(VerificationError):  # rounded, some are no moments
        assert solution.lower_bound <= solution.certificate.limit(problem) + SLACK * problem.scale


def test_keeping_everything_needs_no_bound():
    problem = random_problem(1, 5, 1, 3, 5)
    solution = solve(problem, "perspective")
    assert solution.certificate is None
    solution.verify()


def test_every_bound_has_a_limit_that_rounds_lower():
    for seed in range(4):
        problem = random_problem(seed, 12, 1, 30, 6, spread=0.2)
        found = [solve(problem, "perspective", rounds=rounds) for rounds in (0, 6, 24)]
        apart, few, many = (solution.certificate.limit(problem) for solution in found)
        assert found[0].lower_bound < many < few < apart


def test_moments_limit_what_a_diagonal_makes_of_any_multipliers():
    """So that the diagonal of the first ones need not be searched for where others do better."""
    for seed in range(4):
        problem = random_problem(seed, 12, 1, 30, 6, spread=0.2)
        terms = RemovalTerms.of(problem)
        first, found = alternate(terms, 50), relax(terms, Effort(6))
        scale = (found.share * (1 - found.share)).sqrt()
        correlation = found.correlation + torch.eye(12)
        most = Moments(found.share, correlation * scale[:, None] * scale).most(first.bound)
        assert tighten(first.bound, 200).value <= most
        assert most <= found.certificate.limit(problem) - terms.constant + SLACK


def test_mixtures_of_moments():
    first = Moments.independent(torch.tensor([0.2, 0.5, 0.8]).double())
    second = Moments(
        torch.tensor([0.5, 0.5, 0.5]).double(),
        torch.tensor([[0.25, 0.1, 0.0], [0.1, 0.25, -0.2], [0.0, -0.2, 0.25]]).double(),
    )
    moments = [m.covariance + m.mean[:, None] * m.mean for m in (first, second)]
    mixed = first.towards(second, 0.3)
    torch.testing.assert_close(
        mixed.covariance + mixed.mean[:, None] * mixed.mean, 0.7 * moments[0] + 0.3 * moments[1]
    )
    torch.testing.assert_close(mixed.covariance.diagonal(), mixed.mean * (1 - mixed.mean))


def test_the_effort_of_a_bound():
    problem = random_problem(3, 16, 1, 20, 8, spread=0.15)
    few, default, many = (
        solve(problem, "greedy", bound=True, **rounds)
        for rounds in ({"bound_rounds": 0}, {}, {"bound_rounds": 30})
    )
    assert few.lower_bound < default.lower_bound <= many.lower_bound
    assert default.lower_bound == solve(problem, "perspective").lower_bound
    assert Perspective().rounds == Effort().rounds


@pytest.mark.sampled(1)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_many_rounds_leave_moments_that_sum_up(n):
    """Each mixture of moments rounds their sum."""
    for seed in range(3):
        problem = random_problem(seed, n, 1, 3, keep=1, spread=0.5)
        solution = solve(problem, "perspective", rounds=60, polish=False)
        assert solution.verify().lower_bound <= solution.loss


def test_rounds_together_are_never_worse_than_none():
    for seed in range(12):
        problem = random_problem(seed, 8, 1, 1, keep=4 + seed % 4, spread=2.0)
        alone, together = (solve(problem, "perspective", rounds=k) for k in (0, 2))
        assert together.lower_bound >= alone.lower_bound * (1 - 1e-12)


def test_rounds_that_end_at_a_cutoff_keep_what_has_reached_it():
    terms = RemovalTerms.of(random_problem(0, 24, 1, 3, 12, spread=0.5))

    def bound(rounds, cutoff):
        found = relax(terms, Effort(rounds, steps=50), cutoff=cutoff)
        return terms.certified(found.bound.value)

    cutoff = (bound(0, torch.inf) + bound(8, torch.inf)) / 2
    assert cutoff < bound(8, cutoff) < bound(8, torch.inf)
