"""The way to train that fits into memory: a step is tried, and where it takes too much a lesser."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from osscar.base.errors import NoMemoryError, OptionError, OsscarError, first_line
from osscar.base.inputs import parse_size
from osscar.base.memory import in_words, is_shortage
from osscar.offload.device_memory import DeviceMemory, memory_of
from osscar.recovery.adapters import adaptable, has_peft
from osscar.recovery.checkpointing import blocks
from osscar.recovery.request import RecoveryRequest

CHOSEN = ("micro_batch_size", "checkpointing", "lora")
"""The fields of a request in which ways to train differ."""

_RANK = 16
"""Of the adapters that are trained where the weights themselves do not fit."""

_USED = 0.9
"""The share of what is free that a step may take: another process may take some, and an operator
has made its result before anybody looks."""


def way_that_fits(
    request: RecoveryRequest,
    model: nn.Module,
    at_once: int,
    device: torch.device,
    try_steps: Callable[[RecoveryRequest], None],
) -> RecoveryRequest:
    """Return the first of the ways to train of which a step fits into memory, as a request.

    Parameters
    ----------
    request
        What is asked for.
    model
        What is to be trained.
    at_once
        Samples of a pass where nothing else is asked for.
    device
        Where it is trained.
    try_steps
        Makes steps as a request has it, and leaves nothing of them.

    Raises
    ------
    NoMemoryError
        If none fits.
    OptionError
        If the model cannot be trained as is asked.
    """
    memory = memory_of(device)
    memory.give_back()
    free = memory.available() if request.max_memory is None else None
    limit = None if free is None else memory.held() + int(_USED * free)
    if request.max_memory is not None:
        memory.give_back_at_once()
        limit = parse_size(request.max_memory)
    short = ""
    for way in _ways(request, model, at_once):
        try:
            with nullcontext() if limit is None else _Limit(memory, limit):
                try_steps(way)
            return way
        except (RuntimeError, MemoryError, OsscarError) as error:
            if isinstance(error, OptionError) and short:
                continue  # nobody has asked for this way
            if not is_shortage(error):
                raise
            short = f"{way_in_words(way)}: {first_line(error):.200}"
        gc.collect()
        memory.give_back()
    raise NoMemoryError(
        f"there is no memory for a step of the recovery of {type(model).__name__}, with {short}; "
        "give more (--max-memory, of the whole process), shorter or smaller samples, or a machine "
        "with more memory"
    )


def _ways(request: RecoveryRequest, model: nn.Module, at_once: int) -> Iterator[RecoveryRequest]:
    """Yield what is asked for, and ways that take less and less memory."""
    way = replace(request, micro_batch_size=at_once)
    yield way
    while request.micro_batch_size is None and at_once > 1:
        at_once //= 2
        way = replace(way, micro_batch_size=at_once)
        yield way
    if not way.checkpointing and blocks(model):
        way = replace(way, checkpointing=True)
        yield way
    if way.lora is None and has_peft() and adaptable(model):
        yield replace(way, lora=_RANK)


def way_in_words(way: RecoveryRequest) -> str:
    """Say how a recovery trains, as far as memory depends on it."""
    adapters = "" if way.lora is None else f", adapters of rank {way.lora}"
    checkpointing = ", checkpointing" if way.checkpointing else ""
    return f"micro-batches of {way.micro_batch_size}{checkpointing}{adapters}"


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ends a pass at the first operator after which a device has more than a limit in use."""

    def __init__(self, memory: DeviceMemory, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._limit = memory, limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and look at what is in use."""
        result = func(*args, **(kwargs or {}))
        if self._memory.excess(0, self._limit) > 0:
            raise NoMemoryError(f"it takes more than {in_words(self._limit)} in all")
        return result
