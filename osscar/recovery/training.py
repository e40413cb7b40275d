"""The training loop of a recovery; held-out samples decide what is kept."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import get_constant_schedule, get_cosine_with_min_lr_schedule_with_warmup

from osscar.base.progress import stage
from osscar.base.ranks import Ranks
from osscar.data.batches import Batch
from osscar.network.modules import device_of
from osscar.recovery.log import Point, RecoveryLog, Standing
from osscar.recovery.target import HeldOut

_WARMUP, _FLOOR = 0.1, 0.1
"""The share of the steps in which the rate rises; the share of its height at which it ends."""

_CLIP = 1.0
"""The largest norm of a gradient."""

_CHECKS = 8
"""Times that the held-out samples are looked at, evenly spread over the steps."""

_PATIENCE = 4
"""Looks without a better one after which the training ends."""

_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
_PROBE = 2
"""Learning rates that are tried one after the other, and steps with each of them."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


@dataclass(frozen=True, eq=False)
class Training:
    """What a training is made of.

    Parameters
    ----------
    model
        Trained in place, in evaluation mode: a step neither draws nor averages anything.  What
        takes no gradient stays as it is.
    dense
        What it is trained towards, on the same device.
    samples
        That it is trained on, one a batch.
    held
        Those that decide.
    ranks
        Share out the samples of a step.
    size, at_once
        Samples of a step, of all ranks, and of a pass of one of them.
    precision
        Number format of matrix products; None: the models' own.
    seed
        Of the order of the samples.
    augmented
        Changes a sample, given the number of its turn.
    """

    model: nn.Module
    dense: nn.Module
    samples: Sequence[Batch] = field(repr=False)
    held: HeldOut = field(repr=False)
    ranks: Ranks
    size: int
    at_once: int
    precision: torch.dtype | None
    seed: int
    augmented: Callable[[Batch, int], Batch] = lambda sample, _: sample

    def weights(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def run(self, steps: int, rate: float, log: RecoveryLog | None = None) -> tuple[Point, ...]:
        """Train, and leave the model as it was where it was best.

        Parameters
        ----------
        steps
            Of the optimizer.
        rate
            The learning rate at its height.
        log
            Keeps where it stands, so that a run which was killed goes on.

        Returns
        -------
        tuple of Point
            The first is the model as it came, and each look at the held-out samples adds one; see
            `kept_point`.
        """
        optimizer = _Optimizer(self, rate, steps)
        known = self.ranks.broadcast(
            "where the recovery stands", lambda: None if log is None else log.last()
        )
        if known is None:
            points, best = [Point(0, None, self.held.distance(self.model), 0.0)], self._values()
        else:
            points = list(known.points)
            best = optimizer.restore(known.tensors, points[-1].step)
        began, losses = time.perf_counter() - points[-1].seconds, list[float]()
        every = math.ceil(steps / _CHECKS)
        with stage("recover", total=steps) as bar:
            for step, samples in enumerate(self._steps(steps), 1):
                bar.advance()
                if step <= points[-1].step:
                    continue
                if _is_over(points):
                    break
                losses.append(optimizer.step(samples))
                if step % every and step < steps:
                    continue
                loss, held = _finite(sum(losses) / len(losses)), self.held.distance(self.model)
                losses = []
                points.append(Point(step, loss, held, time.perf_counter() - began))
                if kept_point(points) is points[-1]:
                    best = self._values()
                if log is not None:
                    log.keep(Standing(rate, tuple(points), optimizer.tensors(best)))
                bar.describe(_in_words(points))
        self._set(best)
        return tuple(points)

    def found_rate(self) -> float:
        """Return the rate of a few rising ones at which the model is nearest to the dense one.

        A range test (Smith, Cyclical Learning Rates, 2017): each rate begins where the one before
        has led, until two in a row lead away.  The model is left as it was.
        """
        before, found = self._values(), list[float]()
        optimizer = _Optimizer(self, _RATES[0], steps=None)
        steps = self._steps(_PROBE * len(_RATES))
        with stage("recover: learning rate", total=len(_RATES)) as bar:
            for rate in _RATES:
                optimizer.set_rate(rate)
                for samples in itertools.islice(steps, _PROBE):
                    optimizer.step(samples)
                distance = self.held.distance(self.model)
                found.append(math.inf if distance is None else distance)
                bar.advance()
                if len(found) - 1 - found.index(min(found)) == 2:
                    break
        self._set(before)
        return _RATES[found.index(min(found))]

    def _steps(self, steps: int) -> Iterator[list[Batch]]:
        """Yield the samples of each step, of passes over all of them, each in an order of its own.

        They depend on the seed alone, so that a run which goes on sees what it would have seen.
        """
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for step in range(steps):
            while len(order) < self.size:
                order += torch.randperm(len(self.samples), generator=generator).tolist()
            now, order = order[: self.size], order[self.size :]
            first = step * self.size
            yield [self.augmented(self.samples[one], first + turn) for turn, one in enumerate(now)]

    def _values(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights().items()}

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights().items():
            weight.copy_(values[name])


class _Optimizer:
    """AdamW, one step at a time; on a cosine, if it is known how many there will be."""

    def __init__(self, training: Training, rate: float, steps: int | None) -> None:
        self._training, self._weights = training, training.weights()
        # No weight decay: zero is not where the weights belong.
        self._adam = torch.optim.AdamW(
            self._weights.values(), lr=rate, weight_decay=0.0, fused=True
        )
        self._schedule = (
            get_constant_schedule(self._adam)
            if steps is None
            else get_cosine_with_min_lr_schedule_with_warmup(
                self._adam, math.ceil(_WARMUP * steps), steps, min_lr_rate=_FLOOR
            )
        )

    def set_rate(self, rate: float) -> None:
        """Go on with another learning rate, from the next step on."""
        self._schedule.base_lrs = [rate]
        for group in self._adam.param_groups:
            group["lr"] = rate

    def step(self, samples: Sequence[Batch]) -> float:
        """Make a step on samples, which the processes share out; return its loss."""
        training, target = self._training, self._training.held.target
        ranks, device = training.ranks, device_of(training.model)
        mine = samples[ranks.rank :: ranks.size]
        total = torch.zeros((), dtype=torch.float64, device=device)
        for first in range(0, len(mine), training.at_once):
            some = mine[first : first + training.at_once]
            batch = {name: torch.cat([one[name] for one in some]) for name in some[0]}
            with torch.autocast(device.type, training.precision, training.precision is not None):
                with torch.no_grad():
                    dense = target.outputs(training.dense, batch)
                found = target.outputs(training.model, batch)
            distance, count = target.distance(found, dense, len(some))
            loss = distance / count * (len(some) / len(samples))
            torch.autograd.backward(loss)
            total += loss.detach().double()
        if not ranks.alone:
            for weight in self._weights.values():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients = [
                weight.grad for weight in self._weights.values() if weight.grad is not None
            ]
            ranks.all_reduce("the gradients of a step", [*gradients, total])
        nn.utils.clip_grad_norm_(self._weights.values(), _CLIP)
        self._adam.step()
        self._adam.zero_grad()
        self._schedule.step()
        return float(total)

    def tensors(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all that a training goes on from, by name, beside the best values so far."""
        states = self._adam.state
        moments = {
            f"{moment}.{name}": states[weight][moment]
            for name, weight in self._weights.items()
            for moment in _MOMENTS
            if weight in states
        }
        values = {f"value.{name}": weight.detach() for name, weight in self._weights.items()}
        return {**values, **moments, **{f"best.{name}": one for name, one in best.items()}}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Go on from tensors; return the best values so far."""
        for name, weight in self._weights.items():
            weight.copy_(tensors[f"value.{name}"])
            if f"{_MOMENTS[0]}.{name}" in tensors:  # it has had gradients
                self._adam.state[weight] = {
                    "step": torch.tensor(float(steps)),
                    **{moment: tensors[f"{moment}.{name}"].to(weight) for moment in _MOMENTS},
                }
        self._schedule.last_epoch = steps - 1
        self._adam._opt_called = True  # type: ignore[attr-defined]
        self._schedule.step()
        return {name: tensors[f"best.{name}"].to(one) for name, one in self._weights.items()}


def kept_point(points: Sequence[Point]) -> Point:
    """Return the point nearest to the dense model, the first of several."""
    return min(points, key=lambda one: math.inf if one.held_out is None else one.held_out)


def _is_over(points: Sequence[Point]) -> bool:
    """Whether it is of no use to go on."""
    without = len(points) - 1 - points.index(kept_point(points))
    return points[-1].held_out is None or without >= _PATIENCE


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _in_words(points: Sequence[Point]) -> str:
    loss, first, best = points[-1].loss, points[0].held_out, kept_point(points).held_out
    return f"recover: loss {loss or math.nan:.4g}, held out {first:.4g} to {best:.4g}"
