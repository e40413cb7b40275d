"""The time of a forward pass as a function of the units that groups keep.

A pass comes by the modules whose weights lose units.  What lies between two such events, entering a
module or leaving it, is a part: the module's own kernels, or what runs between two modules.  Parts
add up to the pass, whatever the network looks like.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graph.tracing.preserve import without_cache
from osscar.allocation.costs import CountedCost, connected_components
from osscar.base.errors import RequestError
from osscar.base.timing import interleaved
from osscar.data.batches import Batch
from osscar.network.hooks import hooks
from osscar.network.modules import forward

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class LatencyTable:
    """The cost of a model in time, relative to the dense model's.

    By the groups that a part depends on, `parts` are points: the product of the shares of units
    that these keep, from above 0 to 1, and the seconds that it took.
    """

    parts: Mapping[frozenset[str], Sequence[tuple[float, float]]]
    dense_seconds: float
    units: Mapping[str, int]
    dense = 1.0
    """The time of the model as it is."""

    def of(self, kept: Mapping[str, int]) -> float:
        """Return the time where groups keep so many units; those not named keep all."""
        times = (_at(_share(some, kept, self.units), points) for some, points in self.parts.items())
        return float(sum(times)) / self.dense_seconds

    def over(self, name: str, counts: NDArray[np.int64], kept: Mapping[str, int]) -> Seconds:
        """Return the time with each of some counts of one group, but for what it has no part in."""
        total = np.zeros(len(counts))
        for some, points in self.parts.items():
            if name in some:
                rest = _share(some - {name}, kept, self.units)
                total += _at(rest * counts / self.units[name], points)
        return total / self.dense_seconds

    def classes(self, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Return these groups in classes whose times add up."""
        chosen = list(names)
        return connected_components(chosen, (set(some.intersection(chosen)) for some in self.parts))


CostModel: TypeAlias = CountedCost | LatencyTable
"""The cost of a model whose groups keep some of their units."""


def _at(share: Any, points: Sequence[tuple[float, float]]) -> Seconds:
    """Interpolate seconds, with which an operation less is a share of the time less."""
    shares, seconds = np.array(points).T
    return np.asarray(np.interp(share, shares, seconds))


def _share(names: Iterable[str], kept: Mapping[str, int], units: Mapping[str, int]) -> float:
    return math.prod(kept.get(name, units[name]) / units[name] for name in names)


def tabulated(
    groups: Sequence[frozenset[str]],
    kept: Sequence[Mapping[str, int]],
    seconds: Sequence[Seconds],
    dense_seconds: float,
    units: Mapping[str, int],
) -> LatencyTable:
    """Return the table of what was timed.

    `groups` are those on whose widths each part depends, `kept` is what groups keep in each model,
    and `seconds` are of the parts of each of these.
    """
    parts = {}
    for names in dict.fromkeys(groups):
        mine = [index for index, some in enumerate(groups) if some == names]
        at: dict[float, list[float]] = {}
        for counts, times in zip(kept, seconds, strict=True):
            at.setdefault(_share(names, counts, units), []).append(float(times[mine].sum()))
        parts[names] = [(share, statistics.fmean(at[share])) for share in sorted(at)]
    if {} in kept:  # what depends on no width was timed with every model, the dense one among them
        dense_seconds = sum(points[-1][1] for points in parts.values())
    return LatencyTable(parts, dense_seconds, dict(units))


# ---- parts of a pass ---------------------------------------------------------------------


Event: TypeAlias = tuple[str, bool]
"""A module, without a name where a pass begins and ends, and whether the pass enters it."""


def timed_pass(
    model: nn.Module, modules: Sequence[str], batch: Batch
) -> tuple[list[Event], list[float]]:
    """Return what a pass of a model comes by, and the seconds from each event to the next."""
    card = next((tensor.device for tensor in batch.values() if tensor.is_cuda), None)
    mark, seconds = _stopwatch(card)
    events = [("", True)]

    def note(module: str, enters: bool) -> None:
        events.append((module, enters))
        mark()

    with hooks(
        model, modules, lambda name, *_: note(name, True), lambda name, *_: note(name, False)
    ):
        mark()
        forward(model, batch)
    note("", False)
    return events, seconds()


