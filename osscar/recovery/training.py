"""The training loop of a recovery: AdamW on the distance from the dense model.

Held-out samples decide which weights are kept.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from pydantic import with_config
from torch import Tensor, nn
from torch.fx import GraphModule

from osscar.base.errors import ModelError, first_line
from osscar.base.json_files import STRICT
from osscar.base.memory import attempt
from osscar.base.printable import are, pluralize, share
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, progress_bar, timed
from osscar.data.reader import Batch
from osscar.distance.distance import Reference
from osscar.network.model_state import ModelState
from osscar.network.modules import device_of, tensors_in
from osscar.network.tensor_files import read_record, write_record
from osscar.preparation.journal import Journal
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import CHECKED, Setup, in_batches, shifted
from osscar.recovery.weights import as_saved, checkpointing, formats, trainable

# ---- the learning rate -------------------------------------------------------------------

LEARNING_RATE = {True: 2e-4, False: 1e-3}
"""Peak learning rate for windows of text (True), and for anything else (False)."""

_WARMUP, _FLOOR, _LOWER = 0.1, 0.1, 0.1
"""Shares: of the steps in which the rate rises, of its peak at which it ends, and of the peak to
which it is lowered where the held-out loss is higher than before the training."""


def schedule(step: int, steps: int, began: int = 0) -> float:
    """Return the learning rate of a step, of 1 to `steps`, as a share of its peak.

    It rises linearly for a tenth of the steps, then falls on a cosine to a tenth (Loshchilov and
    Hutter, 2017).  It rises again after the step `began` at which the optimizer forgot its moments:
    its first steps move each weight by the whole rate.
    """
    warm = math.ceil(_WARMUP * steps)
    fallen = max(0, step - warm) / max(1, steps - warm)
    falling = _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * fallen)) / 2
    return falling * min(1.0, (step - began) / warm)


# ---- checks, and the log that keeps them ---------------------------------------------------

_CHECKS = 8
"""Checks on held-out samples, evenly spread over the steps; one more is after the first step."""

_HARM = 2.0
"""A held-out loss so many times that before the training lowers the rate at once; a smaller rise
does so in the second half alone, as a training makes up for it while its rate falls."""

_RISES = 3
"""So many rises of the held-out loss in a row end a training."""


@dataclass(frozen=True)
class Check:
    """A check on held-out samples."""

    step: int
    """Optimizer steps so far; 0 is the model as it came."""
    rate: float
    """Peak learning rate of the steps since the last check."""
    loss: float | None
    """Mean training loss of these steps; None at first, and if it is not finite."""
    held_out: float | None
    """Distance from the dense model on some held-out samples, None if not finite."""
    seconds: float
    """Since the training began."""

    @property
    def distance(self) -> float:
        """Distance on held-out samples; infinite if it is not finite."""
        return math.inf if self.held_out is None else self.held_out


def nearest(points: Sequence[Check]) -> Check:
    """Return the check with the lowest distance, the first of several."""
    return min(points, key=lambda one: one.distance)


def _is_over(points: Sequence[Check]) -> bool:
    """Whether the held-out loss has risen often enough."""
    last = [one.distance for one in points[-_RISES - 1 :]]
    return len(last) > _RISES and all(a < b for a, b in itertools.pairwise(last))


def _next_rate(points: Sequence[Check]) -> float:
    """Return the peak learning rate after the last check."""
    last = points[-1]
    most = points[0].distance * (_HARM if len(points) <= 1 + _CHECKS // 2 else 1)
    return last.rate * (_LOWER if last.distance > most or last.held_out is None else 1.0)


def _is_checked(step: int, steps: int, points: Sequence[Check]) -> bool:
    """Whether a check follows a step: also the first one, and the first at a lowered peak."""
    early = len(points) == 1 or _next_rate(points) < points[-1].rate
    return early or step % math.ceil(steps / _CHECKS) == 0 or step == steps


@with_config(STRICT)
@dataclass(frozen=True)
class Progress:
    """How far a training is: its checks so far."""

    points: tuple[Check, ...]


class RecoveryLog(Journal):
    """The state of a training, in a directory: one that is killed goes on to the same bytes."""

    what = "recovery"
    manifest_file = "log.json"
    done_files = ("[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].safetensors",)
    other_files = ()
    otherwise = "start over with --restart"

    @property
    def kept(self) -> str:
        """How many steps are kept of a recovery that ends now, in words; empty if none."""
        steps = int(self.done[-1].stem) if self.done else 0
        return f"{pluralize(steps, 'step')} {are(steps)} kept in {self.directory}" if steps else ""

    def last(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """Return the last state that was kept; None if there is none."""
        return read_record(self.done[-1], Progress) if self.done else None

    def keep(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state of a training in the place of the last one."""
        before = self.done
        place = self.directory / f"{progress.points[-1].step:08}.safetensors"
        write_record(place, progress, tensors)
        for old in before:
            old.unlink(missing_ok=True)


