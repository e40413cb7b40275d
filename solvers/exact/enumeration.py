"""Try every support."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, islice
from typing import ClassVar

import torch
from torch import Tensor

from solvers.certificates.certificate import EnumerationCertificate, Inverses
from solvers.closed_forms.refit import refit_loss_and_rounding
from solvers.closed_forms.row_blocks import narrowed
from solvers.problem import Consumer, SubsetProblem
from solvers.protocol import (
    DEFAULT_GAP_TOLERANCE,
    Backend,
    BackendKind,
    Capabilities,
    Selection,
    Status,
)

_EPS = torch.finfo(torch.float64).eps

_BATCH_ELEMENTS = 1 << 22
"""Elements of the Hessian blocks of one batch; bounds the memory."""


@dataclass(frozen=True)
class Enumerate(Backend):
    """Compute the loss of all ``C(n, k)`` supports, in batches, and return the best."""

    kind: ClassVar[BackendKind] = BackendKind.EXACT
    summary: ClassVar[str] = "every support, in batches; the ground truth for small problems"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=16)

    def select(self, problem: SubsetProblem) -> Selection:
        """Return the best support; the first in lexicographic order among equals."""
        best, best_loss, bound = None, math.inf, math.inf
        compact = [(c, c.H, narrowed(c.G)) for c in problem.consumers]
        rows = max((problem.keep * c.width) ** 2 for c in problem.consumers)
        supports = combinations(range(problem.units), problem.keep)
        while batch := list(islice(supports, max(1, _BATCH_ELEMENTS // rows))):
            chosen = torch.tensor(batch, dtype=torch.int64, device=problem.device)
            parts = [_explained(*terms, chosen) for terms in compact]
            explained = torch.stack([part for part, _ in parts]).sum(0)
            rounding = torch.stack([part for _, part in parts]).sum(0)
            index = int(explained.argmax())
            loss = problem.empty_loss - float(explained[index])
            bound = min(bound, problem.empty_loss - float((explained + rounding).max()))
            if loss < best_loss:
                best, best_loss = chosen[index], loss
        assert best is not None
        # What is left of it where it is computed from the inverse of H, as in its check.
        inverses = Inverses.of(problem)
        cost = torch.tensor(bound - inverses.constant, dtype=torch.float64)
        checkable = float(inverses.rounding.twice.certified(inverses.constant, cost))
        bound = max(min(bound, checkable), 0.0)
        refitted, rounded = refit_loss_and_rounding(problem, best)
        # Near a singular H what rounding can have done to some loss may exceed the tolerance.
        slack = DEFAULT_GAP_TOLERANCE * refitted + rounded
        return Selection(
            best,
            Status.OPTIMAL if refitted - bound <= slack else Status.PRECISION_LIMIT,
            lower_bound=min(bound, refitted),
            bound_from="enumeration of all supports",
            iterations=math.comb(problem.units, problem.keep),
            history=(best_loss,),
            certificate=EnumerationCertificate(),
        )


def _explained(
    consumer: Consumer, whole: Tensor, G: Tensor, supports: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``tr(G_S' inv(H_SS) G_S)`` for a batch of supports, and its rounding; (b, k) -> (b,).

    Computed factors are those of a matrix whose entries differ from those of H by a few times
    ``p eps sqrt(H_ii H_jj)`` (Higham, "Accuracy and Stability of Numerical Algorithms", 2002,
    theorem 10.3), which changes the trace by ``W'(difference)W``; a rotated G differs likewise, by
    a share of its rows.
    """
    rows = consumer.rows[supports].flatten(1)
    G_S = G[rows]
    factor = torch.linalg.cholesky(whole[rows[:, :, None], rows[:, None, :]])
    half: Tensor = torch.linalg.solve_triangular(factor, G_S, upper=False)
    W = torch.linalg.solve_triangular(factor.mT, half, upper=True).norm(dim=2)
    size = (
        (whole.diagonal()[rows].sqrt() * W).sum(1).square()
        + 2 * (W * G_S.norm(dim=2)).sum(1)
        + consumer.e
    )
    roundings = 4 * _EPS * (rows.shape[1] + consumer.G.shape[1])
    return half.square().sum(2).sum(1), roundings * size
