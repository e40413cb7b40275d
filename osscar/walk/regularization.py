"""How far a refit may go: what serves samples best that no weight is fitted to.

A refit has as many free weights as a layer, and calibration data have few tokens that are alike.
What it gains on them is in part noise, and the more so the fewer there are: bias against variance.
Two numbers hold it back: the damping, which pulls weights towards the dense ones, and the share of
what a target is corrected for earlier errors.  Refits are linear in the targets,
``W = W_0 + share W_1``, so that for a given damping the error on held-out samples, whose targets
have the corrections in full, is a parabola in the share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from osscar.preparation.consumer import LinearMap
from osscar.walk.centred import Centred
from osscar.walk.gram import GramAccumulator, pulls
from solvers.linalg.symmetric import Symmetric

DAMPS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What is tried; the error is flat around its least."""

DEFAULT_DAMP = 0.3
"""Where no samples are held out, and of curves then: what they predict of SmolLM2-135M with it,
0.78 nats at 64 % of its size, is nearest to what was measured, 0.91; with 0.1 it was 0.53."""

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
    share: float | None = None,
) -> tuple[float, float]:
    """Return the damping and the share whose refit serves the held-out samples best.

    The units kept are those that weights and inputs of the largest norm belong to: what is best
    hardly depends on them.

    Parameters
    ----------
    accumulators
        What the consumers of one group read, with held-out samples; those of which none were held
        out have no say.
    keep
        How many units stay.
    damps
        Which to choose from.
    share
        Of the corrections, where that is given.
    """
    layers = [_Layer(a.linear_map, *a.centred(), a.rows) for a in accumulators if not a.unread]
    sizes = _sizes(layers)
    parts = [
        _Part.of(layer, rows, sizes[layer.map.name])
        for layer, rows in zip(layers, _kept_rows(layers, sizes, keep), strict=True)
        if layer.held is not None
    ]
    default = DEFAULT_DAMP if DEFAULT_DAMP in damps else damps[0]
    best, least = (default, share or 0.0), math.inf
    # In this order: where they say nothing, such as of inputs that are always zero, none is better.
    for damp in sorted(damps, key=lambda damp: damp != default):
        terms = [part.errors(damp) for part in parts]
        error, slope, curve = (float(sum(term)) for term in zip(*terms, strict=True))
        if share is None:
            chosen = min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0
        else:
            chosen = share
        error += chosen * (chosen * curve - 2 * slope)
        if error < least:
            best, least = (damp, chosen), error
    return best


@dataclass(frozen=True, eq=False)
class _Layer:
    """A consumer, and what was summed up of it."""

    map: LinearMap
    fitted: Centred
    held: Centred | None
    positions: int


def _sizes(layers: Sequence[_Layer]) -> dict[str, float]:
    """Return the energy of what each layer puts out, relative to which its error counts."""
    sizes = {layer.map.name: 0.0 for layer in layers}
    if len(sizes) == 1:
        return dict.fromkeys(sizes, 1.0)
    for layer in layers:
        W0 = layer.map.read_weight()
        sizes[layer.map.name] += float((W0 * layer.fitted.product(W0)).sum())
    return {name: size if size > 0 else 1.0 for name, size in sizes.items()}


def _kept_rows(layers: Sequence[_Layer], sizes: dict[str, float], keep: int) -> list[Tensor]:
    """Return the rows, (r,) int64, of the units with the largest weights times inputs."""
    units = [layer.map.unit_rows for layer in layers]
    scores = torch.zeros(len(units[0]), dtype=torch.float64)
    for layer, owned in zip(layers, units, strict=True):
        W0 = layer.map.read_weight()
        energies = (W0.square().sum(1) * layer.fitted.diagonal).cpu()
        share = energies / sizes[layer.map.name]
        scores += torch.stack([share[rows].sum() for rows in owned])
    best = scores.argsort(descending=True, stable=True)[:keep].tolist()
    return [torch.tensor(sorted(row for unit in best for row in owned[unit])) for owned in units]


@dataclass(frozen=True, eq=False)
class _Part:
    """One consumer on r rows, its outputs seen in q directions.

    Parameters
    ----------
    H, plain, corrections
        Undamped terms of the refit, (r, r) and (r, q); corrections are None where there are none.
    W0
        Dense weights of these rows, (r, q).
    pulls
        What damping is relative to, (r,).
    held_H, held_G
        The same of the samples that were held out, with their corrections in full.
    size
        What its error is relative to.
    """

    H: Symmetric = field(repr=False)
    plain: Tensor = field(repr=False)
    corrections: Tensor | None = field(repr=False)
    W0: Tensor = field(repr=False)
    pulls: Tensor = field(repr=False)
    held_H: Symmetric = field(repr=False)
    held_G: Tensor = field(repr=False)
    size: float

    @classmethod
    def of(cls, layer: _Layer, rows: Tensor, size: float) -> _Part:
        """Take what concerns these rows."""
        fitted, held, W0 = layer.fitted, layer.held, layer.map.read_weight()
        assert held is not None
        seen = _directions(W0)
        W0 = W0 @ seen
        corrections, held_corrections = fitted.corrections(seen), held.corrections(seen)
        held_G = held.product(W0)
        if held_corrections is not None:
            held_G += held_corrections
        return cls(
            H=fitted.part(rows),
            plain=fitted.product(W0)[rows],
            corrections=None if corrections is None else corrections[rows],
            W0=W0[rows],
            pulls=pulls(fitted.diagonal, layer.positions)[rows],
            held_H=held.part(rows),
            held_G=held_G[rows],
            size=size,
        )

    def errors(self, damp: float) -> tuple[float, float, float]:
        """Return a, b, c of the held-out error ``a - 2 b share + c share^2``, but for a constant.

        Parameters
        ----------
        damp
            Weight of the proximal term.
        """
        added = max(damp, _LEAST_DAMP) * self.pulls
        factor = self.H.copy()
        factor.add_diagonal(torch.where(added > 0, added, 1.0))
        factor.factorize()
        base = self._solved(factor, self.plain + added[:, None] * self.W0)
        seen = self.held_H.product(base)
        error = float((base * (seen - 2 * self.held_G)).sum())
        if self.corrections is None:
            return error / self.size, 0.0, 0.0
        step = self._solved(factor, self.corrections.clone())
        slope = float((step * (self.held_G - seen)).sum())
        curve = float((step * self.held_H.product(step)).sum())
        return error / self.size, slope / self.size, curve / self.size

    @staticmethod
    def _solved(factor: Symmetric, B: Tensor) -> Tensor:
        factor.forward(B)
        factor.backward(B)
        return B


def _directions(W0: Tensor) -> Tensor:
    """Return random directions of the outputs, (m, q); all of them where there are few."""
    m = W0.shape[1]
    if m <= _DIRECTIONS:
        return torch.eye(m, dtype=W0.dtype, device=W0.device)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(m, _DIRECTIONS, generator=generator, dtype=W0.dtype)
    return drawn.to(W0.device) / math.sqrt(_DIRECTIONS)
