"""How long a forward pass takes as a function of the units that groups keep, measured here.

Models that keep a few shares of the units of all groups, any units, are built, one after the other,
and every part of their passes is timed beside the dense model's: that gives a table of seconds over
widths, which serves all that is asked of the same model on the same data and device.  A choice of
widths by this table is then built and timed whole, and the limit moved should it have missed.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from graph import CouplingGroup, Slot
from graph.tracing.preserve import without_cache
from osscar.allocation.latency_table import (
    LatencyTable,
    keep_table,
    kept_table,
    tabulated,
)
from osscar.allocation.parts import (
    Turns,
    alike,
    check_alike,
    groups_between,
    medians,
    parts_in_turn,
)
from osscar.allocation.widths import possible_widths
from osscar.base.devices import clock_of, this_device
from osscar.base.errors import EquivalenceError, RequestError
from osscar.base.files import digest
from osscar.base.progress import stage
from osscar.base.timing import interleaved, seconds_of
from osscar.data.batches import Batch
from osscar.network.modules import copied, device_of, forward
from osscar.preparation.prepare import Prepared
from osscar.request import Widths
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink

_SHARES = (0.75, 0.5, 0.25, 0.0)
"""Of the widths that groups may have, at which the table is measured; 0 stands for the least."""

_TURNS = 5
"""For each of them; parts that do the same work in other layers are as many more."""

_REPETITIONS = 9
_WIDEST_SPREAD = 0.1
"""Of the ratio of two times, beyond which nothing can be aimed at."""

CLOSE = 0.02
"""How near the timed speed-up has to come to the one that was asked for."""

MOST_ROUNDS = 5
"""Models that are built and timed whole until one is fast enough, at most."""


def table_passes() -> int:
    """Return how many forward passes of models as large as the dense one a table takes at most."""
    return 2 * len(_SHARES) * (_TURNS + 1)


def round_passes() -> int:
    """Return how many it takes at least to time one model whole."""
    return 2 * (_REPETITIONS + 1)


def time_against(dense: nn.Module, other: nn.Module, batch: Batch) -> float:
    """Return how much faster than the dense model another one is on a batch: of median times.

    Raises
    ------
    RequestError
        If the device is too noisy to tell.
    """
    clock = clock_of(device_of(dense))
    timings = [seconds_of(partial(forward, model, batch), clock) for model in (dense, other)]
    with torch.no_grad(), without_cache(dense), without_cache(other):
        slow, fast = interleaved(timings, _REPETITIONS, "timing")
    return _ratio(slow, fast)


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the ratio of two median times that were interleaved.

    About how far it may be off is half of the interquartile range of the single ratios, over the
    root of their number.

    Raises
    ------
    RequestError
        If that is too much.
    """
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = (high - low) / 2 / len(ratios) ** 0.5 / middle
    if not spread <= _WIDEST_SPREAD:
        raise RequestError(
            f"this device is too noisy to time: a speed-up of {middle:.2f} is only known to "
            f"{spread:.0%}; end what else runs on it, or ask for a share of the --flops"
        )
    return statistics.median(slow) / statistics.median(fast)


