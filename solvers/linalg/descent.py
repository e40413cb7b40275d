"""Accelerated proximal gradients, and the projection on the capped simplex."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accelerated(
    start: Tensor,
    step: Callable[[Tensor], Tensor],
    metric: Tensor | float,
    steps: int,
    tolerance: float = 0.0,
) -> Tensor:
    """Return the point that proximal gradient steps with momentum come to.

    FISTA (Beck and Teboulle, SIAM Journal on Imaging Sciences 2, 2009), whose momentum starts anew
    where it points uphill (O'Donoghue and Candes, "Adaptive restart for accelerated gradient
    schemes", Foundations of Computational Mathematics 15, 2015).

    start: (b, n), each row a problem of its own.
    step: Makes one proximal gradient step from a point, (b, n).
    metric: Diagonal of the quadratic that `step` majorizes the function with, up to a factor.
    steps: The most steps.
    tolerance: Stop when a step moves no entry by this much.
    """
    x = y = start
    momentum = torch.ones_like(start[:, :1])
    for _ in range(steps):
        new = step(y)
        change = new - x
        # (y - new) * metric is the gradient that the step followed.
        uphill = ((y - new).mul_(metric) * change).sum(1, keepdim=True) > 0
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        y = torch.where(uphill, new, new + change * ((momentum - 1) / following))
        momentum = torch.where(uphill, 1.0, following)
        x = new
        if tolerance and float(change.abs_().max()) < tolerance:
            break
    return x


def project(target: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Return the x with the least ``sum (x - target)^2 / weight`` on the capped simplex.

    These are the x with ``0 <= x <= 1`` and ``sum x = total``.

    ``x = clip(target - tau * weight, 0, 1)`` with tau where the entries sum up to `total`: found
    exactly among the breakpoints, at which the sum, piecewise linear in tau, changes its slope.

    target, weight: (b, n), each row a problem of its own; weights are positive.
    total: (b,), each from 0 to n.
    """
    # The sum falls from n to 0 in tau, and bends where an entry leaves 1, at (target - 1) / weight,
    # or reaches 0, at target / weight.  With `fell` as far as it has come at each bend, tau lies
    # between the last at which too much is left and the next.
    n, due = target.shape[1], target.shape[1] - total[:, None]
    zero = target / weight
    bends = torch.cat([zero - 1 / weight, zero], 1)
    bends, order = bends.sort(1)
    slopes = torch.cat([weight, -weight], 1).gather(1, order).cumsum(1)
    fell = torch.nn.functional.pad(bends.diff(dim=1).mul_(slopes[:, :-1]).cumsum(1), (1, 0))
    last = ((fell < due).sum(1, keepdim=True) - 1).clamp(0, 2 * n - 2)
    slope = slopes.gather(1, last)
    step = (due - fell.gather(1, last)) / slope
    tau = bends.gather(1, last) + torch.where(slope > 0, step, 0.0)
    return (target - tau * weight).clamp(0.0, 1.0)
