"""Times of smaller models, measured here, and widths that are chosen to be as fast as is wanted.

Models that keep a few shares of the units of all groups, any units, are built, one after the other,
and every part of their passes is timed beside the dense model's: that gives a table of seconds over
widths.  A choice of widths by this table is then built and timed whole, and the limit moved should
it have missed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from graph import CouplingGroup
from graph.tracing.preserve import without_cache
from osscar.allocation.latency_table import (
    LatencyTable,
    forms_of,
    groups_between,
    medians,
    parts_in_turn,
    tabulated,
)
from osscar.allocation.widths import possible_widths
from osscar.base.devices import clock_of
from osscar.base.errors import EquivalenceError, RequestError
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
    return _ratio_of_medians(slow, fast)


def _ratio_of_medians(slow: Sequence[float], fast: Sequence[float]) -> float:
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


def latency_table(
    prepared: Prepared, shared: Sequence[CouplingGroup], fixed: Mapping[str, int], widths: Widths
) -> LatencyTable:
    """Time the parts of trial models, each in turns with the dense model.

    `fixed` is what other groups keep than the `shared` ones, whose widths are to be chosen.

    Raises
    ------
    RequestError
        If the device is too noisy to tell, or no smaller model can be built.
    """
    dense, batch = prepared.model, prepared.batches()[0]
    units = {group.name: group.units for group in shared}
    fixed = {g.name: fixed[g.name] for g in prepared.groups if fixed.get(g.name, g.units) < g.units}
    options = {group.name: possible_widths(group, widths) for group in shared}
    trials = [
        {name: int(some[round(share * (len(some) - 1))]) for name, some in options.items()}
        for share in _SHARES
    ]
    if fixed:  # the largest model of the table is no longer the dense one
        trials = [units, *trials]
    owners: dict[str, frozenset[str]] = {}
    for group in prepared.groups:
        for slot in group.slots if group.name in {*units, *fixed} else ():
            module = slot.tensor.rpartition(".")[0]
            owners[module] = owners.get(module, frozenset()) | {group.name}
    slow, fast, forms = [], [], [forms_of(dense, list(owners), batch)]
    with stage("timing", total=len(trials)) as bar:
        for trial in trials:
            smaller = built(prepared, {**fixed, **trial})
            events, of_dense, of_smaller = parts_in_turn(
                dense, smaller, list(owners), batch, _TURNS
            )
            _ratio_of_medians(of_dense.sum(1).tolist(), of_smaller.sum(1).tolist())
            slow.append(of_dense)
            fast.append(of_smaller)
            forms.append(forms_of(smaller, list(owners), batch))
            bar.advance()
    steps = list(itertools.pairwise(events))
    alike = [
        tuple((enters, form[module]) for form in forms for module, enters in step) for step in steps
    ]
    whole, seconds = medians(slow, fast, alike)
    if not fixed:
        trials, seconds = [{}, *trials], [whole, *seconds]
    groups = [groups_between(*step, owners) & set(units) for step in steps]
    return tabulated(groups, trials, seconds, float(whole.sum()), units)


def built(prepared: Prepared, kept: Mapping[str, int]) -> nn.Module:
    """Return a copy of the dense model that keeps the first units of each group.

    Raises
    ------
    RequestError
        If it cannot be built.
    """
    fewer = [(g, range(kept[g.name])) for g in prepared.groups if g.name in kept]
    plans = (GroupPlan.of(g, tuple(some)) for g, some in fewer if len(some) < g.units)
    smaller = copied(prepared.model)
    try:
        shrink(smaller, PruningPlan(tuple(plans)), [prepared.example])
    except EquivalenceError as error:
        raise RequestError(f"no trial model can be built to time: {error}") from error
    return smaller


def aimed(
    prepared: Prepared,
    fixed: Mapping[str, int],
    wanted: float,
    choose: Callable[[float], dict[str, int]],
) -> tuple[dict[str, int], float]:
    """Return widths whose model was timed to be as fast as wanted, and how fast that was.

    `choose` returns the best widths within a limit of the modelled time, and `fixed` is what other
    groups keep.
    """
    batch = prepared.batches()[0]
    # Modelled times of models that were too slow and fast enough, with their real times.
    slow, slow_time = 1.0, 1.0
    fast: float | None = None
    fast_time, best, limit = 0.0, None, 1.0 / wanted
    for _ in range(MOST_ROUNDS):
        try:
            kept = choose(limit)
            measured = time_against(prepared.model, built(prepared, {**fixed, **kept}), batch)
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
