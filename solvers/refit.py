"""Least squares on a support: the one way in which any backend's choice becomes weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.gram import (
    quadratic,
    quadratic_on,
    quadratic_rounding,
    quadratic_rounding_on,
    solve_definite,
)
from solvers.hessian import half
from solvers.problem import Consumer, SubsetProblem


def refit(problem: SubsetProblem, support: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """Return the optimal weights on a support, and their loss.

    Parameters
    ----------
    problem
        The problem.
    support
        The units that stay, (k,) int64.

    Returns
    -------
    weights
        For each consumer, (p, m) float64, zero on the rows of removed units.
    loss
        ``E(S)``, summed over the consumers.
    """
    weights, losses = [], []
    for consumer in problem.consumers:
        rows, fitted = _fitted(consumer, support)
        losses.append(quadratic_on(consumer.hessian, consumer.G, consumer.e, rows, fitted))
        weights.append(torch.zeros_like(consumer.W0).index_copy_(0, rows, fitted))
    return tuple(weights), max(sum(losses), 0.0)


def refit_loss(problem: SubsetProblem, support: Tensor) -> float:
    """Return the loss of the optimal weights on a support: that of `refit`, in less memory.

    Parameters
    ----------
    problem
        The problem.
    support
        The units that stay, (k,) int64.
    """
    losses = [quadratic_on(c.hessian, c.G, c.e, *_fitted(c, support)) for c in problem.consumers]
    return max(sum(losses), 0.0)


def rounded_loss(problem: SubsetProblem, support: Tensor) -> tuple[float, float]:
    """Return what `refit_loss` does, and by how much rounding can have changed it.

    Parameters
    ----------
    problem
        The problem.
    support
        The units that stay, (k,) int64.
    """
    losses, roundings = [], []
    for consumer in problem.consumers:
        terms = (consumer.hessian, consumer.G, consumer.e, *_fitted(consumer, support))
        losses.append(quadratic_on(*terms))
        roundings.append(quadratic_rounding_on(*terms))
    return max(sum(losses), 0.0), sum(roundings)


def _fitted(consumer: Consumer, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a support, (r,) int64, and the optimal weights there, (r, m)."""
    rows = consumer.support_rows(support)
    return rows, solve_definite(half(consumer.hessian, rows), consumer.G[rows])


def quadratic_loss(problem: SubsetProblem, weights: Sequence[Tensor]) -> float:
    """Return ``tr(W'HW) - 2 tr(W'G) + e``, summed over the consumers, for any weights.

    Parameters
    ----------
    problem
        The problem.
    weights
        For each consumer, (p, m) float64.
    """
    pairs = zip(problem.consumers, weights, strict=True)
    # The sum is what is minimized, so rounding below zero is taken from the sum as well.
    return max(sum(quadratic(c.hessian, c.G, c.e, W) for c, W in pairs), 0.0)


def loss_rounding(problem: SubsetProblem, weights: Sequence[Tensor]) -> float:
    """Return by how much rounding can have changed what `quadratic_loss` returns.

    Parameters
    ----------
    problem
        The problem.
    weights
        For each consumer, (p, m) float64.
    """
    pairs = zip(problem.consumers, weights, strict=True)
    return sum(quadratic_rounding(c.hessian, c.G, c.e, W) for c, W in pairs)
