"""Problems at the edge of what is well posed: an honest proof is never refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from solvers import Consumer, Status, SubsetProblem, VerificationError, solve
from solvers.closed_forms.pivot import PivotState
from solvers.closed_forms.row_blocks import by_unit
from solvers.linalg.gram import DEFINITE_MARGIN
from tests.solvers.instances import explained


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


def check(seed, *, beyond=False) -> None:
    """What a search claims is what its check proves, and not by the grace of a tolerance."""
    problem = nearly_singular(seed)
    for backend in ("branch_and_bound", "perspective", "enumerate"):
        solution = solve(problem, backend)
        report = solution.verify()
        assert not report.not_recomputed
        assert report.tolerance <= 1e-2 * solution.loss + 1e-9 * problem.scale
        assert solution.lower_bound <= report.lower_bound + 1e-14 * problem.scale
        if beyond and backend != "enumerate":
            # A claim that exceeds the proof by what rounding can have done is refused.
            above = replace(solution, lower_bound=report.lower_bound + 1e-8 * solution.loss)
            with pytest.raises(VerificationError, match="its certificate proves"):
                above.verify()


def test_honest_proofs_are_accepted():
    for seed in (96, 140, 218):
        check(seed, beyond=True)


@pytest.mark.slow
def test_honest_proofs_are_accepted_a_hundred_times():
    for seed in range(1000, 1100):
        check(seed)


def test_local_search_needs_no_more_than_a_problem_that_is_well_posed():
    """Schur complements that round as the inverse does had negative eigenvalues, in these."""
    for seed in (217, 824, 1165, *range(8)):
        solution = solve(nearly_singular(seed), "local_search")
        assert solution.status in (Status.SWAP_OPTIMAL, Status.PRECISION_LIMIT)
        assert not solution.verify().not_recomputed


def test_schur_complements_round_as_H_does():
    """What is left of a removed row near a singular H, next to the same in fractions."""
    for problem in map(nearly_singular, (217, 824, 1165)):
        state = PivotState.on_support(problem, solve(problem, "greedy").support)
        for part, consumer in zip(state.consumers, problem.consumers, strict=True):
            H, inside = by_unit(consumer)[0], part.kept.repeat_interleave(part.width)
            kept, gone = torch.nonzero(inside).flatten(), torch.nonzero(~inside).flatten()
            N = part.N_blocks.diagonal(dim1=1, dim2=2).flatten()
            for row in gone[:2].tolist():
                own = float(H[row, row])
                left = Fraction(own) - explained(H[kept][:, kept], H[kept, row][:, None])
                assert abs(float(Fraction(float(N[row])) - left)) <= 1e-14 * own
