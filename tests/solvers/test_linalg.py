"""Projections, definiteness, and what a large problem takes.

Half matrices in panels are tested where they are used, by `test_closed_forms`.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.measuring import measured
from solvers.bounds.quadratic import is_definite, scaled_diagonal
from solvers.linalg.descent import project
from solvers.linalg.gram import definite_factor, magnitudes, quadratic, unexplained
from tests.solvers.instances import INSTANCES


@pytest.mark.parametrize("name", ["target", "wide_output", "permuted", "nearly_singular"])
def test_what_weights_lose_and_a_factor_explains(name):
    (consumer,) = INSTANCES[name].problem.consumers
    H, G, e, W = consumer.H, consumer.G, consumer.e, consumer.W0.clone()
    terms, best = (consumer.hessian, G, e), torch.linalg.solve(H, G)
    W[::2] = 0
    plain = float((W * (H @ W - 2 * G)).sum()) + e
    size = e + float((W.abs() * (H.abs() @ W.abs() + 2 * G.abs())).sum())
    part = torch.arange(len(H)).flip(0)[W.flip(0).any(1)]
    assert quadratic(*terms, W) == pytest.approx(plain, abs=1e-12 * size)
    assert quadratic(*terms, W[part], part) == pytest.approx(plain, abs=1e-12 * size)
    assert magnitudes(*terms, W) == pytest.approx(size, rel=1e-12)
    exact = float((G * best).sum())
    least, size = unexplained(*terms)
    assert least == pytest.approx(e - exact, abs=1e-10 * size)
    scale, factor = H.diagonal().rsqrt(), definite_factor(consumer.hessian, 1e-9)
    smallest = float(torch.linalg.eigvalsh(scale[:, None] * H * scale)[0])
    assert exact * (1 - 1e-9) <= factor.explains_at_most(G)
    assert factor.explains_at_most(G) <= exact * (1 + 1e-7 + 2e-9 / smallest)
    assert definite_factor(consumer.hessian, 1.0) is None


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


RUN = """
import sys, torch, solvers
backend, p, m = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(p, p, generator=generator).double().mul_(0.02).relu_()
W0 = torch.randn(p, m, generator=generator).double()
H = inputs @ inputs.T
H.diagonal().add_(0.01 * float(H.diagonal().mean()))
del inputs
if backend != "nothing":
    problem = solvers.SubsetProblem.from_gram(H, W0, keep=p // 2, overwrite=True)
    del H, W0
    assert solvers.solve(problem, backend).iterations > 20
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no account of a single process")
@pytest.mark.parametrize("backend", ["local_search", "multistage"])
def test_a_solve_holds_little_beside_its_problem(backend, monkeypatch):
    """In p^2 numbers, G included; with a whole refit beside N, U and K it was above 4.4."""
    # Pieces that are freed go back at once, so that what is counted is what is held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    monkeypatch.setenv("MKL_DISABLE_FAST_MM", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    solved, nothing = (
        measured([sys.executable, "-c", RUN, name, "2048", "2048"]) for name in (backend, "nothing")
    )
    assert solved.status == nothing.status == 0
    assert solved.peak - nothing.peak < 3.6 * 8 * 2048**2
