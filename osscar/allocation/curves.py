"""What keeping k of a group's units costs in the outputs of the whole model, for every k.

The height of a curve is measured: the model runs with this group alone pruned and refitted, at a
few widths.  Its shape between these is that of what the group's own consumers lose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LEAST = 1e-7
"""What is measured below this is rounding of logits."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The distance from the dense model of one in which a group has lost units.

    `shape`, (units + 1,), is what its consumers lose as units leave one by one, relative to their
    own outputs; it does not increase with the k units that are left, and ends with 0.  `measured`
    is how far the model's outputs are from the dense ones with so many units.
    """

    name: str
    shape: NDArray[np.float64] = field(repr=False)
    measured: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """The shape through what was measured, (units + 1,), which does not increase either.

        Between two widths that were measured it is a power of the shape, and beyond them a
        multiple; without any, the shape itself.
        """
        points: dict[float, float] = {}
        least = LEAST
        for kept, distance in sorted(self.measured.items(), reverse=True):
            if self.shape[kept] > 0:  # units that do nothing do nothing
                points[float(self.shape[kept])] = least = max(distance, least)
        losses = self.shape.copy()
        if points:
            known = losses > 0
            x, y = np.log(np.array(sorted(points.items()))).T
            at = np.log(losses[known])
            inside = np.clip(at, x[0], x[-1])
            losses[known] = np.exp(np.interp(inside, x, y) + at - inside)
        return np.maximum.accumulate(losses[::-1])[::-1]  # but for rounding, it is that

    def through(self, kept: int, distance: float) -> Curve:
        """Return a curve that also goes through what was measured with so many units."""
        return dataclasses.replace(self, measured={**self.measured, kept: distance})
