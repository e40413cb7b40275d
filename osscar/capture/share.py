"""How much of the corrections a target has: what serves samples best that no weight is fitted to.

A correction of earlier errors is fitted to the calibration data, and the more so the fewer there
are: bias against variance.  Refits are linear in the targets, ``W = W_0 + share W_1``, so that the
error on held-out samples, whose targets have the corrections in full, is a parabola in the share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osscar.capture.gram import GramAccumulator, Moments

_LEAST_DAMP = 1e-4
"""Of these refits, so that none is singular: weights of inputs that are hardly seen matter less
here than that there is an answer."""


def best_share(accumulators: Sequence[GramAccumulator], keep: int, damp: float) -> float:
    """Return the share of the corrections whose refit serves the held-out samples best.

    The units kept are those that weights and inputs of the largest norm belong to: the share hardly
    depends on them.

    Parameters
    ----------
    accumulators
        What the consumers of one group read.
    keep
        How many units stay.
    damp
        Weight of the proximal term, as of `osscar.capture.gram.damped_by_input`.

    Returns
    -------
    float
        Between 0 and 1; 0 where nothing was held out, or nothing is to be corrected.
    """
    sizes = _sizes(accumulators)
    slope = curve = 0.0
    for accumulator, rows in zip(accumulators, _kept_rows(accumulators, sizes, keep), strict=True):
        held, W0 = accumulator.held, accumulator.linear_map.read_weight()
        if held is None or held.C is None:
            return 0.0
        base, step = _refits(accumulator.fitted, W0, rows, damp)
        H, size = held.H[rows], sizes[accumulator.linear_map.name]
        missed = H @ W0 + held.C[rows] - H[:, rows] @ base
        slope += float((step * missed).sum()) / size
        curve += float((step * (H[:, rows] @ step)).sum()) / size
    return min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0


def _sizes(accumulators: Sequence[GramAccumulator]) -> dict[str, float]:
    """Return the energy of what each layer puts out, relative to which its error counts."""
    sizes = {accumulator.linear_map.name: 0.0 for accumulator in accumulators}
    if len(sizes) == 1:
        return dict.fromkeys(sizes, 1.0)
    for accumulator in accumulators:
        W0 = accumulator.linear_map.read_weight()
        sizes[accumulator.linear_map.name] += float((W0 * (accumulator.fitted.H @ W0)).sum())
    return {name: size if size > 0 else 1.0 for name, size in sizes.items()}


def _kept_rows(
    accumulators: Sequence[GramAccumulator], sizes: dict[str, float], keep: int
) -> list[Tensor]:
    """Return the rows, (r,) int64, of the units with the largest weights times inputs."""
    units = [accumulator.linear_map.unit_rows for accumulator in accumulators]
    scores = torch.zeros(len(units[0]), dtype=torch.float64)
    for accumulator, owned in zip(accumulators, units, strict=True):
        W0 = accumulator.linear_map.read_weight()
        energies = (W0.square().sum(1) * accumulator.fitted.H.diagonal()).cpu()
        share = energies / sizes[accumulator.linear_map.name]
        scores += torch.stack([share[rows].sum() for rows in owned])
    best = scores.argsort(descending=True, stable=True)[:keep].tolist()
    return [torch.tensor(sorted(row for unit in best for row in owned[unit])) for owned in units]


def _refits(moments: Moments, W0: Tensor, rows: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return the rows of ``W_0`` and ``W_1``: the refit without corrections, and what they add."""
    assert moments.C is not None
    damp = max(damp, _LEAST_DAMP)
    H = moments.H[rows]
    added = damp * H[:, rows].diagonal()
    square = H[:, rows] + torch.where(added > 0, added, 1.0).diag()
    plain = H @ W0 + added[:, None] * W0[rows]
    factor = torch.linalg.cholesky(square)
    both = torch.cholesky_solve(torch.cat([plain, moments.C[rows]], 1), factor)
    return both[:, : W0.shape[1]], both[:, W0.shape[1] :]
