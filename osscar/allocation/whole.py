"""How far a whole model is from the dense one at some widths, before it is pruned to these.

Curves add up what groups lose alone, and later refits make up for what earlier groups lose.  They
cannot for channels of residual streams, since nobody makes these any more.  So for each share of
these channels that all streams may keep, all groups are pruned in turn, as a run does, on all
samples but those on which outputs are compared, and put back.  On a quarter of the samples, as for
a curve, models with whole streams come out too far: they have more weights to fit.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from osscar.allocation.measured import compared_samples, dense_references
from osscar.allocation.task import PruningTask
from osscar.base.errors import NonFiniteError
from osscar.base.timing import Stage, timed
from osscar.data.parts import held_out
from osscar.offload.on_disk import put_back, values_of
from osscar.proof.plan import PruningPlan
from osscar.walk.batch_norm import dense_statistics, renew_statistics, statistics_put_back
from osscar.walk.layer_step import DenseTensors, LayerStep, dense_tensors
from osscar.walk.targets import Target
from osscar.walk.walk import Walk
from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.refit import refit


@timed(Stage.MEASURED)
def whole_distance(task: PruningTask, keep: Mapping[str, int]) -> float:
    """Return the distance of the model with groups pruned in turn; infinite if it overflows.

    All ranks take part.  Units that are routed stay.  Statistics of batch norms are corrected if
    the request says so.
    """
    prepared, request = task.prepared, task.request
    model, ranks = prepared.model, prepared.ranks
    compared = compared_samples(prepared)
    fitted = prepared.inputs.part(0, prepared.inputs.samples - compared)
    few = dataclasses.replace(prepared, inputs=fitted)
    groups = [g for g in task.groups if keep.get(g.name, g.units) < g.units and not g.kind.routed]
    reference, _ = dense_references(prepared, compared, request.distance)
    corrected = request.batch_norm == "correct"
    statistics = dense_statistics(model, few.batches(), ranks) if corrected else None
    dense: dict[str, DenseTensors] = {}
    target = Target(request.target)
    try:
        with (
            ranks.alike("the model that is pruned on trial"),
            torch.no_grad(),
            statistics_put_back(model),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
            for step in Walk(
                few, groups, target=target, held_out=few.inputs.last(held_out(fitted.samples))
            ):
                dense = dense_tensors(step.consumers) | dense
                pruned = partial(_pruned, step, keep[step.group.name], task)
                written = ranks.broadcast("a group that is pruned on trial", pruned)
                if not step.committed:
                    step.adopt(written)
            renew_statistics(model, PruningPlan(()), few.batches(), statistics, ranks)
            return reference.divergence(model)
    except NonFiniteError:
        return math.inf
    finally:
        for group in groups:
            for one in prepared.linear_maps(group):
                if one.holder in dense:
                    put_back(one.module, dense[one.holder])
        torch.clear_autocast_cache()


def _pruned(step: LayerStep, keep: int, task: PruningTask) -> tuple[Tensor, ...]:
    """Remove units one by one, and commit the refit; return what other ranks are to adopt."""
    request = task.request
    weight = request.correction_weight if Target(request.target).needs_dense else 0.0
    damp, step.correction_weight = step.regularization(keep, request.damp, weight)
    problem = step.problem(keep, damp)
    kept = support_after(eliminate(problem, problem.units - keep), problem)
    refits = step.refits(refit(problem, kept)[0], kept.tolist())
    step.commit(refits.weights, kept.tolist())
    if task.prepared.ranks.alone:
        return ()
    return tuple(values_of(one).cpu() for consumer in step.consumers for one in consumer.read())
