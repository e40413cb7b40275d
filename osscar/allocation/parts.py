"""What each part of a forward pass takes, timed where it runs.

A pass comes by the modules whose weights lose units.  What lies between two such events, entering a
module or leaving it, is a part: the module's own kernels, or what runs between two modules.  Parts
add up to the pass, whatever the network looks like.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graph.tracing.preserve import without_cache
from osscar.base.errors import RequestError
from osscar.base.timing import interleaved
from osscar.data.batches import Batch
from osscar.network.modules import fresh


@dataclass(frozen=True)
class Event:
    """A pass enters or leaves a module.

    Parameters
    ----------
    module
        Its name; empty at the beginning and the end of the pass.
    enters
        Whether it enters.
    """

    module: str
    enters: bool


@dataclass(frozen=True)
class Pass:
    """What a pass came by, and the seconds from each event to the next."""

    events: tuple[Event, ...]
    seconds: tuple[float, ...]


class _Clock(Protocol):
    """Takes the time of events, and tells what lies between them once all have happened."""

    def mark(self) -> None: ...

    def seconds(self) -> tuple[float, ...]: ...


class _HostClock:
    """Kernels have ended when a call returns."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        return tuple(b - a for a, b in itertools.pairwise(self._marks))


class _CardClock:
    """Kernels run behind the code that calls them: the card itself takes the time."""

    def __init__(self, card: torch.device) -> None:
        torch.cuda.synchronize(card)
        self._card = card
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._card))
        self._marks.append(event)

    def seconds(self) -> tuple[float, ...]:
        torch.cuda.synchronize(self._card)
        return tuple(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self._marks))


def timed_pass(model: nn.Module, modules: Sequence[str], batch: Batch) -> Pass:
    """Run a model once, and time what lies between the calls of some modules.

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
    clock: _Clock = _HostClock() if card is None else _CardClock(card)
    events = [Event("", True)]

    def note(event: Event) -> None:
        events.append(event)
        clock.mark()

    with _hooked(model, modules, note):
        clock.mark()
        model(**fresh(batch))
    note(Event("", False))
    return Pass(tuple(events), clock.seconds())


def input_shapes(model: nn.Module, modules: Sequence[str], batch: Batch) -> dict[str, Any]:
    """Return the shapes of the tensors that modules read at their last call."""
    shapes: dict[str, Any] = {}

    def reader(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            shapes[name] = tuple(tuple(x.shape) for x in tensors)

        return read

    handles = [
        model.get_submodule(name).register_forward_pre_hook(reader(name), with_kwargs=True)
        for name in modules
    ]
    try:
        model(**fresh(batch))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


@contextmanager
def _hooked(
    model: nn.Module, modules: Sequence[str], note: Callable[[Event], None]
) -> Iterator[None]:
    def noting(event: Event) -> Callable[..., None]:
        return lambda *_: note(event)

    handles = []
    try:
        for name in modules:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(noting(Event(name, True))))
            handles.append(module.register_forward_hook(noting(Event(name, False))))
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def likeness(
    model: nn.Module, event: Event, shape: Hashable, taken: Iterable[Hashable]
) -> Hashable:
    """Return what events have in common behind which modules do the same work.

    Parameters
    ----------
    model
        The dense model.
    event
        One of its passes.
    shape
        Of what the module reads.
    taken
        What units take along of its tensors.
    """
    if not event.module:
        return event
    module = model.get_submodule(event.module)
    forms = tuple((tuple(p.shape), str(p.dtype)) for p in module.parameters(recurse=False))
    return event.enters, str(module), forms, shape, tuple(taken)


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
    passes: tuple[list[Pass], list[Pass]] = ([], [])

    def timing(model: nn.Module, into: list[Pass]) -> Callable[[], list[float]]:
        def run() -> list[float]:
            into.append(timed_pass(model, modules, batch))
            return []

        return run

    with torch.no_grad(), without_cache(dense), without_cache(smaller):
        interleaved([timing(dense, passes[0]), timing(smaller, passes[1])], turns, "timing")
    check_alike([one.events for one in (*passes[0], *passes[1])])
    # The first pass of each is a warm-up.
    first, second = (np.array([one.seconds for one in found[1:]]) for found in passes)
    return Turns(passes[0][0].events, first, second)


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
