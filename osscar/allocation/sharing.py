"""How a budget is shared out: by what each group loses, or evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.budget import Budget, Measured, Width
from osscar.allocation.costs import ROUNDING, Cost, CountedCost
from osscar.allocation.curves import Curve
from osscar.allocation.divergence import Measure
from osscar.allocation.search import Search
from osscar.allocation.widths import possible_widths
from osscar.request import Widths

_HALVINGS = 40
"""Of the interval in which a share is looked for."""


@dataclass(frozen=True, eq=False)
class Sharing:
    """Groups that share a budget by curves, or evenly; `others` is what other groups keep."""

    groups: Sequence[CouplingGroup]
    widths: Widths
    others: Mapping[str, int]
    curves: Mapping[str, Curve] | None = None
    measure: Measure = "nats"

    @cached_property
    def options(self) -> dict[str, NDArray[np.int64]]:
        """The widths that each group may have, ascending."""
        return {group.name: possible_widths(group, self.widths) for group in self.groups}

    @property
    def least(self) -> dict[str, int]:
        """The least widths."""
        return {name: int(some[0]) for name, some in self.options.items()}

    def choose(self, cost: CountedCost, limit: float) -> tuple[dict[str, int], float | None]:
        """Return what groups keep so that the model costs at most the limit, or the least.

        Beside it comes what no other widths are predicted to lose less than, as of
        `Search.choose`.
        """
        if self.curves is not None:
            return self._search(self.curves, cost).choose(limit)
        return equal_shares(self.options, self.others, cost, limit), None

    def budget(
        self,
        kind: Cost,
        cost: CountedCost,
        limit: float,
        found: Mapping[str, int],
        bound: float | None,
    ) -> Budget:
        """Report on a choice and its bound, with a prediction where there are curves."""
        told: dict[str, Any] = {}
        parts: dict[str, float] = {}
        if self.curves is not None:
            search = self._search(self.curves, cost)
            own = {name: self.curves[name] for name in search.options}
            parts = {name: float(curve.losses[found[name]]) for name, curve in own.items()}
            told = {
                "predicted": search.loss(found),
                "lower_bound": bound,
                "measure": self.measure,
                "curves": {
                    name: tuple(curve.losses.tolist())
                    for name, curve in own.items()
                    if len(search.options[name]) > 1
                },
                "measured": {
                    name: tuple(Measured(*point) for point in sorted(curve.measured.items()))
                    for name, curve in own.items()
                    if curve.measured
                },
                "frontier": search.frontier(),
            }
        widths = {
            g.name: Width(str(g.kind), g.units, found[g.name], parts.get(g.name))
            for g in self.groups
        }
        reached = cost.of({**self.others, **found})
        return Budget(kind, limit, cost.dense, reached, widths=widths, **told)

    def _search(self, curves: Mapping[str, Curve], cost: CountedCost) -> Search:
        losses = {name: curves[name].losses[some] for name, some in self.options.items()}
        return Search(self.options, losses, self.others, cost)


def equal_shares(
    options: Mapping[str, NDArray[np.int64]],
    others: Mapping[str, int],
    cost: CountedCost,
    limit: float,
) -> dict[str, int]:
    """Return widths near the share of every group that comes to the limit, within it.

    The coarsest groups, such as heads, are settled first: the others, which move in finer steps,
    make up for what these leave.  Groups of the same widths stay alike.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, some in options.items():
        alike.setdefault(tuple(some.tolist()), []).append(name)
    kept: dict[str, int] = {}

    def fits(widths: Mapping[str, float]) -> bool:
        return cost.of({**others, **kept, **widths}) <= limit * (1 + ROUNDING)

    for widths in sorted(alike, key=len):
        left = [name for name in options if name not in kept]
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            within = fits({name: share * float(options[name][-1]) for name in left})
            low, high = (share, high) if within else (low, share)
        nearest = sorted(widths, key=lambda width: (abs(width - low * widths[-1]), -width))
        least = {name: int(options[name][0]) for name in left}
        for width in [*nearest, widths[0]]:  # the least, where nothing fits
            found = dict.fromkeys(alike[widths], width)
            if fits({**least, **found}):
                break
        kept.update(found)
    return {name: kept[name] for name in options}
