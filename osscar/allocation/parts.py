"""What each part of a forward pass takes, timed where it runs.

A pass comes by the modules whose weights lose units.  What lies between two such events, entering a
module or leaving it, is a part: the module's own kernels, or what runs between two modules.  Parts
add up to the pass, whatever the network looks like.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graph.tracing.preserve import without_cache
from osscar.base.errors import RequestError
from osscar.base.timing import interleaved
from osscar.data.batches import Batch
from osscar.network.hooks import hooks
from osscar.network.modules import forward


class Event(NamedTuple):
    """A pass enters or leaves a module, whose name is empty where the pass begins and ends."""

    module: str
    enters: bool


def timed_pass(
    model: nn.Module, modules: Sequence[str], batch: Batch
) -> tuple[tuple[Event, ...], tuple[float, ...]]:
    """Return what a pass of a model comes by, and the seconds from each event to the next.

    Parameters
    ----------
    model
        The model.
    modules
        Names of its modules.
    batch
        What it runs on.
    """
    card = next((tensor.device for tensor in batch.values() if tensor.is_cuda), None)
    mark, seconds = _stopwatch(card)
    events = [Event("", True)]

    def note(module: str, enters: bool) -> None:
        events.append(Event(module, enters))
        mark()

    with hooks(
        model, modules, lambda name, *_: note(name, True), lambda name, *_: note(name, False)
    ):
        mark()
        forward(model, batch)
    note("", False)
    return tuple(events), seconds()


def _stopwatch(
    card: torch.device | None,
) -> tuple[Callable[[], None], Callable[[], tuple[float, ...]]]:
    """Return what marks a moment, and what returns the seconds between all that were marked.

    Kernels on a card run behind the code that calls them: the card itself takes the time.
    """
    if card is None:
        moments: list[float] = []
        return (
            lambda: moments.append(time.perf_counter()),
            lambda: tuple(b - a for a, b in itertools.pairwise(moments)),
        )
    torch.cuda.synchronize(card)
    marks: list[torch.cuda.Event] = []

    def mark() -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(card))
        marks.append(event)

    def seconds() -> tuple[float, ...]:
        torch.cuda.synchronize(card)
        return tuple(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))

    return mark, seconds


# ---- what parts have to do with ----------------------------------------------------------


def groups_between(
    before: Event, after: Event, owners: Mapping[str, frozenset[str]]
) -> frozenset[str]:
    """Return the groups on whose widths the time between two events depends.

    Within a module these are all that it has a part of.  What runs between two modules handles
    what both know, such as the scores of heads, or an activation of neurons.

    Parameters
    ----------
    before, after
        The events.
    owners
        The groups that each module has a part of.
    """
    mine, theirs = (owners.get(event.module, frozenset()) for event in (before, after))
    return mine & theirs


def alike(
    model: nn.Module,
    events: Sequence[Event],
    batch: Batch,
    taken: Mapping[str, Sequence[tuple[Hashable, ...]]],
) -> list[Hashable]:
    """Return for each part what it has in common with those that do the same work.

    Parameters
    ----------
    model
        The dense model.
    events
        What its passes come by.
    batch
        What it runs on.
    taken
        What units take along of the tensors of each module that is watched.
    """
    shapes: dict[str, Hashable] = {}

    def read(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        shapes[name] = tuple(tuple(x.shape) for x in tensors)

    with torch.no_grad(), without_cache(model), hooks(model, list(taken), read):
        forward(model, batch)

    def like(event: Event) -> Hashable:
        name = event.module
        if not name:
            return event
        module = model.get_submodule(name)
        forms = tuple((tuple(p.shape), str(p.dtype)) for p in module.parameters(recurse=False))
        units = tuple(sorted(taken[name], key=str))
        return event.enters, str(module), forms, shapes.get(name), units

    return [(like(before), like(after)) for before, after in itertools.pairwise(events)]


# ---- many passes -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Turns:
    """Passes of the dense and of a smaller model, in turns.

    Parameters
    ----------
    events
        What all of them came by.
    dense, smaller
        Seconds, (turns, parts).
    """

    events: tuple[Event, ...]
    dense: NDArray[np.float64]
    smaller: NDArray[np.float64]


def parts_in_turn(
    dense: nn.Module, smaller: nn.Module, modules: Sequence[str], batch: Batch, turns: int
) -> Turns:
    """Time the parts of two models that call the same modules.

    Raises
    ------
    RequestError
        If passes take different ways.
    """
    passes: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
    ways: list[tuple[Event, ...]] = []

    def timing(model: nn.Module, into: list[tuple[float, ...]]) -> Callable[[], list[float]]:
        def run() -> list[float]:
            events, seconds = timed_pass(model, modules, batch)
            ways.append(events)
            into.append(seconds)
            return []

        return run

    with torch.no_grad(), without_cache(dense), without_cache(smaller):
        interleaved([timing(dense, passes[0]), timing(smaller, passes[1])], turns, "timing")
    check_alike(ways)
    # The first pass of each is a warm-up.
    return Turns(ways[0], *(np.array(found[1:]) for found in passes))


def check_alike(events: Sequence[tuple[Event, ...]]) -> None:
    """Refuse passes that did not all come by the same.

    Raises
    ------
    RequestError
        If one took another way.
    """
    if any(one != events[0] for one in events):
        raise RequestError(
            "this model does not call its modules alike at every pass and width, so that its parts "
            "cannot be timed; ask for a share of the --flops"
        )


def medians(
    timed: Sequence[Turns], alike: Sequence[Hashable]
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Return the seconds of each part, of the dense model and of all smaller ones.

    Medians are taken over turns and over parts that are alike.  Other work on the machine slows
    down whatever is timed at a moment: each smaller model is scaled as the dense model beside it.

    Parameters
    ----------
    timed
        Turns of the dense model with a smaller one each.
    alike
        Parts for which this is the same do the same work.
    """
    places: dict[Hashable, list[int]] = {}
    for index, like in enumerate(alike):
        places.setdefault(like, []).append(index)

    def pooled(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.empty(len(alike))
        for mine in places.values():
            found[mine] = np.median(seconds[:, mine])
        return found

    dense = pooled(np.concatenate([one.dense for one in timed]))
    scales = [float(dense.sum() / pooled(one.dense).sum()) for one in timed]
    return dense, [scale * pooled(one.smaller) for scale, one in zip(scales, timed, strict=True)]
