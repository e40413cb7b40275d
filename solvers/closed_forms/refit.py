"""Least squares on a support: the one way in which any backend's choice becomes weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from solvers.linalg.gram import quadratic, quadratic_rounding, solve_definite
from solvers.problem import Consumer, SubsetProblem


def refit(problem: SubsetProblem, support: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """Return the optimal weights on a support, the units (k,) int64 that stay, and their loss.

    Returns
    -------
    weights
        For each consumer, (p, m) float64, zero on the rows of removed units.
    loss
        ``E(S)``, summed over the consumers.
    """
    weights, losses = [], []
    for consumer in problem.consumers:
        W, rows = _fitted(consumer, support)
        losses.append(quadratic(consumer.hessian, consumer.G, consumer.e, W, rows))
        weights.append(torch.zeros_like(consumer.W0).index_copy_(0, rows, W))
    return tuple(weights), _total(losses)


def refit_loss(problem: SubsetProblem, support: Tensor) -> float:
    """Return the loss of the optimal weights on a support, as `refit` does, in less memory."""
    return _total(quadratic(c.hessian, c.G, c.e, *_fitted(c, support)) for c in problem.consumers)


def refit_loss_and_rounding(problem: SubsetProblem, support: Tensor) -> tuple[float, float]:
    """Return what `refit_loss` does, and by how much rounding can have changed it."""
    losses, rounding = [], 0.0
    for c in problem.consumers:
        terms = c.hessian, c.G, c.e, *_fitted(c, support)
        losses.append(quadratic(*terms))
        rounding += quadratic_rounding(*terms)
        del terms  # nothing of it is held while the next is factorized
    return _total(losses), rounding


def quadratic_loss(problem: SubsetProblem, weights: Sequence[Tensor]) -> float:
    """Return ``tr(W'HW) - 2 tr(W'G) + e`` of any weights, (p, m) float64 each, of all consumers."""
    pairs = zip(problem.consumers, weights, strict=True)
    return _total(quadratic(c.hessian, c.G, c.e, W) for c, W in pairs)


def loss_rounding(problem: SubsetProblem, weights: Sequence[Tensor]) -> float:
    """Return by how much rounding can have changed what `quadratic_loss` returns."""
    pairs = zip(problem.consumers, weights, strict=True)
    return sum(quadratic_rounding(c.hessian, c.G, c.e, W) for c, W in pairs)


def _total(losses: Iterable[float]) -> float:
    # The sum is what is minimized, so rounding below zero is taken from the sum as well.
    return max(sum(losses), 0.0)


def _fitted(consumer: Consumer, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return the optimal weights on the rows of a support, (r, m), and these rows, (r,) int64."""
    rows = consumer.support_rows(support)
    return solve_definite(consumer.hessian.part(rows), consumer.G[rows]), rows


class Incumbent:
    """The best support that was offered, (k,) int64, and how its loss fell."""

    def __init__(self, problem: SubsetProblem, support: Tensor) -> None:
        self.problem = problem
        self.support = support
        self.history = [refit_loss(problem, support)]

    @property
    def loss(self) -> float:
        """Loss of the best support."""
        return self.history[-1]

    def offer(self, support: Tensor) -> bool:
        """Take a support if its refit is better; return whether it is."""
        loss = refit_loss(self.problem, support)
        if not loss < self.loss:
            return False
        self.support = support
        self.history.append(loss)
        return True
