"""The convex heuristic: a penalty on the norm of each unit's weights, raised until k are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from solvers.closed_forms.refit import Incumbent
from solvers.closed_forms.row_blocks import by_unit
from solvers.linalg.descent import accelerated
from solvers.problem import Consumer, SubsetProblem
from solvers.protocol import Backend, BackendKind, Positive, Selection, Status


@dataclass(frozen=True)
class GroupLasso(Backend):
    """Minimize the loss plus a penalty on ``sum_j |W_j|``, and keep the last units to vanish.

    Yuan and Lin, "Model selection and estimation in regression with grouped variables" (JRSS B
    68, 2006): the norm of a unit is taken over its rows in all consumers.  The penalty is bisected
    until as many units are left as stay; each solve starts from the last (accelerated proximal
    gradients with restarts).  The weights that shrinkage has biased are refitted.

    Parameters
    ----------
    bisections
        Penalties to try.
    iterations
        The most gradient steps for each.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "penalty on the norm of each unit, raised until k are left; refit"
    bisections: Positive = 24
    iterations: Positive = 60

    def select(self, problem: SubsetProblem) -> Selection:
        """Bisect the penalty; rank by norm, then by what shrinkage hid, where it jumps past k."""
        terms, n = [_scaled(consumer) for consumer in problem.consumers], problem.units
        # A norm bounds the largest eigenvalue.
        step = 1 / max(float(torch.linalg.matrix_norm(H, 1)) for H, _ in terms)

        def moved(W: Tensor) -> Tensor:
            """Make a gradient step without a penalty; row j has all weights of unit j."""
            parts = torch.split(W, [G.numel() // n for _, G in terms], 1)
            own = ((H, G, part.reshape(G.shape)) for part, (H, G) in zip(parts, terms, strict=True))
            return torch.cat([(W_c - step * (H @ W_c - G)).view(n, -1) for H, G, W_c in own], 1)

        def shrunk(flat: Tensor, penalty: float) -> Tensor:
            W = moved(flat.view(n, -1))
            share = 1 - step * penalty / _norms(W).clamp(min=1e-300)
            return (W * share.clamp(min=0.0)[:, None]).view(1, -1)

        def support(W: Tensor) -> Tensor:
            return (_norms(moved(W)) + _norms(W)).topk(problem.keep).indices

        G = torch.cat([G.view(n, -1) for _, G in terms], 1)
        W = torch.zeros_like(G)
        low, high = 0.0, float(_norms(G).max()) or 1.0  # from which on no unit is left
        best = Incumbent(problem, support(W))
        for _ in range(self.bisections):
            penalty = math.sqrt(max(low, 1e-6 * high) * high)
            descent = partial(shrunk, penalty=penalty)
            W = accelerated(W.view(1, -1), descent, 1.0, self.iterations).view(n, -1)
            best.offer(support(W))
            alive = int((_norms(W) > 0).sum())
            if alive == problem.keep:
                break
            low, high = (penalty, high) if alive > problem.keep else (low, penalty)
        return Selection(
            best.support, Status.FEASIBLE, iterations=self.bisections, history=tuple(best.history)
        )


def _norms(W: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(W, dim=1)
    return norms


def _scaled(consumer: Consumer) -> tuple[Tensor, Tensor]:
    """Return H and G with each unit's inputs scaled to unit power: the penalty treats all alike."""
    H, G = by_unit(consumer)
    n, w = len(consumer.rows), consumer.width
    power = H.diagonal().view(n, w).mean(1).rsqrt().repeat_interleave(w)
    return H * power[:, None] * power, G * power[:, None]