def _stopwatch(card: torch.device | None) -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """Return what marks a moment, and what returns the seconds between all that were marked.

    Kernels on a card run behind the code that calls them: the card itself takes the time.
    """
    if card is None:
        moments: list[float] = []
        return (
            lambda: moments.append(time.perf_counter()),
            lambda: [b - a for a, b in itertools.pairwise(moments)],
        )
    torch.cuda.synchronize(card)
    marks: list[torch.cuda.Event] = []

    def mark() -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(card))
        marks.append(event)

    def seconds() -> list[float]:
        torch.cuda.synchronize(card)
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    return mark, seconds


def parts_in_turn(
    dense: nn.Module, smaller: nn.Module, modules: Sequence[str], batch: Batch, turns: int
) -> tuple[list[Event], Seconds, Seconds]:
    """Time the parts of two models that call the same modules: seconds of each, (turns, parts).

    Raises
    ------
    RequestError
        If passes take different ways.
    """
    events: list[list[Event]] = []
    passes: tuple[list[list[float]], list[list[float]]] = ([], [])

    def run(model: nn.Module, into: list[list[float]]) -> list[float]:
        way, seconds = timed_pass(model, modules, batch)
        events.append(way)
        into.append(seconds)
        return []

    with torch.no_grad(), without_cache(dense), without_cache(smaller):
        pair = zip((dense, smaller), passes, strict=True)
        interleaved([partial(run, *one) for one in pair], turns, "timing")
    if any(way != events[0] for way in events):
        raise RequestError(
            "this model does not call its modules alike at every pass and width, so that its parts "
            "cannot be timed; ask for a share of the --flops"
        )
    slow, fast = (np.array(found[1:]) for found in passes)  # the first pass is a warm-up
    return events[0], slow, fast


def groups_between(
    before: Event, after: Event, owners: Mapping[str, frozenset[str]]
) -> frozenset[str]:
    """Return the groups on whose widths the time between two events depends.

    Within a module these are all that it has a part of, as `owners` tells.  What runs between two
    modules handles what both know, such as the scores of heads, or an activation of neurons.
    """
    mine, theirs = (owners.get(module, frozenset()) for module, _ in (before, after))
    return mine & theirs


def forms_of(model: nn.Module, modules: Sequence[str], batch: Batch) -> dict[str, Hashable]:
    """Return by name what modules that do the same work have in common: code, weights, inputs."""
    found: dict[str, Hashable] = {"": ""}

    def read(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        weights = tuple((p.shape, p.dtype) for p in module.parameters(recurse=False))
        found[name] = str(module), weights, tuple(x.shape for x in tensors)

    with torch.no_grad(), without_cache(model), hooks(model, modules, read):
        forward(model, batch)
    return found


def medians(
    dense: Sequence[Seconds], smaller: Sequence[Seconds], alike: Sequence[Hashable]
) -> tuple[Seconds, list[Seconds]]:
    """Return the seconds of each part, of the dense model and of all smaller ones.

    Medians are taken over turns, (turns, parts), and over parts that are `alike`.  Other work on
    the machine slows down whatever is timed at a moment: each smaller model is scaled as the dense
    model beside it.
    """
    places: dict[Hashable, list[int]] = {}
    for index, like in enumerate(alike):
        places.setdefault(like, []).append(index)

    def pooled(seconds: Seconds) -> Seconds:
        found = np.empty(len(alike))
        for mine in places.values():
            found[mine] = np.median(seconds[:, mine])
        return found

    whole = pooled(np.concatenate(dense))
    scales = [float(whole.sum() / pooled(beside).sum()) for beside in dense]
    return whole, [scale * pooled(one) for scale, one in zip(scales, smaller, strict=True)]
