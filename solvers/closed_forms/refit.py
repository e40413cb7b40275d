"""Least squares on a support: the one way in which any backend's choice becomes weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from solvers.linalg.gram import (
    quadratic,
    quadratic_on,
    quadratic_rounding,
    quadratic_rounding_on,
    solve_definite,
)
from solvers.linalg.hessian import half
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
    fits = [_weights_and_loss(consumer, support) for consumer in problem.consumers]
    return tuple(W for W, _ in fits), _total(loss for _, loss in fits)


def refit_loss(problem: SubsetProblem, support: Tensor) -> float:
    """Return the loss of the optimal weights on a support: that of `refit`, in less memory.

    Parameters
    ----------
    problem
        The problem.
    support
        The units that stay, (k,) int64.
    """
    return _total(_loss(consumer, support) for consumer in problem.consumers)


def refit_loss_and_rounding(problem: SubsetProblem, support: Tensor) -> tuple[float, float]:
    """Return what `refit_loss` does, and by how much rounding can have changed it.

    Parameters
    ----------
    problem
        The problem.
    support
        The units that stay, (k,) int64.
    """
    found = [_loss_and_rounding(consumer, support) for consumer in problem.consumers]
    return _total(loss for loss, _ in found), sum(rounding for _, rounding in found)


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
    return _total(quadratic(c.hessian, c.G, c.e, W) for c, W in pairs)


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


def _total(losses: Iterable[float]) -> float:
    # The sum is what is minimized, so rounding below zero is taken from the sum as well.
    return max(sum(losses), 0.0)


# ---- one consumer at a time: nothing of it is held while the next is factorized ------------------


def _fitted(consumer: Consumer, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a support, (r,) int64, and the optimal weights there, (r, m)."""
    rows = consumer.support_rows(support)
    return rows, solve_definite(half(consumer.hessian, rows), consumer.G[rows])


def _weights_and_loss(consumer: Consumer, support: Tensor) -> tuple[Tensor, float]:
    rows, fitted = _fitted(consumer, support)
    loss = quadratic_on(consumer.hessian, consumer.G, consumer.e, rows, fitted)
    return torch.zeros_like(consumer.W0).index_copy_(0, rows, fitted), loss


def _loss(consumer: Consumer, support: Tensor) -> float:
    return quadratic_on(consumer.hessian, consumer.G, consumer.e, *_fitted(consumer, support))


def _loss_and_rounding(consumer: Consumer, support: Tensor) -> tuple[float, float]:
    terms = consumer.hessian, consumer.G, consumer.e, *_fitted(consumer, support)
    return quadratic_on(*terms), quadratic_rounding_on(*terms)
