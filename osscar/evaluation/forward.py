"""What one forward pass of any model takes: parameters, operations and time, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.tracing.preserve import without_cache
from osscar.base.devices import clock_of
from osscar.base.timing import interleaved, seconds_of
from osscar.evaluation.size import count_parameter_bytes
from osscar.network.modules import count_parameters, device_of, evaluating, forward
from osscar.network.operations import count_flops
from osscar.offload.on_disk import room_for_pass

_REPETITIONS = 5
_SECONDS = 0.5


def measure_forward(
    models: Sequence[nn.Module], batch: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return size, operations and seconds of models on the same batch, timed in turns.

    Seconds are a median, and ``seconds_between`` the quartiles: half of the turns lie in there.
    """
    given = [leaf for leaf in pytree.tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]
    positions = max((leaf.numel() for leaf in given), default=0)
    with _ready(models, positions):
        flops = [count_flops(model, batch) for model in models]
        turns = _turns(models, [batch] * len(models), _REPETITIONS, _SECONDS)
    return [
        {
            "parameters": count_parameters(model),
            "parameter_bytes": count_parameter_bytes(model),
            "flops": operations,
            "seconds": statistics.median(seconds),
            "seconds_between": _quartiles(seconds),
        }
        for model, operations, seconds in zip(models, flops, turns, strict=True)
    ]


def forward_seconds(
    models: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    repetitions: int,
    worthwhile: float | None = None,
) -> list[float]:
    """Return the median seconds of a forward pass of each model, interleaved."""
    return list(map(statistics.median, _turns(models, batches, repetitions, worthwhile)))


def _turns(
    models: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    repetitions: int,
    worthwhile: float | None,
) -> list[list[float]]:
    """Return the seconds of each model in each turn."""
    timings = [
        seconds_of(partial(forward, model, batch), clock_of(device_of(model)))
        for model, batch in zip(models, batches, strict=True)
    ]
    return interleaved(timings, repetitions, "Timing", worthwhile=worthwhile)


def _quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower and the upper quartile of several values."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def measuring_seconds(passes: Sequence[float]) -> float:
    """Return about how long `measure_forward` takes, of models whose passes take so long."""
    once = sum(passes)
    counted_and_warm = 2 * once
    return counted_and_warm + max(_REPETITIONS * once, _SECONDS)


@contextmanager
def _ready(models: Sequence[nn.Module], positions: int) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(*models))
        for model in models:
            stack.enter_context(without_cache(model))
            stack.enter_context(room_for_pass(model, positions))
        yield
