"""The training loop of a recovery; held-out samples decide what is kept."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from osscar.allocation.divergence import Reference
from osscar.base.errors import ModelError, NonFiniteError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.data.batches import Batch
from osscar.network.model_state import ModelState
from osscar.network.modules import device_of
from osscar.recovery.adapters import as_saved
from osscar.recovery.checkpointing import checkpointing
from osscar.recovery.log import Point, Progress, RecoveryLog, Standing
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import in_batches, shifted
from osscar.recovery.setup import Setup
from osscar.recovery.weights import formats, trainable

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

_KEPT = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


@dataclass(frozen=True, eq=False)
class Training:
    """A training in one of the ways to train.

    Parameters
    ----------
    setup
        What all ways have in common.
    way
        The request with what was chosen.
    model
        The copy that is trained in place, in evaluation mode: a step neither draws nor averages
        anything.  What takes no gradient stays as it is.
    state
        What passes write on it, which is put back after each: a cache would be of older weights.
    held
        What the dense model says of the samples that decide.
    """

    setup: Setup
    way: RecoveryRequest
    model: nn.Module
    state: ModelState
    held: Reference

    @classmethod
    def of(cls, setup: Setup, way: RecoveryRequest) -> Training:
        """Copy the model, and run both models on the samples that decide.

        Raises
        ------
        ModelError
            If what the two put out differs in form.
        """
        dense, model = setup.dense, trainable(setup.model, setup.dense, way)
        batches = in_batches(setup.deciding, way.micro_batch_size or setup.at_once)
        state = ModelState(model)
        with state.watching(), torch.no_grad():
            first = [setup.distance.outputs(one, batches[0]) for one in (model, dense)]
        state.put_back()
        mine, due = map(_shapes, first)
        if mine != due and way.loss is None:
            raise ModelError(
                f"the smaller model puts out {mine} where the dense one puts out {due}, so that "
                f"it does not come from this {type(dense).__name__}; give the dense model that it "
                "was pruned from"
            )
        held = Reference.of(setup.distance, dense, batches, setup.ranks)
        return cls(setup, way, model, state, held)

    @property
    def at_once(self) -> int:
        """Samples of a pass."""
        return self.way.micro_batch_size or self.setup.at_once

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    @cached_property
    def formats(self) -> dict[str, torch.dtype]:
        """The number formats in which its tensors come back, and are judged."""
        return formats(self.model, self.setup.model)

    @timed(Stage.HELD_OUT)
    def distance(self) -> float | None:
        """Return how far the model is that would be saved now; None where it is not finite."""
        with as_saved(self.model, self.formats):
            found = self.held.compared(self.model).distance
        self.state.put_back()
        return found if math.isfinite(found) else None

    def try_steps(self) -> None:
        """Make two steps of the largest sample, with all that a run keeps in memory, and a look.

        In the second the optimizer has its moments, and a pass the gradients of the one before.
        """
        size, samples = self.setup.size, self.setup.samples
        largest = max(samples, key=lambda one: sum(x.numel() for x in one.values()))
        best, optimizer = self._values(), _Optimizer(self)
        for passes in (1, 2):
            optimizer.step([largest] * min(size, passes * self.at_once), _RATES[0])
        self.distance()
        _copy(best, self.weights)

    def first_distance(self) -> float:
        """Return how far the model is as it came.

        Raises
        ------
        NonFiniteError
            If that is not finite.
        """
        found = self.distance()
        if found is not None:
            return found
        if self.way.loss is not None:
            raise NonFiniteError(
                "the loss is not finite on the held-out samples, before any training; let it "
                "return a finite number"
            )
        of_dense = self.held.compared(self.setup.dense).distance
        which = "smaller" if math.isfinite(of_dense) else "dense"
        raise NonFiniteError(f"the {which} model's outputs on held-out samples are not finite")

    @timed(Stage.TRAINING)
    def run(
        self,
        before: float,
        rate: float,
        log: RecoveryLog | None = None,
        known: Standing | None = None,
    ) -> tuple[Point, ...]:
        """Train, and leave the model as it was where it was best.

        Parameters
        ----------
        before
            How far the model is as it came.
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
        optimizer, steps = _Optimizer(self), self.way.steps
        if known is None:
            points, best = [Point(0, None, before, 0.0)], self._values()
        else:
            points, best = list(known.progress.points), optimizer.restore(known.tensors)
        began, losses = time.perf_counter() - points[-1].seconds, list[float]()
        every = math.ceil(steps / _CHECKS)
        with stage("recover", total=steps) as bar:
            for step, samples in enumerate(self._steps(steps), 1):
                bar.advance()
                if step <= points[-1].step:
                    continue
                if _is_over(points):
                    break
                losses.append(optimizer.step(samples, rate * _schedule(step, steps)))
                if step % every and step < steps:
                    continue
                loss = sum(losses) / len(losses)
                losses = []
                seen = loss if math.isfinite(loss) else None
                points.append(Point(step, seen, self.distance(), time.perf_counter() - began))
                kept = kept_point(points)
                if kept is points[-1]:
                    _copy(self.weights, best)
                if log is not None:
                    log.keep(Standing(Progress(rate, tuple(points)), optimizer.tensors(best)))
                bar.describe(
                    f"recover: loss {loss:.4g}, held out {before:.4g} to {kept.held_out:.4g}"
                )
        _copy(best, self.weights)
        return tuple(points)

    @timed(Stage.RATE)
    def found_rate(self) -> float:
        """Return the rate below that at which, of a few rising ones, the model is nearest.

        A range test (Smith, Cyclical Learning Rates, 2017): each rate begins where the one before
        has led, until two in a row are farther off than the first.  What is best for two steps is
        too high for many, so that the rate below is returned.  The model is left as it was.
        """
        before, optimizer, found = self._values(), _Optimizer(self), list[float]()
        steps = self._steps(_PROBE * len(_RATES))
        with stage("recover: learning rate", total=len(_RATES)) as bar:
            for rate in _RATES:
                for samples in itertools.islice(steps, _PROBE):
                    optimizer.step(samples, rate)
                distance = self.distance()
                found.append(math.inf if distance is None else distance)
                bar.advance()
                if min(found[-2:]) > found[0]:
                    break
        _copy(before, self.weights)
        return _RATES[max(0, found.index(min(found)) - 1)]

    def _steps(self, steps: int) -> Iterator[list[Batch]]:
        """Yield the samples of each step, of passes over all of them, each in an order of its own.

        They depend on the seed alone, so that a run which goes on sees what it would have seen.
        """
        setup, seed = self.setup, self.way.seed
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for step in range(steps):
            while len(order) < setup.size:
                order += torch.randperm(len(setup.samples), generator=generator).tolist()
            now, order = [setup.samples[one] for one in order[: setup.size]], order[setup.size :]
            first = step * setup.size
            yield [shifted(x, first + i, seed) for i, x in enumerate(now)] if setup.shifts else now

    def _values(self) -> dict[str, Tensor]:
        """Return copies of what is trained, as it would be saved."""
        return {
            name: weight.detach().to(self.formats[name], copy=True)
            for name, weight in self.weights.items()
        }


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    for name, tensor in to.items():
        tensor.copy_(values[name])


