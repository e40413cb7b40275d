"""How long a forward pass takes as a function of the units that groups keep, measured here.

A model of which the groups of one kind (heads, neurons, channels) have lost half of their units is
built, any units, and timed against the dense one: that gives the seconds of each floating-point
operation that this kind saves.  A choice of widths by these prices is then built and timed again,
and the limit moved, until what is timed is what was asked for.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from graph import CouplingGroup
from osscar.capture.opened import Opened
from osscar.core.errors import EquivalenceError, RequestError
from osscar.core.modules import copied, fresh, without_cache
from osscar.core.progress import stage
from osscar.core.timing import take_turns
from osscar.data.batches import Batch
from osscar.pruning.costs import Cost, CostModel, count
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink

_REPETITIONS = 9
_WIDEST_SPREAD = 0.1
"""Of the ratio of two times, beyond which nothing can be aimed at."""

CLOSE = 0.02
"""How near the timed speed-up has to come to the one that was asked for."""

_ROUNDS = 5


@dataclass(frozen=True)
class Timed:
    """How much faster than the dense model another one is.

    Parameters
    ----------
    speedup
        Ratio of the median times.
    spread
        Half of the interquartile range of the ratios of single turns, over the root of their
        number, relative to the speed-up: about how far this median may be off.
    """

    speedup: float
    spread: float


def time_against(dense: nn.Module, other: nn.Module, batch: Batch) -> Timed:
    """Time two models on the same batch, taking turns.

    Raises
    ------
    RequestError
        If the device is too noisy to tell.
    """

    def timing(model: nn.Module) -> Callable[[], list[float]]:
        def run() -> list[float]:
            _synchronize(batch)
            began = time.perf_counter()
            model(**fresh(batch))
            _synchronize(batch)
            return [time.perf_counter() - began]

        return run

    with torch.no_grad(), without_cache(dense), without_cache(other):
        slow, fast = take_turns([timing(dense), timing(other)], _REPETITIONS, "timing")
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = (high - low) / 2 / len(ratios) ** 0.5 / middle
    if not spread <= _WIDEST_SPREAD:
        raise RequestError(
            f"this device is too noisy to time: a speed-up of {middle:.2f} is only known to "
            f"{spread:.0%}; end what else runs on it, or ask for a share of the --flops"
        )
    return Timed(statistics.median(slow) / statistics.median(fast), spread)


def _synchronize(batch: Batch) -> None:
    if any(tensor.is_cuda for tensor in batch.values()):
        torch.cuda.synchronize()


class Latency:
    """What a forward pass costs, in units of the dense model's.

    Parameters
    ----------
    ready
        The dense model with its data.
    shared
        The groups whose widths are to be chosen.
    fixed
        What other groups keep.
    """

    def __init__(
        self, ready: Opened, shared: Sequence[CouplingGroup], fixed: Mapping[str, int]
    ) -> None:
        self._ready, self._shared, self._fixed = ready, list(shared), dict(fixed)
        self._batch = ready.batches()[0]
        self.model = self._priced(count(Cost.FLOPS, ready.model, ready.groups, ready.sample))

    def speedup(self, kept: Mapping[str, int]) -> float:
        """Build a model of these widths, and time it against the dense one."""
        with self._built({**self._fixed, **kept}) as trial:
            return time_against(self._ready.model, trial, self._batch).speedup

    def _priced(self, flops: CostModel) -> CostModel:
        """Return what operations cost in time, from one trial for each kind of unit."""
        prices: dict[str, float] = {}
        kinds = {group.kind for group in self._shared}
        with stage("timing", total=len(kinds)) as bar:
            for kind in sorted(kinds):
                names = {group.name for group in self._shared if group.kind is kind}
                half = {g.name: max(1, g.units // 2) for g in self._shared if g.name in names}
                saved = (flops.dense - flops.of(half)) / flops.dense
                with self._built(half) as trial:
                    measured = time_against(self._ready.model, trial, self._batch).speedup
                # A kind that saves nothing here still has to have some price.
                price = max((1 - 1 / measured) / saved, 0.01) if saved else 1.0
                prices.update(dict.fromkeys(names, price))
                bar.advance()
        return _scaled(flops, prices)

    @contextmanager
    def _built(self, kept: Mapping[str, int]) -> Iterator[nn.Module]:
        """Yield a model that keeps the first units of each group."""
        groups = {group.name: group for group in self._ready.groups}
        plan = PruningPlan(
            tuple(
                GroupPlan.of(groups[name], tuple(range(k)))
                for name, k in kept.items()
                if k < groups[name].units
            )
        )
        trial = copied(self._ready.model)
        try:
            shrink(trial, plan, [self._ready.example])
        except EquivalenceError as error:
            raise RequestError(f"no trial model can be built to time: {error}") from error
        yield trial


def _scaled(flops: CostModel, prices: Mapping[str, float]) -> CostModel:
    """Return a cost model whose dense cost is 1, with prices of an operation by group."""

    def price(names: Sequence[str]) -> float:
        found = [prices[name] for name in names if name in prices]
        return (max(found) if found else 1.0) / flops.dense

    scaled = dataclasses.replace(
        flops,
        weights=tuple(
            dataclasses.replace(w, price=w.price * price([name for _, name, _ in w.taken]))
            for w in flops.weights
        ),
        each={name: each * price([name]) for name, each in flops.each.items()},
        fixed=0.0,
    )
    return dataclasses.replace(scaled, fixed=1.0 - scaled.dense)


def aimed(
    latency: Latency, wanted: float, choose: Callable[[float], dict[str, int]]
) -> tuple[dict[str, int], float]:
    """Return widths whose model was timed to be as fast as wanted, and how fast that was.

    Parameters
    ----------
    latency
        Times models.
    wanted
        The speed-up.
    choose
        Returns the best widths within a limit of the modelled time.
    """
    # Modelled times of models that were too slow and fast enough, with their real times.
    slow, slow_time = 1.0, 1.0
    fast: float | None = None
    fast_time, best, limit = 0.0, None, 1.0 / wanted
    for _ in range(_ROUNDS):
        try:
            kept = choose(limit)
            measured = latency.speedup(kept)
        except RequestError:  # nothing so fast, or a moment of noise: what is known will do
            if best is None:
                raise
            break
        if best is None or abs(measured - wanted) < abs(best[1] - wanted):
            best = kept, measured
        if abs(measured / wanted - 1) <= CLOSE:
            break
        if measured < wanted:
            slow, slow_time = limit, 1 / measured
        else:
            fast, fast_time = limit, 1 / measured
        limit = _between(slow, slow_time, fast, fast_time, 1 / wanted)
    assert best is not None
    return best


def _between(
    slow: float, slow_time: float, fast: float | None, fast_time: float, wanted: float
) -> float:
    """Interpolate the limit at which the time is as wanted; times are noisy, so not to the ends."""
    if fast is None:
        return max(slow * wanted / slow_time * 0.98, 0.01)
    share = (slow_time - wanted) / max(slow_time - fast_time, 1e-9)
    return slow + min(max(share, 0.1), 0.9) * (fast - slow)
