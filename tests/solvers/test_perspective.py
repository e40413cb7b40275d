"""The root bound: never above the optimum, recomputable, and better than a diagonal of H."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from solvers import (
    Consumer,
    Status,
    SubsetProblem,
    VerificationError,
    solve,
)
from solvers.bounds.quadratic import is_definite, scaled_diagonal
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import EnumerationCertificate
from solvers.linalg.descent import project
from tests.solvers.instances import INSTANCES

SLACK = 1e-12


def random_problem(seed, n, width, responses, keep, *, spread=1.0, damp=0.01, consumers=1):
    """A problem with correlated inputs; the rows of all consumers belong to the same units."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(consumers):
        p = n * width
        mix = torch.eye(p).double() + spread * torch.randn(p, p, generator=generator).double()
        X = torch.randn(2 * p, p, generator=generator).double() @ mix
        W0 = torch.randn(p, responses, generator=generator).double()
        Y = X @ W0 + torch.randn(2 * p, responses, generator=generator).double()
        G, e = X.T @ Y / len(X), float(Y.square().sum()) / len(X)
        parts.append(Consumer.from_gram(X.T @ X / len(X), W0, G=G, e=e, units=n, damp=damp))
    return SubsetProblem(tuple(parts), keep)


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
@settings(max_examples=15, deadline=None)
def test_never_above_enumeration(seed, n, width, responses, share, spread, damp, consumers, rounds):
    keep = 1 + round(share * (n - 2))
    problem = random_problem(
        seed, n, width, responses, keep, spread=spread, damp=damp, consumers=consumers
    )
    optimum = solve(problem, "enumerate").loss
    solution = solve(problem, "perspective", rounds=rounds, steps=40)
    assert solution.lower_bound <= optimum + SLACK * problem.scale
    if solution.certificate is not None:
        assert solution.lower_bound <= solution.certificate.limit(problem) + SLACK * problem.scale
    solution.verify()


@pytest.fixture(scope="module")
def solved():
    return solve(random_problem(1, 10, 2, 6, 5, spread=0.1), "perspective")


def unpacked(certificate):
    n = len(certificate.share)
    correlation = torch.zeros(n, n).double()
    correlation[torch.ones(n, n).tril(-1).bool()] = certificate.correlation.double()
    return correlation + correlation.T


def planted(solved, **changes):
    return replace(solved, certificate=replace(solved.certificate, **changes))


def test_verify_refuses_a_bound_that_the_certificate_does_not_prove(solved):
    between = (solved.lower_bound + solved.loss) / 2
    with pytest.raises(VerificationError, match="certificate proves"):
        replace(solved, lower_bound=between).verify()


def test_verify_refuses_a_diagonal_that_does_not_dominate(solved):
    with pytest.raises(VerificationError, match="does not dominate"):
        planted(solved, q=solved.certificate.q * 0.5).verify()


def test_many_responses_beat_the_classical_diagonal():
    problem = random_problem(3, 24, 1, 60, 12, spread=0.15)
    consumer = problem.consumers[0]
    A = torch.linalg.inv(consumer.H)
    scale = A.diagonal().rsqrt()
    classical = 1 / float(torch.linalg.eigvalsh(A * scale[:, None] * scale)[-1])
    bound = solve(problem, "perspective")
    terms = RemovalTerms.of(problem)
    made = bound.certificate
    correlation = unpacked(made)
    _, Q, _ = terms.aggregate(made.share, made.shape, correlation)
    ours = float((Q.diagonal() / made.q).median())
    assert ours > 1.3 * classical


def test_bound_is_attached_to_heuristics_on_request():
    problem = INSTANCES["blocks"].problem
    assert math.isnan(solve(problem, "greedy").gap)
    solution = solve(problem, "greedy", bound=True)
    assert 0 <= solution.gap <= 1
    assert solution.bound_from
    assert solution.certificate is not None
    solution.verify()
    exact = solve(problem, "enumerate", bound=True)
    assert isinstance(exact.certificate, EnumerationCertificate)
    assert exact.status is Status.OPTIMAL


@given(seed=st.integers(0, 2**31), n=st.integers(2, 30), share=st.floats(0.01, 0.99))
@example(seed=1785817, n=17, share=0.5)  # at a vertex, where the sum is flat but for rounding
@settings(max_examples=40, deadline=None)
def test_projection_is_optimal(seed, n, share):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(2, n, generator=generator).double()
    weight = 0.1 + torch.rand(2, n, generator=generator).double()
    total = min(max(1, round(share * n)), n - 1)
    both = project(target, weight, torch.tensor([1, total]))
    assert both[0].sum() == pytest.approx(1, abs=1e-9)
    target, weight, x = (rows[1].numpy() for rows in (target, weight, both))
    assert x.sum() == pytest.approx(total, abs=1e-9)
    assert ((x >= 0) & (x <= 1)).all()
    force = (target - x) / weight
    inner = (x > 1e-9) & (x < 1 - 1e-9)
    if inner.any():
        tau = force[inner].mean()
        assert force[inner] == pytest.approx(tau, abs=1e-8)
        assert (force[x <= 1e-9] <= tau + 1e-8).all()
        assert (force[x >= 1 - 1e-9] >= tau - 1e-8).all()


def test_definiteness_is_not_claimed_within_rounding():
    Q = torch.ones(40, 40).double()
    q = torch.full((40,), 40.0).double()
    assert not is_definite(q, Q)
    assert is_definite(q * 1.001, Q)
    assert is_definite(scaled_diagonal(Q, torch.ones(40).double()), Q)
