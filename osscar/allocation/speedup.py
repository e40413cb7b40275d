"""Widths whose model is as fast as is wanted: whole models are built, and timed.

What a width saves in time depends on the device, and is not known before.  So the best widths
within a limit on the floating-point operations are built, any units, timed beside the dense model,
and the limit is moved until the time fits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from timeit import Timer

import torch
from torch import nn

from graph.tracing.preserve import without_cache
from osscar.allocation.task import PruningTask
from osscar.base.errors import EquivalenceError, RequestError
from osscar.base.timing import clock, interleaved
from osscar.data.batches import Batch
from osscar.network.modules import copied, forward
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink

REPETITIONS = 9
_WIDEST_SPREAD = 0.1
"""Of the ratio of two times, beyond which nothing can be aimed at."""

CLOSE = 0.02
"""How near the timed speed-up has to come to the one that was asked for."""

MOST_MODELS = 8
"""How many are built and timed at most; the one that came nearest is taken."""


def as_fast_as(
    task: PruningTask,
    wanted: float,
    least: float,
    most: float,
    choose: Callable[[float], dict[str, int]],
) -> tuple[dict[str, int], float]:
    """Return widths whose model was timed to be as fast as wanted, and how fast that was.

    `choose` returns the best widths within a share of the dense model's operations: from the
    `least`, of the least widths, to the `most`, of the widest that the request's other limits
    allow, of which a model may be faster than wanted.  A `RequestError` says that no model is so
    fast, that none can be built, or that the device is too noisy to tell.
    """
    prepared, batch = task.prepared, task.prepared.batches()[0]
    # Shares of operations, with the times of their models: one too slow, one fast enough.
    slow, fast = (most, 1.0), (0.0, 0.0)
    best: tuple[dict[str, int], float] | None = None
    share = 1 / wanted
    for _ in range(MOST_MODELS):
        share = min(max(share, least), most)
        kept = choose(share)
        speedup = time_against(prepared.model, _built(prepared, {**task.keep, **kept}), batch)
        if best is None or abs(speedup - wanted) < abs(best[1] - wanted):
            best = kept, speedup
        if abs(speedup / wanted - 1) <= CLOSE or (speedup > wanted and share == most):
            break
        if speedup >= wanted:
            fast = share, 1 / speedup
        elif share > least:
            slow = share, 1 / speedup
        else:
            raise RequestError(
                f"speedup {wanted:g} cannot be met: the smallest "
                f"possible model is "
                f"{speedup:.2f} times as fast as the dense one; ask for less, or prune more kinds "
                "of units"
            )
        # Interpolated, but not to the ends, as times are noisy: a bisection where these mislead.
        part = (slow[1] - 1 / wanted) / max(slow[1] - fast[1], 1e-9)
        share = slow[0] + min(max(part, 0.1), 0.9) * (fast[0] - slow[0])
    assert best is not None
    return best


def time_against(dense: nn.Module, other: nn.Module, batch: Batch) -> float:
    """Return the ratio of the median times of the dense model and of another one on a batch.

    Its error is about half of the interquartile range of the single ratios, over the root of their
    number; a `RequestError` is raised if that is too much.
    """
    timers = [Timer(partial(forward, model, batch), timer=clock) for model in (dense, other)]
    with torch.no_grad(), without_cache(dense), without_cache(other):
        slow, fast = interleaved(timers, REPETITIONS, "timing")
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = (high - low) / 2 / len(ratios) ** 0.5 / middle
    if not spread <= _WIDEST_SPREAD:
        raise RequestError(
            f"this device is too noisy to time: a speed-up of {middle:.2f} is only known to "
            f"{spread:.0%}; end what else runs on it, or give flops (`--flops`) in its place"
        )
    return statistics.median(slow) / statistics.median(fast)


def _built(prepared: Prepared, kept: Mapping[str, int]) -> nn.Module:
    """Return a copy of the dense model that keeps the first units of each group."""
    fewer = [(g, range(kept[g.name])) for g in prepared.groups if g.name in kept]
    plans = (GroupPlan.of(g, tuple(some)) for g, some in fewer if len(some) < g.units)
    smaller = copied(prepared.model)
    try:
        shrink(smaller, PruningPlan(tuple(plans)), [prepared.example])
    except EquivalenceError as error:
        raise RequestError(
            f"no trial model can be built to time: {error}; give flops (`--flops`) in its place"
        ) from error
    return smaller
