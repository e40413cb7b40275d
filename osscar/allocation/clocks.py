"""Clocks: they time operators, at the shapes that these have with some widths, and whole models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from timeit import Timer
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graph import DependencyGraph, Operator, Size
from osscar.base.timing import busy_clock
from osscar.network.modules import device_of

OperatorCall = tuple[Operator, Callable[[Size], int]]
"""An operator, and what returns the values of its sizes."""

_ON_CARD = 10
"""Calls of an operator in a row."""


class Clock(Protocol):
    """Times operators and whole models, as and where the smaller model is to be fast."""

    @property
    def described(self) -> str:
        """What is timed, where, and with how many threads."""

    @property
    def traced(self) -> DependencyGraph:
        """The operators of what is timed, with the shapes that they have there."""

    @property
    def dense(self) -> Timer:
        """What runs the dense model once."""

    def timer(self, model: nn.Module) -> Timer:
        """Return what runs a smaller model once."""

    def ready(self, calls: Sequence[OperatorCall]) -> list[Callable[[], float]]:
        """Return for each call of an operator what runs it once, and returns its seconds.

        That is NaN, or it raises, where the operator cannot be called at these sizes.
        """


# ---- in torch ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InTorch:
    """Calls operators on random tensors, and models, on the device of the dense one.

    Parameters
    ----------
    run
        Returns what runs a model once.
    channels_last
        Whether the inputs of models are so; weights say so themselves.
    """

    model: nn.Module
    traced: DependencyGraph
    described: str
    run: Callable[[nn.Module], Callable[[], Any]]
    channels_last: bool = False
    _random: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        device = device_of(self.model)
        generator = torch.Generator(device).manual_seed(0)
        made = torch.rand(1 << 16, generator=generator, device=device)
        object.__setattr__(self, "_random", made)

    @cached_property
    def dense(self) -> Timer:
        """What runs the dense model once."""
        return self.timer(self.model)

    def timer(self, model: nn.Module) -> Timer:
        """Return what runs a model once."""
        return Timer(self.run(model), timer=busy_clock)

    def ready(self, calls: Sequence[OperatorCall]) -> list[Callable[[], float]]:
        """Return for each call of an operator what runs it; tensors lie elsewhere each time."""
        return [partial(self._seconds, *call) for call in calls]

    def _seconds(self, operator: Operator, size: Callable[[Size], int]) -> float:
        given = operator.arguments_at(size, self._tensor)
        # The work of one call hides on a card behind that of giving it.
        number = 1 if self._random.device.type == "cpu" else _ON_CARD
        began = busy_clock()
        for _ in range(number):
            operator.function(**given)
        return (busy_clock() - began) / number

    @cached_property
    def _last(self) -> bool:
        return self.channels_last or any(is_channels_last(one) for one in self.model.parameters())

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:  # indices, and masks that hide nothing
            return torch.full(shape, dtype is torch.bool, dtype=dtype, device=self._random.device)
        number = math.prod(shape)
        copies = -(-number // len(self._random))
        made = self._random.to(dtype).repeat(copies)[:number].view(shape)
        last = self._last and len(shape) == 4
        return made.contiguous(memory_format=torch.channels_last) if last else made


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of images, or of filters, are their last dimension in memory."""
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)
