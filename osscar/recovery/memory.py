"""How a model is trained in the memory that there is.

A step is tried as is asked.  If it takes too much memory, micro-batches are halved, then
activations are checkpointed (Chen et al., 2016), then adapters are trained.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from osscar.base.devices import multiplies_bfloat16
from osscar.base.errors import NoMemoryError, OptionError, OsscarError, first_line
from osscar.base.inputs import parse_size
from osscar.base.memory import DeviceMemory, in_words, is_shortage, memory_of
from osscar.network.hooks import other_forwards
from osscar.network.modules import device_of, tensors_in
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import Setup
from osscar.recovery.weights import adaptable, has_peft

T = TypeVar("T")

CHOSEN = ("micro_batch_size", "checkpointing", "lora", "mixed_precision")
"""The fields of a request that are chosen here unless they are given."""

_RANK = 16
"""Rank of the adapters that are trained if the weights do not fit."""

_USED = 0.9
"""The share of free memory that a step may take: other processes may take some, and memory is
looked at after each operator, which has made its result by then."""


def first_options_that_fit(
    setup: Setup, build: Callable[[RecoveryRequest], T], tell: Callable[[str], None]
) -> T:
    """Return what `build` makes, by trying a step, of the first options that fit into memory."""
    asked, memory = setup.request, memory_of(device_of(setup.dense))
    memory.give_back()
    if asked.max_memory is not None:
        memory.give_back_at_once()
        limit: int | None = parse_size(asked.max_memory)
    else:
        free = memory.available()
        limit = None if free is None else memory.resident() + int(_USED * free)
    half = multiplies_bfloat16(device_of(setup.dense))
    precision = asked.mixed_precision or ("bf16" if half else "no")
    left, short = _options_by_memory(setup, precision), ""
    while (options := next(left, None)) is not None:
        try:
            with nullcontext() if limit is None else _Limit(memory, limit):
                built = build(options)
            if short:
                tell(f"memory: trains with {_in_words(options)}, as more does not fit")
            return built
        except (RuntimeError, MemoryError, OsscarError) as error:
            if is_shortage(error):
                short = f"{_in_words(options)}: {first_line(error):.200}"
            elif options.mixed_precision == "bf16" and asked.mixed_precision is None:
                left = _options_by_memory(setup, "no")
            elif not (short and isinstance(error, OptionError)):  # of what was not asked for
                raise
        gc.collect()
        memory.give_back()
    raise NoMemoryError(
        f"there is no memory for a step of the recovery of {type(setup.model).__name__}, with "
        f"{short}; give more (max_memory, `--max-memory`, of the whole process), shorter or "
        f"smaller samples, or "
        "a machine with more memory"
    )


def _options_by_memory(setup: Setup, precision: Literal["bf16", "no"]) -> Iterator[RecoveryRequest]:
    """Yield what is asked for, and then options that take less and less memory."""
    asked, inputs = setup.request, setup.inputs
    # A CPU multiplies several windows in float32 no faster than one after the other.
    alone = inputs.tokens and device_of(setup.dense).type == "cpu" and precision == "no"
    at_once = 1 if inputs.alone else asked.micro_batch_size or (1 if alone else setup.size)
    options = replace(asked, mixed_precision=precision, micro_batch_size=at_once)
    yield options
    while asked.micro_batch_size is None and at_once > 1:
        at_once //= 2
        options = replace(options, micro_batch_size=at_once)
        yield options
    if not options.checkpointing and blocks(setup.model):
        options = replace(options, checkpointing=True)
        yield options
    if options.lora is None and has_peft() and adaptable(setup.model):
        yield replace(options, lora=_RANK)


def _in_words(options: RecoveryRequest) -> str:
    adapters = "" if options.lora is None else f", adapters of rank {options.lora}"
    checkpointed = ", checkpointed activations" if options.checkpointing else ""
    return f"micro-batches of {options.micro_batch_size}{checkpointed}{adapters}"


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ends a pass after the first operator that leaves a device with more than a limit in use."""

    def __init__(self, memory: DeviceMemory, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._limit = memory, limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and look at what is in use."""
        result = func(*args, **(kwargs or {}))
        if self._memory.excess(0, self._limit) > 0:
            raise NoMemoryError(f"it takes more than {in_words(self._limit)} in all")
        return result


# ---- activations that are computed again -------------------------------------------------


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model: transformers' own, or of one class in a list."""
    found = {one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)}
    if not found:
        for holder in model.modules():
            if isinstance(holder, nn.ModuleList | nn.Sequential):
                classes = Counter(map(type, holder))
                found |= {one for one in holder if classes[type(one)] > 1 and any(one.children())}
    inner = {below for one in found for below in one.modules() if below is not one}
    return [one for one in model.modules() if one in found - inner]


def checkpointing(model: nn.Module) -> AbstractContextManager[None]:
    """Let each block keep only its inputs for the backward pass, also in evaluation mode."""
    repeated = blocks(model)
    if not repeated:
        raise OptionError(
            f"checkpointing needs repeated blocks, and {type(model).__name__} has none; omit it"
        )
    return other_forwards([(block, _checkpointed(block)) for block in repeated])


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in inputs]
        result = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if [tensor._version for tensor in inputs] != versions:
            raise OptionError(
                f"{type(block).__name__} writes to its inputs, so that its activations cannot be "
                "computed again; omit checkpointing"
            )
        return result

    return call