class Latency:
    """What a forward pass costs, in units of the dense model's.

    Parameters
    ----------
    prepared
        The dense model with its data.
    shared
        The groups whose widths are to be chosen.
    fixed
        What other groups keep.
    widths
        What widths groups may have.

    Raises
    ------
    RequestError
        If the device is too noisy to tell, or no smaller model can be built.
    """

    def __init__(
        self,
        prepared: Prepared,
        shared: Sequence[CouplingGroup],
        fixed: Mapping[str, int],
        widths: Widths = Widths(),  # noqa: B008, as it is frozen
    ) -> None:
        self._prepared, self._batch = prepared, prepared.batches()[0]
        units = {group.name: group.units for group in prepared.groups}
        self._fixed = {name: kept for name, kept in fixed.items() if kept < units[name]}
        self._units = {group.name: group.units for group in shared}
        trials = _trials(shared, widths)
        if self._fixed:  # the largest model of the table is no longer the dense one
            trials = [dict(self._units), *trials]
        measured = self._measured_on(trials)
        kept = kept_table(measured, self._units)
        self.table = self._measured(trials) if kept is None else kept
        if kept is None:
            keep_table(measured, self.table)

    def speedup(self, kept: Mapping[str, int]) -> float:
        """Build a model of these widths, and time it against the dense one."""
        with self._built({**self._fixed, **kept}) as trial:
            return time_against(self._prepared.model, trial, self._batch)

    def _measured_on(self, trials: Sequence[Mapping[str, int]]) -> dict[str, str]:
        """Return all that a table depends on."""
        model, tensors = self._prepared.model, self._prepared.model.state_dict()
        forms = {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        return {
            **this_device(device_of(model)),
            "model": f"{type(model).__name__} {_digest([str(model), forms, str(attention)])}",
            "data": ", ".join(f"{n} {t.dtype} {[*t.shape]}" for n, t in self._batch.items()),
            "widths": _digest([self._fixed, list(trials)]),
        }

    def _measured(self, trials: Sequence[Mapping[str, int]]) -> LatencyTable:
        """Time parts of trial models, each in turns with the dense model."""
        dense, owners, taken = self._prepared.model, self._owners(), self._taken()
        timed: list[Turns] = []
        with stage("timing", total=len(trials)) as bar:
            for trial in trials:
                with self._built({**self._fixed, **trial}) as smaller:
                    timed.append(parts_in_turn(dense, smaller, list(owners), self._batch, _TURNS))
                _ratio(timed[-1].dense.sum(1), timed[-1].smaller.sum(1))
                bar.advance()
        check_alike([one.events for one in timed])
        events = timed[0].events
        whole, parts = medians(timed, alike(dense, events, self._batch, taken))
        kept = list(trials)
        if not self._fixed:
            kept, parts = [{}, *kept], [whole, *parts]
        steps = itertools.pairwise(events)
        groups = [groups_between(*step, owners) & set(self._units) for step in steps]
        return tabulated(groups, kept, parts, float(whole.sum()), self._units)

    def _owners(self) -> dict[str, frozenset[str]]:
        """Return the groups that modules have a part of, of those that may lose units."""
        owners: dict[str, frozenset[str]] = {}
        for module, group, _ in self._slots():
            owners[module] = owners.get(module, frozenset()) | {group.name}
        return owners

    def _taken(self) -> dict[str, list[tuple[Hashable, ...]]]:
        """Return what units take along of the tensors of modules, and how many units there are."""
        taken: dict[str, list[tuple[Hashable, ...]]] = {}
        for module, group, slot in self._slots():
            most = self._fixed.get(group.name, group.units)
            form = slot.tensor.rpartition(".")[2], slot.dim, slot.width, group.units, most
            taken.setdefault(module, []).append(form)
        return taken

    def _slots(self) -> Iterator[tuple[str, CouplingGroup, Slot]]:
        for group in self._prepared.groups:
            if group.name in self._units or group.name in self._fixed:
                for slot in group.slots:
                    yield slot.tensor.rpartition(".")[0], group, slot

    @contextmanager
    def _built(self, kept: Mapping[str, int]) -> Iterator[nn.Module]:
        """Yield a model that keeps the first units of each group."""
        groups = {group.name: group for group in self._prepared.groups}
        plan = PruningPlan(
            tuple(
                GroupPlan.of(groups[name], tuple(range(k)))
                for name, k in kept.items()
                if k < groups[name].units
            )
        )
        trial = copied(self._prepared.model)
        try:
            shrink(trial, plan, [self._prepared.example])
        except EquivalenceError as error:
            raise RequestError(f"no trial model can be built to time: {error}") from error
        yield trial


def _digest(values: Any) -> str:
    """Return a digest of JSON-able data."""
    return digest(json.dumps(values, sort_keys=True))


def _trials(shared: Sequence[CouplingGroup], allowed: Widths) -> list[dict[str, int]]:
    """Return what groups keep in the models that are timed for the table."""
    widths = {group.name: possible_widths(group, allowed) for group in shared}
    return [
        {name: int(some[round(share * (len(some) - 1))]) for name, some in widths.items()}
        for share in _SHARES
    ]


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
    for _ in range(MOST_ROUNDS):
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
