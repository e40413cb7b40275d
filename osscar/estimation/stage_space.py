"""Bytes of memory and of files that each stage of a run takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graph import CouplingGroup
from osscar.allocation.curvature import held_batches, parts, small_batches
from osscar.allocation.curves import curve_samples
from osscar.base.timing import Stage
from osscar.data.batches import TokenInputs
from osscar.estimation.probed import Probed
from osscar.offload.on_disk import shelf_of
from osscar.preparation.opened import Opened
from osscar.pruning.memory import Room, put_out
from osscar.request import Allocation, PruningRequest


@dataclass(frozen=True, eq=False)
class Space:
    """Bytes of memory and of files, by stage."""

    base: int
    weights: int
    kept: float
    needs: Mapping[Stage, int]
    reads: Mapping[Stage, int]
    ceiling: int | None
    log: int

    @classmethod
    def of(
        cls,
        ready: Opened,
        request: PruningRequest,
        plan: Probed,
        room: Room | None,
        opened_bytes: int,
    ) -> Space:
        """Count what is held and read."""
        shelf = shelf_of(ready.model)
        weights = _weight_bytes(ready)
        held = max(1, plan.held)
        found = Room.of(ready, request, held) if room is None else room
        copies = 0 if shelf is not None else weights
        needs = {
            Stage.TRIAL: 2 * copies + found.proof,
            Stage.DENSE: found.logits,
            Stage.ALLOCATION: found.forward,
            Stage.WALK: found.batches + found.forward,
            Stage.GRAM: found.batches + found.forward + found.sums,
            Stage.DAMPING: found.batches + found.matrices,
            Stage.SOLVER: found.batches + found.matrices,
            Stage.PROOF: round((1 + plan.kept) * copies) + found.proof,
            Stage.PRUNED: found.logits,
        }
        if plan.shared:
            factors, largest = _factor_bytes(ready, plan.shared)
            needs[Stage.CURVATURE] = factors + _saved_bytes(ready) + found.logits
            needs[Stage.CURVES] = factors + largest
        passes = {
            Stage.TRIAL: 6,
            Stage.DENSE: held,
            Stage.ALLOCATION: 2 if request.allocation == Allocation.FLUCTUATION else 0,
            Stage.WALK: len(plan.walk.itinerary),
            Stage.PROOF: 8,
            Stage.PRUNED: held,
        }
        fits = shelf is None or opened_bytes + weights + max(needs.values()) <= shelf.ceiling
        reads = {} if fits else {phase: count * weights for phase, count in passes.items()}
        log = sum(len(sort.groups) * sort.weight_bytes for sort, _ in plan.costs)
        ceiling = None if shelf is None else shelf.ceiling
        return cls(opened_bytes, weights, plan.kept, needs, reads, ceiling, log)

    def peak(self, phase: Stage) -> int:
        """Return the most memory of a stage."""
        most = self.base + self.needs.get(phase, 0)
        return most if self.ceiling is None else min(most + self.weights, self.ceiling)

    def read(self, phase: Stage) -> int:
        """Return what a stage reads."""
        return self.reads.get(phase, 0)

    def written(self, phase: Stage) -> int:
        """Return what a stage writes."""
        return self.log if phase is Stage.SOLVER else 0


def _weight_bytes(ready: Opened) -> int:
    """Return the bytes of a model's weights and buffers."""
    model = ready.model
    every = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(every.values())


def _factor_bytes(ready: Opened, groups: Sequence[CouplingGroup]) -> tuple[int, int]:
    """Return the bytes of the factors that are held at once, and of the largest problem of them."""
    held = largest = 0
    apart = held_batches(ready, small_batches(ready, curve_samples(ready)))
    copies = 2 if apart else 1  # one of the samples that are held out
    for part in parts(ready.model, groups, copies):
        shapes = [one.read_weight().shape for _, maps in part for one in maps]
        held = max(held, sum(4 * copies * (p * p + m * m) for p, m in shapes))
        largest = max(largest, *(8 * (4 * p * p + 2 * m * m) for p, m in shapes))
    return held, largest


def _saved_bytes(ready: Opened) -> int:
    """Return the bytes of what a forward pass keeps for the backward pass."""
    [batch, *_] = small_batches(ready, curve_samples(ready))
    first = next(iter(batch.values()))
    positions = first.numel() if isinstance(ready.inputs, TokenInputs) else len(first)
    return 4 * positions * sum(put_out(ready)[0])
