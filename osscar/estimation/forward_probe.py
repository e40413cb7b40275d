"""A forward pass of a few calibration samples, timed at every layer that is to be refitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from osscar.base.timing import Clock
from osscar.data.batches import Batch
from osscar.network.modules import fresh
from osscar.preparation.failures import batch_named
from osscar.preparation.opened import Opened
from osscar.preparation.recurrent import RECURRENT, input_gates
from osscar.preparation.routing import Routed, argument, copied_call

_CHEAP_SECONDS = 0.5
"""For so long, more samples than are needed may run."""


@dataclass(frozen=True)
class TimedPass:
    """When samples of the calibration data reach the consumers.

    Parameters
    ----------
    samples
        How many were run.
    seconds
        Of the whole pass.
    before, after
        When each call of a consumer began and ended, in seconds.
    shapes
        Of what each consumer was called with.
    """

    samples: int
    seconds: float
    before: tuple[float, ...]
    after: tuple[float, ...]
    shapes: Mapping[str, Sequence[torch.Size]] = field(repr=False)


@dataclass(frozen=True)
class ForwardCosts:
    """What forward passes take, by the number of samples that run at once.

    Parameters
    ----------
    few, many
        A pass of one sample, and of more.
    """

    few: TimedPass
    many: TimedPass

    def seconds(self, samples: int) -> float:
        """Return what a pass of so many samples takes, along the line through both."""
        more = self.many.samples - self.few.samples
        if more <= 0:
            return self.few.seconds * samples / self.few.samples
        slope = max(self.many.seconds - self.few.seconds, 0.0) / more
        if samples >= self.many.samples:
            slope = max(slope, 0.5 * self.many.seconds / self.many.samples)
        return max(self.many.seconds + slope * (samples - self.many.samples), 1e-9)

    def until(self, call: int) -> tuple[float, float]:
        """Return the shares of a pass that the pruned and the dense stream take up to a call.

        Where targets need what the dense model puts out, batches of the pruned stream stand before
        the call, and each consumer so far has computed its outputs twice; the others stand after.
        """
        run = self.many
        twice = sum(
            b - a for a, b in zip(run.before, run.after, strict=True) if a <= run.before[call]
        )
        return (run.before[call] + twice) / run.seconds, run.after[call] / run.seconds

    def share(self, call: int) -> float:
        """Return the share of a pass that comes before a call."""
        return self.many.before[call] / self.many.seconds


Seen: TypeAlias = dict[str, list[tuple[Any, Tensor]]]
"""What modules were called with, and what they put out."""


def timed_pass(
    ready: Opened, batch: Batch, names: Sequence[str], kept: Sequence[str], clock: Clock
) -> tuple[TimedPass, Seen]:
    """Run some samples through the dense model.

    Parameters
    ----------
    ready
        The model.
    batch
        What it reads.
    names
        The consumers, whose calls are timed.
    kept
        Those of which what they read and put out is returned.
    clock
        What time is.
    """
    before: list[float] = []
    after: list[float] = []
    seen: Seen = {name: [] for name in kept}
    shapes: dict[str, list[torch.Size]] = {name: [] for name in names}
    began = copying = 0.0

    def passed() -> float:
        return clock() - began - copying

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            before.append(passed())

        def end(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            nonlocal copying
            after.append(passed())
            x = argument(module, args, kwargs)
            shapes[name].append((x.hidden if isinstance(x, Routed) else x).shape)
            if name in seen:
                since = clock()  # no pass of the run copies anything
                y = input_gates(module, x) if isinstance(module, RECURRENT) else y
                seen[name].append((copied_call(x), y.detach().clone()))
                copying += clock() - since

        return begin, end

    with ExitStack() as stack, torch.no_grad(), batch_named(ready.model, 0):
        for name in names:
            module = ready.model.get_submodule(name)
            begin, end = hooks(name)
            for handle in (
                module.register_forward_pre_hook(begin, with_kwargs=True),
                module.register_forward_hook(end, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        inputs = fresh(batch)
        began = clock()
        ready.model(**inputs)
        seconds = passed()
    samples = ready.inputs.count(batch)
    return TimedPass(samples, max(seconds, 1e-9), tuple(before), tuple(after), shapes), seen


def first_samples(ready: Opened, count: int) -> Batch:
    """Return the first calibration samples, at most a batch of them."""
    return ready.inputs.rows(ready.batches()[0], 0, count)


def probed_samples(ready: Opened, one: TimedPass) -> int:
    """Return how many samples to run: few of all, unless they are quickly run."""
    batch = ready.inputs.count(ready.batches()[0])
    few = -(-ready.inputs.samples // 32)
    return max(1, min(batch, max(few, int(_CHEAP_SECONDS / one.seconds))))
