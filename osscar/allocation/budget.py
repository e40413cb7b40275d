"""The budgets that groups share, and what they came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import with_config

from osscar.allocation.costs import Cost
from osscar.base.json_files import STRICT
from osscar.distance.distance import Measure
from osscar.request import BudgetKind

_ROUNDING = 1e-9

_POINTS = 33
"""Of each curve, in what is saved."""


@with_config(STRICT)
@dataclass(frozen=True)
class Width:
    """What a group that shares a budget keeps.

    kept: How many of its `units` stay.
    predicted: Its part of the predicted distance.
    """

    kind: str
    units: int
    kept: int
    predicted: float | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class Measured:
    """How far outputs moved with one group alone pruned to so many units."""

    kept: int
    distance: float


@with_config(STRICT)
@dataclass(frozen=True)
class Limit:
    """What one budget of a request allows the whole model, and what that came to."""

    budget: BudgetKind
    """The option."""
    cost: Cost
    """What is counted."""
    limit: float
    """What the whole model may cost."""
    dense: float
    """What the dense model costs; bytes are those of its modules, also of a program."""
    reached: float
    """What the smaller model costs."""
    assumed: str = ""
    """What was taken for granted where costs were counted, in words."""


@with_config(STRICT)
@dataclass(frozen=True)
class Budget:
    """What the groups that share one or several budgets came to."""

    limits: tuple[Limit, ...]
    """One for each budget, all of which hold; the one of which most is used comes first."""
    predicted: float | None = None
    """The distance of the pruned model from the dense one that the curves of the groups add up to,
    which know nothing of residual streams; None with equal shares."""
    lower_bound: float | None = None
    """No choice of widths within all limits, beside these residual channels, has a smaller
    prediction; None where nothing is predicted, or costs of too many groups multiply for a proof.
    """
    measure: Measure = "nats"
    """What distances are: ``nats``, the divergence of predictions, or ``relative``, the squared
    error of outputs over the squares of the dense ones, where these are no scores of classes."""
    on_trial: float | None = None
    """The distance of the model that was pruned on trial to these widths; None where residual
    streams had no choice."""
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    """The distance that each group that had a choice causes alone, over the units kept."""
    widths: dict[str, Width] = field(default_factory=dict, repr=False)
    """What each group keeps, in the order of the model."""
    measured: dict[str, tuple[Measured, ...]] = field(default_factory=dict, repr=False)
    """By group, the widths at which its curve was measured."""

    def of(self, budget: BudgetKind) -> Limit:
        """Return the limit of one budget that was given."""
        return next(limit for limit in self.limits if limit.budget == budget)

    @property
    def gap(self) -> float | None:
        """How far the prediction can be above the least one within the limits, relative to it."""
        if self.predicted is None or self.lower_bound is None:
            return None
        above = self.predicted - self.lower_bound
        return 0.0 if above <= _ROUNDING * self.predicted else above / self.predicted

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data, with its gap, and each curve at some of its points."""
        curves = {}
        for name, losses in self.curves.items():
            kept = np.unique(np.linspace(0, len(losses) - 1, _POINTS).round().astype(int)).tolist()
            curves[name] = {"kept": kept, "distance": [float(f"{losses[k]:.6g}") for k in kept]}
        return {**dataclasses.asdict(self), "curves": curves, "gap": self.gap}


@dataclass(frozen=True)
class Allocated:
    """How many units groups keep, only those that lose some, and the budgets that some share."""

    keep: Mapping[str, int]
    budget: Budget | None = None