# ---- the loop ----------------------------------------------------------------------------


class Training:
    """A training of a copy of a smaller model, with options; ranks share out all samples."""

    def __init__(self, setup: Setup, options: RecoveryRequest, ranks: Ranks = ALONE) -> None:
        self.setup, self.options, self.ranks = setup, options, ranks
        self.at_once = options.micro_batch_size or setup.size
        # In evaluation mode a step neither draws nor averages anything.
        self.model = trainable(setup.model, setup.dense, options)
        self.formats = formats(self.model, setup.model)
        self.weights = {n: one for n, one in self.model.named_parameters() if one.requires_grad}
        # Half precision, which a program may have, is trained in float32: small steps count there.
        self._finer = {
            name: nn.Parameter(one.detach().float()) if one.itemsize < 4 else one
            for name, one in self.weights.items()
        }
        # No weight decay: zero is not where the weights belong.
        self._adam = torch.optim.AdamW(self._finer.values(), weight_decay=0.0, fused=True)
        self._recurrent = any(map(_is_recurrent, self.model.modules()))
        few = CHECKED[setup.inputs.tokens]
        checked = in_batches(setup.held_out[:few], self.at_once)
        batches = [*checked, *in_batches(setup.held_out[few:], self.at_once)]
        # What passes write on the model is put back after each: a cache would be of older weights.
        self._state = ModelState(self.model)
        with self._state.watching(), torch.no_grad():
            both = [setup.distance.outputs(x, batches[0]) for x in (self.model, setup.dense)]
        self._state.put_back()
        mine, due = ([list(x.shape) for x in tensors_in(one)] for one in both)
        if mine != due and setup.distance.function is None:
            raise ModelError(
                f"the smaller model's scores or outputs have the shapes {mine}, and the dense "
                f"one's {due}; give the dense model that it was pruned from"
            )
        self.held_out = Reference.from_run(setup.distance, setup.dense, batches, ranks)
        self.checked = self.held_out.part(checked)

    @timed(Stage.HELD_OUT)
    def distance(self, reference: Reference) -> float | None:
        """Return the distance of the model that would be saved now; None if it is not finite."""
        with as_saved(self.model, self.formats):
            found = reference.compared(self.model).distance
        self._state.put_back()
        return found if math.isfinite(found) else None

    def try_step(self) -> None:
        """Make a step that takes as much memory as any will, and undo it."""
        best = self._values()
        largest = max(self.setup.samples, key=lambda one: sum(x.numel() for x in one.values()))
        self.step([], 0.0, ALONE)
        self.step([largest] * min(self.setup.size, 2 * self.at_once), 0.0, ALONE)
        self._go_back(best)

    @timed(Stage.TRAINING)
    def run(
        self,
        log: RecoveryLog | None = None,
        known: tuple[Progress, Mapping[str, Tensor]] | None = None,
    ) -> tuple[Check, ...]:
        """Train, and leave the model with the weights of its nearest check; return all checks.

        Where the learning rate is lowered (`_next_rate`), training goes back to the weights of the
        nearest check.  `log` keeps the state at each check, and `known` is the last that it kept.
        """
        steps = self.options.steps
        if known is None:
            rate = self.options.learning_rate or LEARNING_RATE[self.setup.inputs.tokens]
            points, best = [Check(0, rate, None, self.distance(self.checked), 0.0)], self._values()
        else:
            points, best = list(known[0].points), self._restore(known[1])
        began, losses = time.perf_counter() - points[-1].seconds, list[float]()
        with progress_bar("recover", total=steps) as bar:
            for step, samples in enumerate(self._steps(), 1):
                bar.advance()
                if step <= points[-1].step:
                    continue
                if _is_over(points):
                    break
                rate = _next_rate(points)
                lowered = max((one.step for one in points if one.rate > rate), default=0)
                now = rate * schedule(step, steps, lowered)
                losses.append(self.step(samples, now, self.ranks))
                if not _is_checked(step, steps, points):
                    continue
                loss, losses = sum(losses) / len(losses), []
                seconds, seen = time.perf_counter() - began, loss if math.isfinite(loss) else None
                points.append(Check(step, rate, seen, self.distance(self.checked), seconds))
                if nearest(points) is points[-1]:
                    _copy(self.weights, best)
                elif _next_rate(points) < rate:
                    self._go_back(best)
                if log is not None:
                    log.keep(Progress(tuple(points)), self._tensors(best))
                first, kept = points[0].distance, nearest(points).distance
                nearer = f", held out at {share(kept / first)} of the start" if first else ""
                bar.describe(f"recover: loss {loss:.4g}{nearer}")
        _copy(best, self.weights)
        return tuple(points)

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield the samples of each step, which depend on the seed alone."""
        setup, seed = self.setup, self.options.seed
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for step in range(self.options.steps):
            while len(order) < setup.size:
                order += setup.order(self.at_once, generator)
            now, order = [setup.samples[one] for one in order[: setup.size]], order[setup.size :]
            first = step * setup.size
            yield [shifted(x, first + i, seed) for i, x in enumerate(now)] if setup.shifts else now

    def step(self, samples: Sequence[Batch], rate: float, ranks: Ranks) -> float:
        """Make an optimizer step on samples, which the ranks share out; return its loss."""
        total = torch.zeros((), dtype=torch.float64, device=device_of(self.setup.dense))
        for batch in in_batches(samples[ranks.rank :: ranks.size], self.at_once):
            total += self._add_gradients(batch, len(samples))
        for name, finer in self._finer.items():
            # Experts without tokens have no gradient, and embeddings may have a sparse one.
            weight = self.weights[name]
            found = torch.zeros_like(finer) if weight.grad is None else weight.grad.to(finer.dtype)
            weight.grad, finer.grad = None, found.to_dense() if found.is_sparse else found
        gradients = [one.grad for one in self._finer.values() if one.grad is not None]
        ranks.all_reduce("the gradients of a step", [*gradients, total])
        nn.utils.clip_grad_norm_(self._finer.values(), max_norm=1.0)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        _copy(self._finer, self.weights)
        return float(total)

    def _add_gradients(self, batch: Batch, samples: int) -> Tensor:
        """Go forward and backward on a part of so many samples; return its part of the loss."""
        options, distance, dense = self.options, self.held_out.distance, self.setup.dense
        half = options.mixed_precision == "bf16"
        with (
            checkpointing(self.model) if options.checkpointing else nullcontext(),
            torch.autocast(device_of(dense).type, torch.bfloat16, enabled=half),
            # cuDNN's recurrent layers have a backward pass in training mode alone.
            torch.backends.cudnn.flags(enabled=False) if self._recurrent else nullcontext(),
        ):
            with torch.no_grad():
                due = distance.normalized(distance.outputs(dense, batch))
            found = distance.outputs(self.model, batch)
        mine = distance.inputs.count(batch)
        total, count = distance.summed(found, due, batch)
        loss = total / count * (mine / samples)
        with attempt() as tried:
            torch.autograd.backward(loss)
        if tried.failed:
            raise ModelError(
                f"no gradients flow through {type(self.model).__name__}: "
                f"{first_line(tried.error)}; remove no_grad and detach from its forward and from "
                "your distance, and let it return scores or other real numbers"
            ) from tried.error
        self._state.put_back()
        return loss.detach().double()

    def _values(self) -> dict[str, Tensor]:
        """Return copies of the weights, in the formats in which they would be saved."""
        named = self.weights.items()
        return {name: one.detach().to(self.formats[name], copy=True) for name, one in named}

    def _go_back(self, values: Mapping[str, Tensor]) -> None:
        """Set the weights, and forget the moments of the optimizer."""
        _copy(values, self._finer)
        _copy(values, self.weights)
        self._adam.state.clear()

    def _tensors(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all tensors from which a training goes on, beside the best values so far."""
        found = {f"best.{name}": tensor for name, tensor in best.items()}
        for name, weight in self._finer.items():
            found[f"value.{name}"] = weight.detach()
            found |= {f"{kind}.{name}": x for kind, x in self._adam.state[weight].items()}
        return found

    def _restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go on from tensors that were kept; return the best values so far."""
        self._go_back({name: tensors[f"value.{name}"] for name in self._finer})
        for name, weight in self._finer.items():
            kinds = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors]
            self._adam.state[weight] = {k: tensors[f"{k}.{name}"].to(weight.device) for k in kinds}
        return {name: tensors[f"best.{name}"].to(one.device) for name, one in self.weights.items()}


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    for name, tensor in to.items():
        if tensor is not values[name]:
            tensor.copy_(values[name])


def _is_recurrent(module: nn.Module) -> bool:
    """Whether a module, or a program, is a recurrent layer or has one."""
    nodes = module.graph.nodes if isinstance(module, GraphModule) else ()
    operators = {f"aten.{kind}.input" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
    return isinstance(module, nn.RNNBase) or any(str(node.target) in operators for node in nodes)
