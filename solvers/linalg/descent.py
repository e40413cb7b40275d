"""Accelerated proximal gradients, and the projection on the capped simplex.

Their many operations on few numbers take a tenth of the time in numpy that torch takes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
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
    schemes", Foundations of Computational Mathematics 15, 2015).  It stops where no entry moves by
    `tolerance`.

    start: (b, n), each row a problem of its own.
    metric: Diagonal of the quadratic that `step` majorizes the function with, up to a factor.
    """
    x = y = start.cpu().numpy()
    scale = metric.cpu().numpy() if isinstance(metric, Tensor) else metric
    momentum = np.ones((len(x), 1))
    for _ in range(steps):
        new = step(torch.from_numpy(y).to(start.device)).cpu().numpy()
        change = new - x
        # (y - new) * scale is the gradient that the step followed.
        uphill = ((y - new) * scale * change).sum(1, keepdims=True) > 0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        y = np.where(uphill, new, new + change * ((momentum - 1) / following))
        momentum = np.where(uphill, 1.0, following)
        x = new
        if tolerance and np.abs(change).max() < tolerance:
            break
    return torch.from_numpy(x).to(start.device)


def project(target: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Return the x with the least ``sum (x - target)^2 / weight`` on the capped simplex.

    These are the x, (b, n), with ``0 <= x <= 1`` and ``sum x = total``, (b,), each from 0 to n.
    ``x = clip(target - tau * weight, 0, 1)`` with tau where the entries sum up to `total`: found
    exactly among the breakpoints, at which the sum, piecewise linear in tau, changes its slope.
    """
    # The sum falls from n to 0 in tau, and bends where an entry leaves 1, at (target - 1) / weight,
    # or reaches 0, at target / weight.  With `fell` as far as it has come at each bend, tau lies
    # between the last at which too much is left and the next.
    t, w = target.cpu().numpy(), weight.cpu().numpy()
    n, due = t.shape[1], t.shape[1] - total.cpu().numpy()[:, None]
    zero, rows = t / w, np.arange(len(t))[:, None]
    bends = np.concatenate([zero - 1 / w, zero], 1)
    order = bends.argsort(1)
    bends = bends[rows, order]
    slopes = np.concatenate([w, -w], 1)[rows, order].cumsum(1)
    fell = np.zeros_like(bends)
    np.cumsum((bends[:, 1:] - bends[:, :-1]) * slopes[:, :-1], axis=1, out=fell[:, 1:])
    last = np.minimum(np.maximum((fell < due).sum(1, keepdims=True) - 1, 0), 2 * n - 2)
    before, slope, reached = (a[rows, last] for a in (fell, slopes, bends))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # where the sum is flat
        tau = reached + np.where(slope > 0, (due - before) / slope, 0.0)
    tau = np.minimum(tau, bends[rows, last + 1])  # a flat slope is rounding
    # `clip` takes three times as long.
    return torch.from_numpy(np.minimum(np.maximum(t - tau * w, 0.0), 1.0)).to(target.device)
