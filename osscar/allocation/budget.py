"""One budget that groups share, and what it came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from osscar.allocation.costs import Cost
from osscar.base.json_files import STRICT

_ROUNDING = 1e-9

_POINTS = 33
"""Of each curve, in what is saved."""


@dataclass(frozen=True)
class Width:
    """What a group that shares a budget keeps, and its part of the predicted divergence in nats."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: str
    units: int
    kept: int
    predicted: float | None = None


@dataclass(frozen=True)
class Measured:
    """What predictions diverged by, in nats, with one group alone pruned to so many units.

    `predicted` is what its curve said before; None where nothing predicted it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kept: int
    predicted: float | None
    nats: float


@dataclass(frozen=True)
class Budget:
    """What the groups that share a budget came to.

    Parameters
    ----------
    cost
        What it is counted in.
    limit
        What the whole model may cost.
    dense, reached
        What it costs, and what it will; bytes of the dense model are those of its modules, also
        where a program is saved.
    predicted
        The predicted divergence of the pruned model's predictions from the dense ones, in nats a
        prediction; None where nothing predicts it.
    lower_bound
        No choice of widths within the limit has a smaller prediction; None where costs of too many
        groups multiply, so that nothing was proved, or nothing is predicted.
    comparable
        Whether all groups were measured, or reached by gradients; if not, the others count by their
        own relative loss.
    curves
        The divergence of each group that had a choice over the units kept, as predicted, and
        through what was `measured`.
    widths
        What each group keeps, in the order of the model.
    measured
        By group, the widths at which its curve was measured.
    frontier
        Costs of the whole model, ascending, and the least predicted divergence at each: what other
        limits would have come to.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    cost: Cost
    limit: float
    dense: float
    reached: float
    predicted: float | None = None
    lower_bound: float | None = None
    comparable: bool = True
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    widths: dict[str, Width] = field(default_factory=dict, repr=False)
    measured: dict[str, tuple[Measured, ...]] = field(default_factory=dict, repr=False)
    frontier: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def gap(self) -> float | None:
        """How far the prediction can be above the least one within the limit, relative to it."""
        if self.predicted is None or self.lower_bound is None:
            return None
        above = self.predicted - self.lower_bound
        return 0.0 if above <= _ROUNDING * self.predicted else above / self.predicted

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data, with its gap, and each curve at some of its points."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cost, nats = ([float(f"{point[i]:.6g}") for point in self.frontier] for i in (0, 1))
        return {
            **data,
            "cost": str(self.cost),
            "curves": _at_some_points(self.curves),
            "widths": {name: dataclasses.asdict(width) for name, width in self.widths.items()},
            "measured": {
                name: [dataclasses.asdict(one) for one in some]
                for name, some in self.measured.items()
            },
            "frontier": {"cost": cost, "nats": nats},
            "gap": self.gap,
        }


def _at_some_points(curves: Mapping[str, tuple[float, ...]]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for name, losses in curves.items():
        kept = np.unique(np.linspace(0, len(losses) - 1, _POINTS).round().astype(int)).tolist()
        found[name] = {"kept": kept, "nats": [float(f"{losses[k]:.6g}") for k in kept]}
    return found


@dataclass(frozen=True)
class Allocated:
    """How many units groups keep, only those that lose some, and the budget that some share."""

    keep: Mapping[str, int]
    budget: Budget | None = None
