"""Least squares on a support: the one way in which any backend's choice becomes weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.gram import quadratic, quadratic_rounding, solve_definite
from solvers.hessian import half
from solvers.problem import SubsetProblem


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
    weights = []
    for consumer in problem.consumers:
        rows = consumer.support_rows(support)
        fitted = solve_definite(half(consumer.hessian, rows), consumer.G[rows])
        W = torch.zeros_like(consumer.W0)
        W[rows] = fitted
        weights.append(W)
    return tuple(weights), quadratic_loss(problem, weights)


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
