"""Gram matrices of what consumers read, accumulated while the calibration data flow through.

With targets ``Y = X W0 + D`` (see `osscar.capture.targets`) everything that a problem needs follows
from three sums over positions: ``X'X``, ``X'D`` and ``|D|^2``.  All are summed in float64 from the
same tensors, so that the energy of the targets is never less than what the inputs explain.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osscar.capture.linear_maps import LinearMap
from osscar.core.errors import ModelError, NonFiniteError
from solvers import Consumer, SubsetProblem


class GramAccumulator:
    """Sums of one consumer over all positions seen so far, in float64.

    Parameters
    ----------
    linear_map
        The consumer.
    """

    def __init__(self, linear_map: LinearMap) -> None:
        self.linear_map = linear_map
        self.positions = 0
        p = linear_map.rows
        device = next(linear_map.module.parameters()).device
        self._gram = torch.zeros(p, p, dtype=torch.float64, device=device)
        self._cross: Tensor | None = None
        self._energy = 0.0

    def add(self, X: Tensor, D: Tensor | None = None) -> None:
        """Add the products of some positions.

        Parameters
        ----------
        X
            Inputs, (positions, p).
        D
            Corrections of the targets, (positions, m); None where there are none.

        Raises
        ------
        NonFiniteError
            If one has NaN or infinite entries.
        """
        if not X.is_floating_point():
            raise ModelError(
                f"the inputs of {self.linear_map.name!r} are of {X.dtype}; only layers that read "
                "real numbers are refitted"
            )
        if not bool(torch.isfinite(X).all()):
            raise NonFiniteError(
                f"the inputs of {self.linear_map.name!r} have NaN or infinite entries; check the "
                "weights before it, or use --dtype float32"
            )
        X = X.double()
        self._gram.addmm_(X.T, X)
        self.positions += len(X)
        if D is not None:
            self._add_correction(X, D.double())

    def _add_correction(self, X: Tensor, D: Tensor) -> None:
        energy = float(D.square().sum())
        if not math.isfinite(energy):
            raise NonFiniteError(
                f"the outputs of {self.linear_map.name!r} have NaN or infinite entries; check the "
                "weights before it, or use --dtype float32"
            )
        self._energy += energy
        product = X.T @ D
        self._cross = product if self._cross is None else self._cross.add_(product)

    def consumer(self, damp: float) -> Consumer:
        """Return the quadratic terms of the problem to reproduce the targets on these inputs.

        Parameters
        ----------
        damp
            Weight of the proximal term, relative to the mean of the diagonal.

        Raises
        ------
        ModelError
            If the consumer was never called.

        Warns
        -----
        UserWarning
            If there were fewer positions than inputs, so that only the damping makes the problem
            well posed.
        """
        p = self.linear_map.rows
        if not self.positions:
            raise ModelError(
                f"{self.linear_map.name!r} was never called on the calibration data, so that it "
                "cannot be refitted; give inputs that reach it"
            )
        if self.positions < p:
            warnings.warn(
                f"{self.linear_map.name}: {self.positions} calibration positions for {p} inputs; "
                "the Gram matrix is rank-deficient and only damping makes up for it. "
                "Use more samples or larger ones.",
                stacklevel=2,
            )
        H, W0 = self._gram / self.positions, self.linear_map.read_weight()
        return Consumer.from_gram(
            H, W0, **self._targets(H, W0), units=self.linear_map.unit_rows, damp=damp
        )

    def _targets(self, H: Tensor, W0: Tensor) -> dict[str, Any]:
        """Return ``X'Y/N`` and ``|Y|^2/N``; nothing where dense weights alone are the target."""
        if self._cross is None:
            return {}
        cross, G = self._cross / self.positions, H @ W0
        energy = float((W0 * G).sum() + 2 * (W0 * cross).sum()) + self._energy / self.positions
        return {"G": G + cross, "e": energy}


def pose(
    accumulators: Sequence[GramAccumulator], keep: int, name: str, damp: float
) -> SubsetProblem:
    """Return the problem of one group, whose loss is the sum over the layers that read it.

    Where there are several, each layer's loss counts relative to that of removing everything, as
    otherwise the layer with the largest outputs would choose alone.  The refit is the same either
    way.  All groups of a grouped convolution are one layer.

    Parameters
    ----------
    accumulators
        The measured consumers.
    keep
        How many units stay.
    name
        What the problem is called.
    damp
        Weight of the proximal term, relative to the mean of each Gram matrix's diagonal.
    """
    consumers = [accumulator.consumer(damp) for accumulator in accumulators]
    layers = [accumulator.linear_map.name for accumulator in accumulators]
    totals = dict.fromkeys(layers, 0.0)
    for layer, consumer in zip(layers, consumers, strict=True):
        totals[layer] += consumer.e
    if len(totals) > 1:
        consumers = [
            _divided(consumer, totals[layer] or 1.0)
            for layer, consumer in zip(layers, consumers, strict=True)
        ]
    return SubsetProblem(tuple(consumers), keep, name)


def _divided(consumer: Consumer, scale: float) -> Consumer:
    """Return the same least-squares problem with its loss divided by a number."""
    return dataclasses.replace(
        consumer,
        H=consumer.H / scale,
        G=consumer.G / scale,
        e=consumer.e / scale,
        damping=consumer.damping / scale,
    )
