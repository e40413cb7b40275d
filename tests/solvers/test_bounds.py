"""Root bounds: never above the optimum, recomputable, and below what no bound can exceed."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Consumer, Status, SubsetProblem, VerificationError, refit_loss, solve
from solvers.bounds.relaxation import Effort, relax
from solvers.bounds.removal import RemovalTerms
from solvers.bounds.root import Perspective
from solvers.certificates.certificate import EnumerationCertificate, MultiplierCertificate
from tests.solvers.instances import random_problem

SLACK = 1e-12


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 9),
    width=st.integers(1, 3),
    responses=st.sampled_from([1, 3, 40]),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    damp=st.sampled_from([1e-9, 1e-2, 1.0]),
    consumers=st.integers(1, 2),
    rounds=st.integers(0, 4),
)
@settings(max_examples=10, deadline=None)
def test_never_above_enumeration(seed, n, width, responses, share, spread, damp, consumers, rounds):
    options = {"spread": spread, "damp": damp, "consumers": consumers}
    problem = random_problem(seed, n, width, responses, 1 + round(share * (n - 1)), **options)
    solution = solve(problem, "perspective", rounds=rounds, steps=40)
    assert solution.lower_bound <= solve(problem, "enumerate").loss + SLACK * problem.scale
    if solution.certificate is not None:
        assert solution.lower_bound <= solution.certificate.limit(problem) + SLACK * problem.scale
    solution.verify()


def test_bound_is_attached_to_heuristics_on_request():
    problem = random_problem(3, 12, 1, 20, 6, spread=0.15)
    assert math.isnan(solve(problem, "greedy").gap)
    few, default, many = (
        solve(problem, "greedy", bound=True, **rounds)
        for rounds in ({"bound_rounds": 0}, {}, {"bound_rounds": 30})
    )
    assert few.lower_bound < default.lower_bound <= many.lower_bound
    assert default.lower_bound == solve(problem, "perspective").lower_bound
    assert Perspective().rounds == Effort().rounds
    assert 0 <= default.gap <= 1
    assert default.bound_from
    default.verify()
    exact = solve(problem, "enumerate", bound=True)
    assert isinstance(exact.certificate, EnumerationCertificate)
    assert exact.status is Status.OPTIMAL


def test_a_bound_that_the_certificate_does_not_prove_is_refused():
    solved = solve(random_problem(1, 10, 2, 6, 5, spread=0.1), "perspective")
    between = (solved.lower_bound + solved.loss) / 2
    halved = replace(solved.certificate, q=solved.certificate.q * 0.5)
    for changes, message in [
        ({"lower_bound": between}, "certificate proves"),
        ({"certificate": halved}, "does not dominate"),
    ]:
        with pytest.raises(VerificationError, match=message):
            replace(solved, **changes).verify()


# ---- moments of removals, and what no bound can exceed -------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 1, 2), (3, 40, 1)])
def test_no_common_multipliers_exceed_the_limit(shape):
    """For moments of removals drawn at random: feasible, whatever the code thinks of them."""
    width, responses, consumers = shape
    problem = random_problem(7, 6, width, responses, 3, spread=0.5, consumers=consumers)
    generator = torch.Generator().manual_seed(7)
    indicators, favoured = torch.zeros(40, 6).double(), torch.rand(6, generator=generator)
    for row in indicators:
        row[(favoured + 2 * torch.rand(6, generator=generator)).argsort()[:3]] = 1
    indicators = torch.cat([indicators, indicators.roll(1, 1), indicators.roll(2, 1)])
    mean = indicators.mean(0)
    variance = mean * (1 - mean)
    covariance = indicators.T @ indicators / len(indicators) - mean[:, None] * mean
    # All draws have one sum, which leaves the covariance singular.
    correlation = covariance / (1 + 1e-4 / float(variance.min())) * variance.rsqrt()
    packed = (correlation * variance.rsqrt()[:, None])[torch.ones(6, 6).tril(-1).bool()].float()
    q = torch.full((6,), 1e9).double()
    certificate = MultiplierCertificate(mean, torch.ones_like(mean), packed, q, mean)
    limit = certificate.limit(problem)
    found = solve(problem, "perspective").lower_bound
    assert found <= limit + SLACK * problem.scale
    # What is lost on average with removals drawn like that is no less: one Y serves all of them.
    losses = [refit_loss(problem, torch.nonzero(row == 0).flatten()) for row in indicators]
    assert sum(losses) / len(losses) >= limit * (1 - 1e-2) - SLACK * problem.scale


def test_the_search_comes_close_to_its_limit():
    problem = random_problem(3, 12, 1, 60, 6, spread=0.15)
    terms, optimum = RemovalTerms.of(problem), solve(problem, "enumerate").loss
    cost = optimum - terms.constant
    found = [relax(terms, Effort(rounds)) for rounds in (0, 4, 24)]
    gaps = [(optimum - one.value) / cost for one in found]
    limits = [one.certificate.limit(problem) for one in found]
    left = [(limit - one.value) / cost for limit, one in zip(limits, found, strict=True)]
    assert gaps[0] > gaps[1] > gaps[2] - 1e-9
    # Every bound has a limit that rounds lower.
    assert found[0].value < limits[2] < limits[1] < limits[0]
    assert 0.1 > left[2] < left[1]


def degenerate():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 8, generator=generator).double()
    W0 = torch.randn(8, 3, generator=generator).double()
    twins, silent = X.clone(), X.clone()
    twins[:, 4:], silent[:, :3] = twins[:, :4], 0
    binary = torch.cat([1e3 * W0[:4], 1e-3 * W0[4:]])
    noise = Consumer.from_gram(X.T @ X / 60, W0, G=torch.zeros(8, 3).double(), e=1.0)
    of = SubsetProblem.from_gram
    return {
        "twins": of(twins.T @ twins / 60, W0, keep=4),
        "zero columns": of(silent.T @ silent / 60, W0, keep=4),
        "all that goes is zero": of(silent.T @ silent / 60, W0, keep=5),
        "nothing to explain": of(X.T @ X / 60, 0 * W0, keep=4),
        "clear cut": of(X.T @ X / 60, binary, keep=4),
        "one goes": of(X.T @ X / 60, W0, keep=7),
        "one stays": of(X.T @ X / 60, W0, keep=1),
        "two units": of(X[:, :2].T @ X[:, :2] / 60, W0[:2], keep=1),
        "G = 0": SubsetProblem((noise,), 4),
        # Each mixture of moments rounds their sum.
        "many rounds": random_problem(0, 3, 1, 3, keep=1, spread=0.5),
    }


@pytest.mark.parametrize(("name", "problem"), degenerate().items())
def test_degenerate_problems(name, problem):
    kept = combinations(range(problem.units), problem.keep)
    optimum = min(refit_loss(problem, torch.tensor(units)) for units in kept)
    for rounds in (0, 1, 60 if name == "many rounds" else 8):
        solution = solve(problem, "perspective", rounds=rounds)
        assert 0 <= solution.lower_bound <= optimum + SLACK * problem.scale
        assert solution.verify().not_recomputed == ()
        with contextlib.suppress(VerificationError):  # rounded, some are no moments
            limit = solution.certificate.limit(problem)
            assert solution.lower_bound <= limit + SLACK * problem.scale


def test_rounds_that_end_at_a_cutoff_keep_what_has_reached_it():
    terms = RemovalTerms.of(random_problem(0, 24, 1, 3, 12, spread=0.5))

    def bound(rounds, cutoff):
        found = relax(terms, Effort(rounds, steps=50), cutoff=cutoff)
        return terms.certified(found.bound.value)

    whole = bound(8, torch.inf)
    cutoff = (bound(0, torch.inf) + whole) / 2
    assert cutoff < bound(8, cutoff) < whole
