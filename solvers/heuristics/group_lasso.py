"""The convex heuristic: a penalty on the norm of each unit's weights, raised until k are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
        path = _Path(problem)
        low, high = 0.0, path.largest_penalty()
        best = Incumbent(problem, path.ranking().topk(problem.keep).indices)
        for _ in range(self.bisections):
            penalty = math.sqrt(max(low, 1e-6 * high) * high)
            path.descend(penalty, self.iterations)
            best.offer(path.ranking().topk(problem.keep).indices)
            alive = int((path.norms() > 0).sum())
            if alive == problem.keep:
                break
            low, high = (penalty, high) if alive > problem.keep else (low, penalty)
        return Selection(
            best.support, Status.FEASIBLE, iterations=self.bisections, history=tuple(best.history)
        )


class _Path:
    """Weights of all consumers, shrunk together."""

    def __init__(self, problem: SubsetProblem) -> None:
        self._terms = [_scaled(consumer) for consumer in problem.consumers]
        self._widths = [consumer.width for consumer in problem.consumers]
        self._units = problem.units
        self._weights = [torch.zeros_like(G) for _, G in self._terms]
        # A norm bounds the largest eigenvalue.
        self._step = 1 / max(float(torch.linalg.matrix_norm(H, 1)) for H, _ in self._terms)

    def largest_penalty(self) -> float:
        """Return the penalty from which on no unit is left."""
        return float(self._unit_norms([G for _, G in self._terms]).max()) or 1.0

    def norms(self) -> Tensor:
        """Return the norm of each unit's weights, (n,)."""
        return self._unit_norms(self._weights)

    def ranking(self) -> Tensor:
        """Return scores, (n,): the norm after one more unpenalized step."""
        return self._unit_norms(self._moved(self._weights)) + self.norms()

    def descend(self, penalty: float, iterations: int) -> None:
        """Minimize with this penalty, from where the last one ended."""

        def step(point: Tensor) -> Tensor:
            moved = self._moved(self._split(point))
            norms = self._unit_norms(moved).clamp(min=1e-300)
            shrink = (1 - self._step * penalty / norms).clamp(min=0.0)
            parts = zip(moved, self._widths, strict=True)
            return _joined([W * shrink.repeat_interleave(w)[:, None] for W, w in parts])

        self._weights = self._split(accelerated(_joined(self._weights), step, 1.0, iterations))

    def _moved(self, weights: list[Tensor]) -> list[Tensor]:
        """Return the weights after a gradient step without a penalty."""
        terms = zip(weights, self._terms, strict=True)
        return [W - self._step * (H @ W - G) for W, (H, G) in terms]

    def _split(self, point: Tensor) -> list[Tensor]:
        sizes = [G.numel() for _, G in self._terms]
        parts = zip(torch.split(point[0], sizes), self._terms, strict=True)
        return [part.view_as(G) for part, (_, G) in parts]

    def _unit_norms(self, matrices: list[Tensor]) -> Tensor:
        squares = [
            M.square().sum(1).view(self._units, w).sum(1)
            for M, w in zip(matrices, self._widths, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt()


def _joined(weights: list[Tensor]) -> Tensor:
    """Return the entries of all matrices in one row."""
    return torch.cat([W.flatten() for W in weights])[None]


def _scaled(consumer: Consumer) -> tuple[Tensor, Tensor]:
    """Return H and G with each unit's inputs scaled to unit power: the penalty treats all alike."""
    H, G = by_unit(consumer)
    n, w = len(consumer.rows), consumer.width
    power = H.diagonal().view(n, w).mean(1).rsqrt().repeat_interleave(w)
    return H * power[:, None] * power, G * power[:, None]
