"""One model pruned to several budgets, with curvature and dense statistics measured once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from osscar.allocation.allocate import shared_curves
from osscar.base.errors import OptionError
from osscar.network.modules import copied
from osscar.preparation.prepare import Prepared
from osscar.pruning.prune import (
    DenseFacts,
    finished,
    prepare_for,
    prune_prepared,
    within_memory,
)
from osscar.pruning.result import PruningResult
from osscar.request import BASELINES, METHODS, Allocation, BudgetKind, PruningRequest


@dataclass(frozen=True)
class Job:
    """One point of a sweep.

    Parameters
    ----------
    method
        One of `METHODS`, or a baseline's backend.
    budget
        What is asked for.
    value
        As `PruningRequest` takes it.
    """

    method: str
    budget: BudgetKind
    value: float | int

    def request(self, base: PruningRequest) -> PruningRequest:
        """Return what is asked of a pruning run for this point.

        Parameters
        ----------
        base
            Everything that the points share.

        Raises
        ------
        RequestError
            If the budget makes no sense.
        """
        asked: dict[str, Any] = dict.fromkeys(map(str, BudgetKind))
        asked[self.budget] = self.value
        if self.method in METHODS:
            asked["allocation"] = self.method
            return dataclasses.replace(base, **asked)
        return dataclasses.replace(
            base,
            **asked,
            allocation="uniform",
            target="weights",
            blend=None,
            backend=self.method,
            backend_options={},
        )

    def __str__(self) -> str:
        return f"{self.method} at {self.budget} {self.value:g}"


def jobs(
    budget: BudgetKind,
    values: Sequence[float | int],
    *,
    baselines: bool = False,
    allocation: Allocation = "curvature",
) -> tuple[Job, ...]:
    """Return the points of a sweep, the method itself first, the largest model first.

    Parameters
    ----------
    budget
        What they differ in.
    values
        What it comes to.
    baselines
        Whether to add `BASELINES`.
    allocation
        How budgets are shared, which is what the method itself is called by.

    Raises
    ------
    OptionError
        If there is no value, or counts stand beside shares.
    RequestError
        If one makes no sense.
    """
    if not values:
        raise OptionError(
            f"a sweep needs budgets; give a list such as --{budget} {budget.examples}"
        )
    if len({isinstance(value, int) for value in values}) > 1:
        raise OptionError(
            f"{', '.join(map(str, values))} are counts and shares; give either to --{budget}"
        )
    if budget is BudgetKind.SIZE and any(isinstance(value, int) for value in values):
        raise OptionError(
            f"a sweep takes sizes as shares of the dense model's, not {values[0]}; give a list "
            f"such as --size {budget.examples}"
        )
    for value in values:
        asked: dict[str, Any] = {str(budget): value}
        PruningRequest(**asked, allocation=allocation)
    methods = (allocation, *(BASELINES if baselines else ()))
    ordered = sorted(set(values), reverse=not budget.rises)
    return tuple(Job(method, budget, value) for method in methods for value in ordered)


def sweep(
    model: nn.Module, calibration: Any, base: PruningRequest, points: Sequence[Job]
) -> Iterator[tuple[Job, PruningResult]]:
    """Prune a model once for each point; the model that comes in is not changed.

    The model is traced once, and what is known of the dense model is found once: what can follow,
    its predictions, its batch-norm statistics and, where a point needs them, the curves of its
    groups.

    Parameters
    ----------
    model, calibration
        As `osscar.prune` takes them.
    base
        What the points share; its own budget is not used.
    points
        What is to be pruned, in this order.

    Yields
    ------
    (Job, PruningResult)
        Divergences are all measured on the samples that the base request holds out; baselines
        whose damping is given hold out none, and are fitted to these as well.

    Raises
    ------
    OsscarError
        What `osscar.prune` raises.
    """
    if not points:
        return
    with prepare_for(model, calibration, points[0].request(base)) as prepared:
        requests = {job: job.request(base) for job in points}
        each = {job: within_memory(prepared, request) for job, request in requests.items()}
        facts = DenseFacts.of(prepared, base)
        if any(request.allocation == "curvature" for request in requests.values()):
            curves = shared_curves(prepared, base, facts.feasible.left_names)
            facts = dataclasses.replace(facts, curves=curves)
        for job in points:
            result = prune_prepared(_again(each[job]), requests[job], facts)
            yield job, finished(result, model, calibration, prepared)


def _again(prepared: Prepared) -> Prepared:
    """Return the prepared model with a copy that may be changed."""
    return dataclasses.replace(prepared, model=copied(prepared.model))