class _Optimizer:
    """AdamW, one step at a time.

    It holds weights of half precision, such as those of a program, in float32, in which small steps
    count.
    """

    def __init__(self, training: Training) -> None:
        self._training, self._weights = training, training.weights
        self._finer = {name: _finer(weight) for name, weight in self._weights.items()}
        # No weight decay: zero is not where the weights belong.
        self._adam = torch.optim.AdamW(self._finer.values(), weight_decay=0.0, fused=True)
        # cuDNN's recurrent layers go back in training mode alone.
        self._recurrent = any(map(_is_recurrent, training.model.modules()))

    def step(self, samples: Sequence[Batch], rate: float) -> float:
        """Make a step on samples, which the processes share out; return its loss."""
        setup = self._training.setup
        total = torch.zeros((), dtype=torch.float64, device=device_of(setup.dense))
        mine = samples[setup.ranks.rank :: setup.ranks.size]
        for batch in in_batches(mine, self._training.at_once):
            total += self._add_gradients(batch, len(samples))
        gradients = [self._gradient(name) for name in self._weights]
        setup.ranks.all_reduce("the gradients of a step", [*gradients, total])
        nn.utils.clip_grad_norm_(self._finer.values(), _CLIP)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            for name, weight in self._weights.items():
                if weight is not self._finer[name]:
                    weight.copy_(self._finer[name])
        return float(total)

    def _add_gradients(self, batch: Batch, samples: int) -> Tensor:
        """Go forward and backward on a part of so many samples; return its part of the loss."""
        training, way, dense = self._training, self._training.way, self._training.setup.dense
        target, model = training.held.distance, training.model
        mine = target.inputs.count(batch)
        with (
            checkpointing(model) if way.checkpointing else nullcontext(),
            torch.autocast(device_of(dense).type, torch.bfloat16, way.mixed_precision == "bf16"),
            torch.backends.cudnn.flags(enabled=not self._recurrent),
        ):
            with torch.no_grad():
                due = target.outputs(dense, batch)
            found = target.outputs(model, batch)
        distance, count = target.summed(found, due, mine)
        loss = distance / count * (mine / samples)
        try:
            torch.autograd.backward(loss)
        except RuntimeError as error:
            let_shortage_pass(error)
            raise ModelError(
                f"no gradients flow through {type(model).__name__}: {first_line(error)}; leave "
                "no_grad and detach out of its forward, and of the loss, and let it return scores "
                "or other real numbers"
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
        found = {f"best.{name}": tensor for name, tensor in best.items()}
        for name, weight in self._finer.items():
            found[f"value.{name}"] = weight.detach()
            found |= {f"{kind}.{name}": self._adam.state[weight][kind] for kind in _KEPT}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go on from where a training stood; return the best values so far."""
        values = {name: tensors[f"value.{name}"] for name in self._finer}
        _copy(values, self._finer)
        _copy(values, self._weights)
        for name, weight in self._finer.items():
            kept = {kind: tensors[f"{kind}.{name}"].to(weight.device) for kind in _KEPT}
            self._adam.state[weight] = kept
        return {name: tensors[f"best.{name}"].to(one.device) for name, one in self._weights.items()}


def _is_recurrent(module: nn.Module) -> bool:
    """Whether a module, or a program, is a recurrent layer or has one."""
    nodes = module.graph.nodes if isinstance(module, GraphModule) else ()
    operators = {f"aten.{kind}.input" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
    return isinstance(module, nn.RNNBase) or any(str(node.target) in operators for node in nodes)


def _shapes(outputs: Any) -> list[list[int]] | str:
    """Return the shapes of what is compared of a model's outputs."""
    if outputs is None:
        return "no scores of classes"
    return [list(one.shape) for one in tree_leaves(outputs) if isinstance(one, Tensor)]


def _finer(weight: nn.Parameter) -> nn.Parameter:
    kind = torch.promote_types(weight.dtype, torch.float32)
    return weight if weight.dtype == kind else nn.Parameter(weight.detach().to(kind))


def _schedule(step: int, steps: int) -> float:
    """Return the share of its height that the rate has in a step, of 1 to `steps`.

    It rises in the first tenth, and falls on a cosine to a tenth (Loshchilov and Hutter, 2017).
    """
    warm = math.ceil(_WARMUP * steps)
    if step <= warm:
        return step / warm
    fallen = (step - warm) / (steps - warm)
    return _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * fallen)) / 2


def kept_point(points: Sequence[Point]) -> Point:
    """Return the point nearest to the dense model, the first of several."""
    return min(points, key=lambda one: math.inf if one.held_out is None else one.held_out)


def _is_over(points: Sequence[Point]) -> bool:
    """Whether it is of no use to go on."""
    last = [math.inf if one.held_out is None else one.held_out for one in points[-_RISES - 1 :]]
    rising = len(last) > _RISES and all(a < b for a, b in itertools.pairwise(last))
    return rising or last[-1] == math.inf
