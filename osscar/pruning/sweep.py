"""One model pruned to several sparsities, with curvature and dense statistics measured once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from osscar.capture.opened import Opened
from osscar.capture.targets import Target
from osscar.core.errors import OptionError
from osscar.core.modules import copied
from osscar.pruning.allocation import shared_curves
from osscar.pruning.prune import DenseFacts, opened_for, prune_opened
from osscar.pruning.request import Allocation, PruningRequest
from osscar.pruning.result import PruningResult
from osscar.shrinking.lineage import note_calibration

CURVATURE = "curvature"
"""The method of the request itself; all others are baselines."""

BASELINES = MappingProxyType(
    {
        "multistage": "the choice of OSSCAR (Meng et al., 2024)",
        "greedy": "the choice of ZipLM (Kurtic et al., 2023)",
        "wanda": "magnitude times the norm of the inputs (Sun et al., 2023)",
        "magnitude": "the norm of the weights",
    }
)
"""Backends with which uniform shares are pruned, each layer by itself, and what they stand for.

All are refitted in the same way, biases too, on the paper's target.
"""


@dataclass(frozen=True)
class Job:
    """One point of a sweep.

    Parameters
    ----------
    method
        `CURVATURE`, or a baseline's backend.
    sparsity
        The share to remove of the parameters that heads, neurons and channels own.
    """

    method: str
    sparsity: float

    def request(self, base: PruningRequest) -> PruningRequest:
        """Return what is asked of a pruning run for this point.

        Parameters
        ----------
        base
            Everything that the points share.

        Raises
        ------
        RequestError
            If the sparsity is no share.
        """
        if self.method == CURVATURE:
            return dataclasses.replace(base, sparsity=self.sparsity)
        return dataclasses.replace(
            base,
            sparsity=self.sparsity,
            allocation=Allocation.UNIFORM,
            target=Target.WEIGHTS,
            blend=None,
            backend=self.method,
            backend_options={},
        )


def jobs(sparsities: Sequence[float], *, baselines: bool = False) -> tuple[Job, ...]:
    """Return the points of a sweep, the method itself first.

    Raises
    ------
    OptionError
        If there is no sparsity, or one is not above 0 and below 1.
    """
    if not sparsities:
        raise OptionError("a sweep needs sparsities; give a list such as 0.1,0.2,0.3")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise OptionError(
                f"sparsity is {sparsity!r}; give shares to remove, above 0 and below 1"
            )
    methods = (CURVATURE, *(BASELINES if baselines else ()))
    return tuple(Job(method, s) for method in methods for s in sorted(set(sparsities)))


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
        What the points share; its own sparsity is not used.
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
    with opened_for(model, calibration, points[0].request(base)) as ready:
        facts = DenseFacts.of(ready, base)
        if any(job.method == CURVATURE for job in points):
            curves = shared_curves(ready, base, facts.left_names)
            facts = dataclasses.replace(facts, curves=curves)
        for job in points:
            result = prune_opened(_again(ready), job.request(base), facts)
            _with_cache_as(result.model, model)
            note_calibration(result.model, calibration)
            yield job, result


def _again(ready: Opened) -> Opened:
    """Return the opened model with a copy that may be changed."""
    return dataclasses.replace(ready, model=copied(ready.model))


def _with_cache_as(pruned: nn.Module, model: nn.Module) -> None:
    """Use the key-value cache as the user's model does: while a model is open, it does not."""
    theirs: Any = getattr(model, "config", None)
    mine: Any = getattr(pruned, "config", None)
    if hasattr(theirs, "use_cache") and mine is not None:
        mine.use_cache = theirs.use_cache
