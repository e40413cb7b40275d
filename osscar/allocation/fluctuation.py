"""How much the inputs of each unit fluctuate in the dense model: scores that all layers share.

The allocation AL-AM of An et al., "Fluctuation-based adaptive structured pruning for large language
models" (FLAP), AAAI 2024, arXiv 2312.11983.  An input's score is its variance times the squared
norm of the dense weights that read it, standardized over the inputs of its layer; a unit's score is
the mean over its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graph import CouplingGroup
from osscar.base.errors import ModelError, NonFiniteError
from osscar.base.progress import stage
from osscar.network.modules import device_of, forward
from osscar.preparation.consumer import LinearMap, without_idle
from osscar.preparation.failures import batch_named
from osscar.preparation.prepare import Prepared
from osscar.preparation.routing import afresh, reads

_ROUNDING = 1e-12
"""Of scores: what sums over all of them lose."""


@torch.no_grad()
def measure_fluctuations(
    prepared: Prepared, groups: Sequence[CouplingGroup]
) -> dict[str, NDArray[np.float64]]:
    """Run the dense model, and return the standardized score of each unit, (units,), by group.

    Where several consumers read a group, each standardizes what it reads of that, and all count
    alike.

    Raises
    ------
    DataError, ModelError, NonFiniteError
        If a batch fails, a consumer is never called, or reads what is not finite.
    """
    found = {g.name: [_Inputs.of(one) for one in prepared.linear_maps(g)] for g in groups}
    _run(prepared, [inputs for several in found.values() for inputs in several])
    return {
        name: torch.stack([inputs.unit_scores() for inputs in without_idle(several)])
        .mean(0)
        .numpy()
        for name, several in found.items()
    }


def standardized(scores: Tensor) -> Tensor:
    """Return scores less their mean, over their standard deviation; zeros where all are equal."""
    deviation = scores.std(correction=0)
    centred = scores - scores.mean()
    differ = deviation > _ROUNDING * scores.abs().amax()  # the mean of equal ones may be another
    return centred / deviation if differ else torch.zeros_like(scores)


@dataclass(eq=False)
class _Inputs:
    """Mean and sum of squared deviations of what one consumer reads, (p,), summed up stably.

    Batches are merged as in Chan, Golub and LeVeque, "Algorithms for computing the sample
    variance", The American Statistician 37(3), 1983.
    """

    linear_map: LinearMap
    mean: Tensor = field(repr=False)
    deviations: Tensor = field(repr=False)
    rows: int = 0

    @classmethod
    def of(cls, linear_map: LinearMap) -> _Inputs:
        """Start with nothing."""
        nothing = torch.zeros(
            linear_map.rows, dtype=torch.float64, device=device_of(linear_map.module)
        )
        return cls(linear_map, nothing, nothing.clone())

    def add(self, x: Any) -> None:
        """Add one call of the module."""
        for X in map(Tensor.double, self.linear_map.read_inputs(x)):
            if not bool(torch.isfinite(X).all()):
                raise NonFiniteError(
                    f"the inputs of {self.linear_map.label!r} have NaN or infinite entries; check "
                    "the weights before it, or use --dtype float32"
                )
            before, self.rows = self.rows, self.rows + len(X)
            if not len(X):
                continue
            mean = X.mean(0)
            step = mean - self.mean
            self.mean = self.mean + step * (len(X) / self.rows)
            between = step.square() * (before * len(X) / self.rows)
            self.deviations = self.deviations + (X - mean).square().sum(0) + between

    def unit_scores(self) -> Tensor:
        """Return the mean of the standardized scores of each unit's inputs, (units,)."""
        if not self.rows:
            raise ModelError(
                f"{self.linear_map.name!r} was never called on the calibration data, so that "
                "nothing is known of its inputs; give inputs that reach it"
            )
        norms = self.linear_map.read_weight().square().sum(1)
        scores, fixed = (norms * self.deviations / self.rows).cpu(), self.linear_map.fixed
        scores[fixed:] = standardized(scores[fixed:])
        owned = self.linear_map.unit_rows
        return torch.stack(
            [scores[rows].mean() if rows else scores.new_zeros(()) for rows in owned]
        )


def _run(prepared: Prepared, every: Sequence[_Inputs]) -> None:
    """Show each consumer's inputs to what sums them up."""
    by_module: dict[str, list[_Inputs]] = {}
    for inputs in every:
        by_module.setdefault(inputs.linear_map.name, []).append(inputs)

    def see(name: str, x: Any) -> None:
        once = afresh(x)
        for inputs in by_module[name]:
            inputs.add(once)

    batches = prepared.batches()
    total = len(batches)
    with reads(prepared.model, by_module, see), stage("fluctuation", total=total) as bar:
        for index, batch in enumerate(batches):
            with batch_named(prepared.model, index):
                forward(prepared.model, batch)
            bar.advance()
