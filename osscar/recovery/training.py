"""The training loop of a recovery; held-out samples decide what is kept."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from osscar.base.errors import JournalError, ModelError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.base.progress import stage
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, timed
from osscar.data.batches import Batch
from osscar.network.model_state import ModelState
from osscar.network.modules import device_of
from osscar.recovery.adapters import as_saved
from osscar.recovery.checkpointing import checkpointing
from osscar.recovery.log import Point, RecoveryLog, Standing
from osscar.recovery.target import HeldOut, in_batches

Schedule: TypeAlias = Callable[[torch.optim.Optimizer], LambdaLR]

_WARMUP, _FLOOR = 0.1, 0.1
"""The share of the steps in which the rate rises; the share of its height at which it ends."""

_CLIP = 1.0
"""The largest norm of a gradient."""

_CHECKS = 8
"""Times that the held-out samples are looked at, evenly spread over the steps."""

_RISES = 3
"""So many looks in a row, each farther from the dense model than the one before, end a training: a
single one may be farther as long as the learning rate is high."""

_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
_PROBE = 2
"""Learning rates that are tried one after the other, and steps with each of them."""

_RECURRENT = {f"aten.{kind}.input" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
"""Operators of programs with recurrent layers."""

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
    state
        What passes write on it, which is put back after each: a cache would be of older weights.
    formats
        The number formats in which its tensors come back, and are judged.
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
    checkpointing
        Whether blocks are computed again in the backward pass.
    """

    model: nn.Module
    state: ModelState
    formats: Mapping[str, torch.dtype]
    dense: nn.Module
    samples: Sequence[Batch] = field(repr=False)
    held: HeldOut = field(repr=False)
    ranks: Ranks
    size: int
    at_once: int
    precision: torch.dtype | None
    seed: int
    augmented: Callable[[Batch, int], Batch] = lambda sample, _: sample
    checkpointing: bool = False

    def weights(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    @timed(Stage.HELD_OUT)
    def distance(self) -> float | None:
        """Return how far the model is that would be saved now."""
        with as_saved(self.model, self.formats):
            found = self.held.distance(self.model)
        self.state.put_back()
        return found

    def try_passes(self) -> None:
        """Run two micro-batches of the largest sample as a step of this process does."""
        share = -(-self.size // self.ranks.size)
        largest = max(self.samples, key=lambda one: sum(x.numel() for x in one.values()))
        alone = dataclasses.replace(self, ranks=ALONE)
        optimizer = _Optimizer(alone, 1.0, partial(LambdaLR, lr_lambda=_tried))
        for batch in in_batches([largest] * min(share, 2 * self.at_once), self.at_once):
            optimizer.add_gradients(batch, self.size)

    @timed(Stage.TRAINING)
    def run(
        self,
        steps: int,
        rate: float,
        log: RecoveryLog | None = None,
        known: Standing | None = None,
    ) -> tuple[Point, ...]:
        """Train, and leave the model as it was where it was best.

        Parameters
        ----------
        steps
            Of the optimizer.
        rate
            The learning rate at its height.
        log
            Keeps where it stands, so that a run which was killed goes on.
        known
            Where the run stood that it goes on with.

        Returns
        -------
        tuple of Point
            The first is the model as it came, and each look at the held-out samples adds one; see
            `kept_point`.
        """
        points = [Point(0, None, self.distance(), 0.0)] if known is None else list(known.points)
        optimizer = _Optimizer(self, rate, partial(_cosine, steps=steps, done=points[-1].step))
        best = self._values() if known is None else optimizer.restore(known)
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
                loss = _finite(sum(losses) / len(losses))
                losses = []
                points.append(Point(step, loss, self.distance(), time.perf_counter() - began))
                if kept_point(points) is points[-1]:
                    best = self._values()
                if log is not None:
                    log.keep(Standing(rate, tuple(points), optimizer.tensors(best)))
                bar.describe(_in_words(points))
        self._set(best)
        return tuple(points)

    @timed(Stage.RATE)
    def found_rate(self) -> float:
        """Return the rate below that at which, of a few rising ones, the model is nearest.

        A range test (Smith, Cyclical Learning Rates, 2017): each rate begins where the one before
        has led, until two in a row are farther off than the first.  What is best for two steps is
        too high for many, so that the rate below is returned.  The model is left as it was.
        """
        before, found = self._values(), list[float]()
        optimizer = _Optimizer(self, 1.0, partial(LambdaLR, lr_lambda=_tried))
        steps = self._steps(_PROBE * len(_RATES))
        with stage("recover: learning rate", total=len(_RATES)) as bar:
            for _ in _RATES:
                for samples in itertools.islice(steps, _PROBE):
                    optimizer.step(samples)
                distance = self.distance()
                found.append(math.inf if distance is None else distance)
                bar.advance()
                if min(found[-2:]) > found[0]:
                    break
        self._set(before)
        return _RATES[max(0, found.index(min(found)) - 1)]

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
        return {
            name: weight.detach().to(self.formats[name], copy=True)
            for name, weight in self.weights().items()
        }

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights().items():
            weight.copy_(values[name])


class _Optimizer:
    """AdamW, one step at a time, on a schedule of learning rates.

    It holds weights of half precision, such as those of a program, in float32, in which small steps
    count.
    """

    def __init__(self, training: Training, rate: float, schedule: Schedule) -> None:
        self._training, self._weights = training, training.weights()
        self._finer = {name: _finer(weight) for name, weight in self._weights.items()}
        groups = [{"params": [*self._finer.values()], "initial_lr": rate}]
        # No weight decay: zero is not where the weights belong.
        self._adam = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=True)
        self._schedule = schedule(self._adam)
        # cuDNN's recurrent layers go back in training mode alone.
        self._recurrent = any(
            isinstance(module, nn.RNNBase) or bool(_RECURRENT & _operators(module))
            for module in training.model.modules()
        )

    def step(self, samples: Sequence[Batch]) -> float:
        """Make a step on samples, which the processes share out; return its loss."""
        training, ranks = self._training, self._training.ranks
        total = torch.zeros((), dtype=torch.float64, device=device_of(training.model))
        for batch in in_batches(samples[ranks.rank :: ranks.size], training.at_once):
            total += self.add_gradients(batch, len(samples))
        gradients = [self._gradient(name) for name in self._weights]
        ranks.all_reduce("the gradients of a step", [*gradients, total])
        nn.utils.clip_grad_norm_(self._finer.values(), _CLIP)
        self._adam.step()
        self._adam.zero_grad()
        self._schedule.step()
        with torch.no_grad():
            for name, weight in self._weights.items():
                if weight is not self._finer[name]:
                    weight.copy_(self._finer[name])
        return float(total)

    def add_gradients(self, batch: Batch, samples: int) -> Tensor:
        """Go forward and backward on a part of so many samples; return its part of the loss."""
        training, target = self._training, self._training.held.target
        mine = target.inputs.count(batch)
        kind = device_of(training.model).type
        again = checkpointing(training.model) if training.checkpointing else nullcontext()
        with (
            again,
            torch.autocast(kind, training.precision, training.precision is not None),
            torch.backends.cudnn.flags(enabled=not self._recurrent),
        ):
            with torch.no_grad():
                dense = target.outputs(training.dense, batch)
            found = target.outputs(training.model, batch)
        distance, count = target.distance(found, dense, mine)
        loss = distance / count * (mine / samples)
        try:
            torch.autograd.backward(loss)
        except RuntimeError as error:
            let_shortage_pass(error)
            raise ModelError(
                f"no gradients flow through {type(training.model).__name__}: {first_line(error)}; "
                "leave no_grad and detach out of its forward, and of the loss"
            ) from error
        training.state.put_back()
        return loss.detach().double()

    def _gradient(self, name: str) -> Tensor:
        """Return a gradient where the optimizer takes it: of experts without tokens it is zero."""
        weight, finer = self._weights[name], self._finer[name]
        found = torch.zeros_like(finer) if weight.grad is None else weight.grad.to(finer.dtype)
        weight.grad = None
        finer.grad = found.to_dense() if found.is_sparse else found
        return finer.grad

    def tensors(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all that a training goes on from, by name, beside the best values so far."""
        values = {f"value.{name}": weight.detach() for name, weight in self._finer.items()}
        moments = {
            f"{moment}.{name}": self._adam.state[weight][moment]
            for name, weight in self._finer.items()
            for moment in _MOMENTS
        }
        return {**values, **moments, **{f"best.{name}": one for name, one in best.items()}}

    @torch.no_grad()
    def restore(self, known: Standing) -> dict[str, Tensor]:
        """Go on from where a training stood; return the best values so far."""
        tensors, step = known.tensors, float(known.points[-1].step)
        due = {
            f"{kind}.{name}": weight.shape
            for name, weight in self._finer.items()
            for kind in ("value", *_MOMENTS, "best")
        }
        if {name: tensor.shape for name, tensor in tensors.items()} != due:
            raise JournalError(f"the log holds weights of another form; {RecoveryLog.otherwise}")
        for name, weight in self._finer.items():
            weight.copy_(tensors[f"value.{name}"])
            self._weights[name].copy_(weight)
            moments = {moment: tensors[f"{moment}.{name}"].to(weight) for moment in _MOMENTS}
            self._adam.state[weight] = {"step": torch.tensor(step).to(weight.device), **moments}
        return {name: tensors[f"best.{name}"].to(one.device) for name, one in self._weights.items()}


def _operators(module: nn.Module) -> set[str]:
    """Return the names of the operators of a program; none of another module."""
    nodes = module.graph.nodes if isinstance(module, GraphModule) else ()
    return {str(node.target) for node in nodes}


def _finer(weight: nn.Parameter) -> nn.Parameter:
    kind = torch.promote_types(weight.dtype, torch.float32)
    return weight if weight.dtype == kind else nn.Parameter(weight.detach().to(kind))


def _cosine(optimizer: torch.optim.Optimizer, *, steps: int, done: int) -> LambdaLR:
    """Let the rate rise to its height and fall again, from where a training stands."""
    schedule: LambdaLR = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer,
        math.ceil(_WARMUP * steps),
        steps,
        min_lr_rate=_FLOOR,
        last_epoch=done - 1,
    )
    return schedule


def _tried(step: int) -> float:
    """Return the rate that is tried in a step."""
    return _RATES[min(step // _PROBE, len(_RATES) - 1)]


def kept_point(points: Sequence[Point]) -> Point:
    """Return the point nearest to the dense model, the first of several."""
    return min(points, key=lambda one: math.inf if one.held_out is None else one.held_out)


def _is_over(points: Sequence[Point]) -> bool:
    """Whether it is of no use to go on."""
    last = [math.inf if one.held_out is None else one.held_out for one in points[-_RISES - 1 :]]
    rising = len(last) > _RISES and all(a < b for a, b in itertools.pairwise(last))
    return rising or last[-1] == math.inf


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _in_words(points: Sequence[Point]) -> str:
    loss, first, best = points[-1].loss, points[0].held_out, kept_point(points).held_out
    return f"recover: loss {loss or math.nan:.4g}, held out {first:.4g} to {best:.4g}"
