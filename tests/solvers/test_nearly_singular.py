"""Problems at the edge of what is well posed: an honest proof is never refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from solvers import Consumer, SubsetProblem, solve
from solvers.gram import DEFINITE_MARGIN


def nearly_singular(seed) -> SubsetProblem:
    """Least scaled eigenvalues from 2 to 200 times the margin, units of one to three rows."""
    draw = np.random.default_rng(seed)
    n, width = draw.integers(3, 13), draw.integers(1, 4)
    p = n * width
    m = draw.choice([1, 4, 2 * p])
    consumers = []
    for _ in range(draw.integers(1, 3)):
        rank = draw.integers(1, p + 1)
        X = draw.normal(size=(3 * p, rank)) @ draw.normal(size=(rank, p))
        X += 10 ** draw.uniform(-6, -2) * draw.normal(size=(3 * p, p))
        H = X.T @ X / len(X)
        scale = 1 / np.sqrt(H.diagonal())
        H = H * scale * scale[:, None]
        least = 2.1 * DEFINITE_MARGIN * 10 ** (2 * draw.uniform() ** 2)
        H += max(least - np.linalg.eigvalsh(H)[0], 0) * np.eye(p)
        W0 = draw.normal(size=(p, m))
        G = draw.choice([0, 1]) * H @ W0 + draw.choice([1e-3, 1]) * draw.normal(size=(p, m))
        e = float((G * np.linalg.solve(H, G)).sum()) * (1 + 10.0 ** -draw.integers(1, 9))
        H, G, W0 = map(torch.from_numpy, (H, G, W0))
        consumers.append(Consumer.from_gram(H, W0, G=G, e=e, units=int(n), damp=0.0))
    return SubsetProblem(tuple(consumers), int(draw.integers(1, n)))


def check(seeds) -> None:
    for seed in seeds:
        problem = nearly_singular(seed)
        for backend in ("branch_and_bound", "perspective", "enumerate"):
            solution = solve(problem, backend)
            assert solution.certificate is not None
            report = solution.verify()
            assert not report.not_recomputed
            assert report.tolerance <= 1e-2 * solution.loss + 1e-9 * problem.scale


@pytest.mark.parametrize("seeds", pairwise(range(0, 31, 10)))
def test_honest_proofs_are_accepted(seeds):
    check(range(*seeds))


@pytest.mark.slow
def test_honest_proofs_are_accepted_thousands_of_times():
    check(range(1000, 4000))
