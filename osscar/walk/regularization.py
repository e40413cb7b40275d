"""How far a refit may go: what serves samples best that no weight is fitted to.

A refit has as many free weights as a layer, and calibration data have few tokens that are alike.
What it gains on them is in part noise, and the more so the fewer there are: bias against variance.
Two numbers hold it back: the damping, which pulls weights towards the dense ones, and the
correction weight s: how much of the earlier errors a target makes up for. Refits are linear in the
targets, ``W = W_0 + s W_1``, so that for a given damping the error on held-out samples, whose
targets have the corrections in full, is a parabola in s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from osscar.walk.gram import GramAccumulator, pulls
from osscar.walk.sums import Centred

DAMPS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What is tried; the error is flat around its least."""

DEFAULT_DAMP = 0.3
"""Where no samples are held out."""

_LEAST_DAMP = 1e-4
"""Of these refits, so that none is singular: weights of inputs that are hardly seen matter less
here than that there is an answer."""

_DIRECTIONS = 128
"""Of a layer's outputs that are looked at: random ones keep squared errors on average (Johnson and
Lindenstrauss), and the same ones serve all that is compared."""


def best_regularization(
    accumulators: Sequence[GramAccumulator],
    keep: int,
    damps: Sequence[float] = DAMPS,
    correction_weight: float | None = None,
) -> tuple[float, float]:
    """Return a damping, of those given, and the correction weight: what serves held-out samples.

    The correction weight may be given, too.  Consumers of which nothing was held out have no say.
    The units kept are those of the largest weights times inputs: what is best hardly depends on
    them.  The error of each layer counts relative to the energy of its output.
    """
    read = [(one, one.fitted.centred()) for one in accumulators]
    sizes = {one.linear_map.name: 0.0 for one in accumulators}
    for one, fitted in read if len(sizes) > 1 else ():
        W0 = one.linear_map.read_unit_weight()
        sizes[one.linear_map.name] += float((W0 * fitted.product(W0)).sum())
    sizes = {name: size if size > 0 else 1.0 for name, size in sizes.items()}
    parts = [
        _Part(one, fitted, rows, sizes[one.linear_map.name])
        for (one, fitted), rows in zip(read, _kept_rows(read, sizes, keep), strict=True)
        if one.held_out is not None
    ]
    default = DEFAULT_DAMP if DEFAULT_DAMP in damps else damps[0]
    best, least = (default, correction_weight or 0.0), math.inf
    # The default comes first: where all inputs are zero, no other is better.
    for damp in sorted(damps, key=lambda damp: damp != default):
        terms = [part.errors(damp) for part in parts]
        error, slope, curve = (float(sum(term)) for term in zip(*terms, strict=True))
        chosen = 0.0 if correction_weight is None else correction_weight
        if correction_weight is None and curve > 0:
            chosen = min(max(slope / curve, 0.0), 1.0)
        error += chosen * (chosen * curve - 2 * slope)
        if error < least:
            best, least = (damp, chosen), error
    return best


def _kept_rows(
    read: Sequence[tuple[GramAccumulator, Centred]], sizes: dict[str, float], keep: int
) -> list[Tensor]:
    """Return the rows, (r,) int64: the fixed ones that can change, and those of the units kept."""
    units = [one.linear_map.unit_rows for one, _ in read]
    scores = torch.zeros(len(units[0]), dtype=torch.float64)
    for (one, fitted), owned in zip(read, units, strict=True):
        W0 = one.linear_map.read_unit_weight()
        energies = (W0.square().sum(1) * fitted.diagonal).cpu()
        share = energies / sizes[one.linear_map.name]
        scores += torch.stack([share[rows].sum() for rows in owned])
    best = scores.argsort(descending=True, stable=True)[:keep].tolist()
    found = []
    for (one, _), owned in zip(read, units, strict=True):
        taken = ~one.linear_map.vacant.cpu()
        taken[one.linear_map.fixed :] = False
        taken[[row for unit in best for row in owned[unit]]] = True
        found.append(torch.nonzero(taken).flatten())
    return found


class _Part:
    """One consumer on r rows, its outputs, (m,), seen in q directions; its error is over a size."""

    def __init__(self, one: GramAccumulator, fitted: Centred, rows: Tensor, size: float) -> None:
        assert one.held_out is not None
        held_out, W0 = one.held_out.centred(about=one.fitted), one.linear_map.read_unit_weight()
        m = W0.shape[1]
        if m <= _DIRECTIONS:
            seen = torch.eye(m, dtype=W0.dtype, device=W0.device)
        else:
            drawn = torch.Generator().manual_seed(0)
            seen = torch.randn(m, _DIRECTIONS, generator=drawn, dtype=W0.dtype).to(W0.device)
            seen /= math.sqrt(_DIRECTIONS)
        W0 = W0 @ seen
        corrections, held_out_corrections = fitted.corrections(seen), held_out.corrections(seen)
        energies = fitted.diagonal.masked_fill(one.linear_map.vacant, 0.0)
        held_out_G = held_out.product(W0)
        if held_out_corrections is not None:
            held_out_G += held_out_corrections
        self.H, self.held_out_H, self.size = fitted.part(rows), held_out.part(rows), size
        self.W0, self.plain, self.held_out_G = W0[rows], fitted.product(W0)[rows], held_out_G[rows]
        self.corrections = None if corrections is None else corrections[rows]
        self.pulls = pulls(energies, one.rows, one.linear_map.fixed)[rows]

    def errors(self, damp: float) -> tuple[float, float, float]:
        """Return a, b, c of the held-out error ``a - 2bs + cs^2``, but for a constant."""
        added = max(damp, _LEAST_DAMP) * self.pulls
        factor = self.H.copy()
        factor.add_diagonal(torch.where(added > 0, added, 1.0))
        factor.factorize()
        base = self.plain + added[:, None] * self.W0
        factor.forward(base)
        factor.backward(base)
        seen = self.held_out_H.product(base)
        error = float((base * (seen - 2 * self.held_out_G)).sum())
        if self.corrections is None:
            return error / self.size, 0.0, 0.0
        step = self.corrections.clone()
        factor.forward(step)
        factor.backward(step)
        slope = float((step * (self.held_out_G - seen)).sum())
        curve = float((step * self.held_out_H.product(step)).sum())
        return error / self.size, slope / self.size, curve / self.size
