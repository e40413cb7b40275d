"""What two probes on an opened model tell of a run, and what is known of it by counting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graph import CouplingGroup
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost
from osscar.allocation.costs import count as count_cost
from osscar.allocation.curves import Curve
from osscar.allocation.widths import asked_groups
from osscar.base.timing import Clock
from osscar.estimation.forward_probe import ForwardCosts, first_samples, probed_samples, timed_pass
from osscar.estimation.layer_probe import LayerCosts, Sort, layer_costs, sorts
from osscar.preparation.opened import Opened
from osscar.request import Allocation, PruningRequest
from osscar.walk.targets import Target
from osscar.walk.walk import Walk, walk


def expected_keep(ready: Opened, request: PruningRequest) -> dict[str, int]:
    """Return what groups keep, as far as that is known before anything is measured.

    Curves are not known yet.  Each is taken to be the square of the share of units that leave, so
    that groups which cost most lose most: small ones in front of a network often keep all.

    Raises
    ------
    RequestError, FrozenGroupError
        As the run does.
    """
    if not request.has_budget:
        return dict(allocate(ready, request).keep)
    told = request
    if request.allocation == Allocation.FLUCTUATION:
        told = dataclasses.replace(told, allocation=str(Allocation.CURVATURE))
    if request.speedup is not None:
        told = dataclasses.replace(told, speedup=None, sparsity=1 - 1 / request.speedup)
    _, _, shared = asked_groups(ready, told)
    gone = {group.name: np.linspace(1.0, 0.0, group.units + 1) for group in shared}
    curves = {name: Curve(name, share**2) for name, share in gone.items()}
    return dict(allocate(ready, told, curves).keep)


@dataclass(frozen=True, eq=False)
class Probed:
    """What the probes have told, and what the run will do.

    Parameters
    ----------
    groups, keep
        The groups that lose units, and what they keep.
    shared
        Those that share a budget by curvature.
    held
        Samples that are held out.
    walk
        The walk that the run makes.
    walk_seconds
        What it takes to plan that.
    forward
        What forward passes take.
    costs
        Each sort of group, with what one of them takes.
    seen
        How many samples the layers were probed on.
    """

    groups: tuple[CouplingGroup, ...]
    keep: Mapping[str, int]
    shared: tuple[CouplingGroup, ...]
    held: int
    walk: Walk
    walk_seconds: float
    forward: ForwardCosts
    costs: tuple[tuple[Sort, LayerCosts], ...]
    seen: int
    kept: float

    @classmethod
    def of(
        cls, ready: Opened, request: PruningRequest, keep: dict[str, int], held: int, clock: Clock
    ) -> Probed:
        """Make both probes."""
        groups = tuple(g for g in ready.groups if keep.get(g.name, g.units) < g.units)
        by_curvature = request.has_budget and request.allocation == Allocation.CURVATURE
        shared = tuple(asked_groups(ready, request)[2]) if by_curvature else ()
        began = clock()
        planned = walk(ready, groups, target=Target(request.target), held=held)
        walk_seconds = clock() - began
        names = sorted(set(planned.calls))
        one = first_samples(ready, 1)
        every = sorts(ready, groups, keep, timed_pass(ready, one, names, (), clock)[0])
        kept = sorted({found.name for sort in every for found in sort.maps})
        few, seen = timed_pass(ready, one, names, kept, clock)
        many, count = few, probed_samples(ready, few)
        if count > 1:
            many, seen = timed_pass(ready, first_samples(ready, count), names, kept, clock)
        costs = tuple(
            (
                sort,
                layer_costs(
                    ready,
                    request,
                    sort,
                    seen,
                    samples=count,
                    held=held > 0,
                    curves=bool(shared),
                    clock=clock,
                ),
            )
            for sort in every
        )
        cost = count_cost(Cost.PARAMETERS, ready.model, ready.groups, ready.sample)
        return cls(
            groups, keep, shared, held, planned, walk_seconds, ForwardCosts(few, many), costs,
            count, cost.of(keep) / cost.dense,
        )  # fmt: skip
