"""The subset problems of a whole dense model, captured in one pass over the calibration data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import graph
from graph.groups import CouplingGroup, UnitKind
from osscar.capture.gram import GramAccumulator, observe
from osscar.capture.linear_maps import freeze_unreadable, linear_maps
from osscar.capture.stages import Stage, find_stages, start_stream
from osscar.core.errors import FrozenGroupError, ModelError
from osscar.core.progress import track
from osscar.data.batches import as_inputs
from solvers import Consumer, SubsetProblem


def capture_problems(
    model: nn.Module,
    calibration: Any,
    *,
    damp: float = 0.01,
    wanted: Callable[[str], bool] = lambda name: True,
    query_heads: bool = False,
) -> Iterator[tuple[CouplingGroup, SubsetProblem]]:
    """Pose the problem of every prunable group on the dense model's own activations.

    Block after block, so that only one block's Gram matrices are in memory at once.  Unlike in
    `osscar.prune` nothing is pruned on the way: problems do not depend on each other's answers.

    Parameters
    ----------
    model
        Any model that `osscar.prune` takes; not changed.
    calibration
        As for `osscar.prune`.
    damp
        Weight of the proximal term, relative to the mean of the Gram matrix's diagonal.
    wanted
        Which groups, by name.
    query_heads
        Under grouped-query attention, let each query head be a unit, although only whole groups of
        them can be removed physically: a harder problem over more units.

    Yields
    ------
    tuple of CouplingGroup and SubsetProblem
        In execution order; each problem keeps all units until `SubsetProblem.with_keep` says
        otherwise, and bears the name of its group.

    Raises
    ------
    FrozenGroupError
        If no wanted group can be pruned.
    NonFiniteError
        If activations are not finite.
    """
    work = copy.deepcopy(model).eval()
    if getattr(getattr(work, "config", None), "use_cache", None) is not None:
        work.config.use_cache = False  # type: ignore[union-attr]
    inputs = as_inputs(work, calibration)
    with torch.no_grad():
        traced = freeze_unreadable(work, graph.trace(work, inputs.example(work)).groups)
        groups = [group for group in traced if group.prunable and wanted(group.name)]
        if not groups:
            raise FrozenGroupError(
                "no group that can be pruned has a name as asked; `osscar inspect` lists them"
            )
        groups.sort(key=lambda group: group.consumers[0].order)
        stages = find_stages(work, groups, inputs.example(work))
        stream = start_stream(work, stages, inputs.batches(work, inputs.batch_size))
        for index, stage in enumerate(track(stages, "measuring")):
            for group, consumers in _measure(work, stage, stream.arguments(index), damp):
                if query_heads and group.kind is UnitKind.HEADS:
                    consumers = tuple(_split_heads(work, c) for c in consumers)
                yield group, SubsetProblem(consumers, len(consumers[0].rows), group.name)
            if index + 1 < len(stages):
                stream.advance(index, stage.module)


def _measure(
    model: nn.Module, stage: Stage, calls: Sequence[Any], damp: float
) -> Iterator[tuple[CouplingGroup, tuple[Consumer, ...]]]:
    """Give the consumers of each group of a stage, all measured in the same pass."""
    by_group = [
        (group, [GramAccumulator(consumer) for consumer in linear_maps(model, group)])
        for group in stage.groups
    ]
    with observe([a for _, accumulators in by_group for a in accumulators]) as run:
        for args, kwargs in calls:
            run(stage.module, *args, **kwargs)
    for group, accumulators in by_group:
        yield group, tuple(accumulator.consumer(damp) for accumulator in accumulators)


def _split_heads(model: nn.Module, consumer: Consumer) -> Consumer:
    """Divide units that are groups of query heads into single heads."""
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    units, width = consumer.rows.shape
    if not isinstance(heads, int) or heads % units or width % (heads // units):
        raise ModelError(
            f"cannot divide {units} groups of {width} rows into {heads} query heads; "
            "leave --query-heads away"
        )
    return replace(consumer, rows=consumer.rows.reshape(heads, -1))
