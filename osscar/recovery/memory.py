"""What a recovery needs in memory, told before it starts; and the way to train that fits a limit.

Two micro-batches run on shapes alone, through the code that trains, while all tensors that come and
go are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from osscar.base.errors import NoMemoryError, OptionError
from osscar.base.inputs import parse_size
from osscar.base.memory import in_words
from osscar.network.fake import on_shapes
from osscar.network.model_state import ModelState
from osscar.network.modules import copied, device_of
from osscar.offload.device_memory import memory_of
from osscar.recovery.adapters import adaptable, has_peft
from osscar.recovery.checkpointing import blocks
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.training import Training

CHOSEN = ("micro_batch_size", "checkpointing", "lora")
"""The fields of a request in which ways to train differ."""

_RANK = 16
"""Of the adapters that are trained where the weights themselves do not fit."""

_CACHED = 0.55
"""The share of what passes need that the CPU's allocator keeps besides, in blocks that were freed
and are of no size that is asked for again: see ``benchmarks/recovery_memory.py``."""

_MOMENTS = 2
"""Numbers that AdamW keeps of each weight."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a recovery needs, about, besides what the process has already.

    Parameters
    ----------
    weights
        The copy that is trained, and one of the dense model if that is on another device; without
        what the two share.
    shared
        Weights of the copy that are the dense model's own in a step.
    best
        The values that were best so far.
    gradients
        Of what is trained.
    moments
        What AdamW keeps of it.
    passes
        What passes keep for the gradients, and make on their way.
    cached
        What the CPU's allocator keeps of memory that was freed, about.
    held_out
        What the dense model says of the samples that decide.
    """

    weights: int
    shared: int
    best: int
    gradients: int
    moments: int
    passes: int
    cached: int
    held_out: int

    @property
    def total(self) -> int:
        """The copy has weights of its own where it is judged, adapters merged, and at the end."""
        always = self.weights + self.best + self.moments + self.cached + self.held_out
        return always + max(self.gradients + self.passes, self.shared)


def room(device: torch.device, limit: str | int | None) -> int | None:
    """Return how many bytes a recovery may take: what a limit leaves, or what is free if known.

    A limit is of the whole process, as it is where models are read.
    """
    memory = memory_of(device)
    if limit is not None:
        return max(0, parse_size(limit) - memory.held())
    found = memory.available()
    if found is None or device.type == "cpu":
        return found
    return found - memory.held()  # of a card, what is held counts as available


def fitting(
    request: RecoveryRequest,
    model: nn.Module,
    at_once: int,
    space: int | None,
    setup: Callable[[RecoveryRequest], Training],
) -> tuple[RecoveryRequest, Memory]:
    """Return the first of the ways to train that fits, as a request, and what it needs.

    Parameters
    ----------
    request
        What is asked for.
    model
        What is to be trained.
    at_once
        Samples of a pass where nothing else is asked for.
    space
        How many bytes there are; None: any number.
    setup
        Sets up a training as a request has it.

    Raises
    ------
    NoMemoryError
        If none fits.
    OptionError
        If the model cannot be trained as is asked.
    """
    found = list[tuple[RecoveryRequest, Memory]]()
    for way in _ways(request, model, at_once):
        try:
            memory = needed(setup(way))
        except OptionError:
            if not found:
                raise
            continue  # nobody has asked for this way
        found.append((way, memory))
        if space is None or memory.total <= space:
            return way, memory
    assert space is not None
    way, least = min(found, key=lambda one: one[1].total)
    raise NoMemoryError(
        f"the recovery of {type(model).__name__} needs {in_words(found[0][1].total)} besides what "
        f"the process has, at the least {in_words(least.total)} ({way_in_words(way)}), and there "
        f"are {in_words(space)} for it; give more (--max-memory, of the whole process), shorter or "
        "smaller samples, or a machine with more memory"
    )


def _ways(request: RecoveryRequest, model: nn.Module, at_once: int) -> Iterator[RecoveryRequest]:
    """Yield what is asked for, and ways that take less and less memory."""
    way = replace(request, micro_batch_size=at_once)
    yield way
    while request.micro_batch_size is None and way.micro_batch_size != 1:
        way = replace(way, micro_batch_size=at_once // 2)
        at_once //= 2
        yield way
    if not way.checkpointing and blocks(model):
        way = replace(way, checkpointing=True)
        yield way
    if way.lora is None and way.train == "all" and has_peft() and adaptable(model):
        yield replace(way, lora=_RANK)


def way_in_words(way: RecoveryRequest) -> str:
    """Say how a recovery trains, as far as memory depends on it."""
    adapters = "" if way.lora is None else f", adapters of rank {way.lora}"
    checkpointing = ", checkpointing" if way.checkpointing else ""
    return f"micro-batches of {way.micro_batch_size}{checkpointing}{adapters}"


def needed(training: Training) -> Memory:
    """Return what a training needs, which no step of was made.

    Where a pass cannot run on shapes alone, as where code branches on values, it is measured.
    """
    own, others = _storages(training.model), _storages(training.dense)
    trained = sum(weight.nbytes for weight in training.weights().values())
    try:
        with on_shapes():
            work, dense = copied(training.model), copied(training.dense)
            state = ModelState(work, training.state.written)
            most = _most_in_passes(replace(training, model=work, dense=dense, state=state))
    except OptionError:
        raise
    except Exception:  # the model may be anyone's code
        most = _most_in_passes(training)
        training.model.zero_grad()
    passes = max(0, most - trained)
    on_cpu = device_of(training.model).type == "cpu"
    return Memory(
        weights=sum(size for key, size in own.items() if key not in others),
        shared=sum(size for key, size in own.items() if key in others),
        best=trained,
        gradients=trained,
        moments=_MOMENTS * trained,
        passes=passes,
        cached=int(_CACHED * passes) if on_cpu else 0,
        held_out=_size(training.held.expected),
    )


def _most_in_passes(training: Training) -> int:
    """Return the most bytes of tensors that passes make, gradients included."""
    live = _Live()
    with live:
        training.try_passes()
    return live.most


def _storages(model: nn.Module) -> dict[int, int]:
    """Return the sizes of the storages of a model, by what identifies them."""
    storages = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _size(outputs: Any) -> int:
    leaves = [x.untyped_storage() for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in leaves}.values())


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators make while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and look at what it returns."""
        given = [x.untyped_storage() for x in _tensors((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        before = {storage._cdata for storage in given}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.remove(key)
        self._now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [
        x for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.layout is torch.strided
    ]
