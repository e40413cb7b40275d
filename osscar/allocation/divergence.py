"""How far a model is from the dense one: in its predictions, or in all that it puts out."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from graph.tracing.patches import computes_shapes_alone
from graph.tracing.preserve import without_cache
from osscar.allocation.resumed import HELD_BYTES, Recording, recorded
from osscar.base.errors import NonFiniteError, OptionError
from osscar.base.inputs import safe_repr
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import Batch, ModelInputs, to_model
from osscar.network.modules import device_of, forward, forward_in_bfloat16, fresh
from osscar.network.predictions import (
    known_output,
    named_logits,
    place_of_classes,
    reads_sequences,
)
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.failures import failures_named
from osscar.proof.equivalence import comparable

Measure: TypeAlias = Literal["nats", "relative", "loss"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""Of what a smaller and the dense model put out for the same batch: a mean over its samples."""


class Likeness(NamedTuple):
    """How like the dense model another is."""

    distance: float
    """A mean over predictions, or samples."""
    agreement: float
    """The share of predictions of the dense model's likeliest class; 0 without predictions."""


MOST_BYTES = 256 << 20
"""Memory of the dense predictions that are kept; of more, evenly spread ones are taken."""

_CACHED = 1 << 18
"""Numbers of float32 of which several tensors fit into a cache."""


def _run(model: nn.Module, batch: Batch, bfloat16: bool = False) -> Any:
    """Run a model, with products of bfloat16 if `bfloat16`."""
    batch, run = to_model(batch, model), forward_in_bfloat16 if bfloat16 else forward
    with failures_named(model, batch), without_cache(model):
        return run(model, batch)


@dataclass(frozen=True, eq=False)
class Distance:
    """How far a model is from the dense one, by what it puts out for the same inputs."""

    inputs: ModelInputs
    measure: Measure
    """``nats``, the Kullback-Leibler divergence of a prediction; ``relative``, the squared error of
    each output over its square, a mean over outputs; or ``loss``, that of the caller."""
    loss: Loss | None = None
    probabilities: bool = False
    """Whether the models put out these, and not logits."""
    powers: tuple[float, ...] = ()
    """The mean square of each output of the dense model over samples."""
    bytes: int = 0
    """Memory of the log-probabilities of a sample."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, dense: nn.Module, inputs: ModelInputs, batch: Batch, loss: Loss | None = None
    ) -> Distance:
        """Look at what the dense model puts out for a batch."""
        if loss is not None:
            return cls(inputs, "loss", loss)
        table = table_of(_run(dense, batch), batch, inputs)
        if table is None:
            return cls(inputs, "relative")
        chances = holds_probabilities(table)
        bytes_ = 4 * table.numel() // inputs.count(batch)
        return cls(inputs, "nats", probabilities=chances, bytes=bytes_)

    def outputs(
        self,
        model: nn.Module,
        batch: Batch,
        step: int = 1,
        run: Callable[[nn.Module, Batch], Any] = _run,
    ) -> Any:
        """Return what is compared of a model's outputs: rows of logits, tensors, or all.

        Of predictions it is one in so many: a language model that can does not make the others.
        `run` makes a forward pass.
        """
        asked = batch
        if step > 1 and picks_predictions(model, self.inputs):
            positions = torch.arange(batch["input_ids"].shape[1])
            asked, step = {**batch, "logits_to_keep": spread(positions, step)}, 1
        result = run(model, asked)
        if self.measure == "loss":
            return result
        if self.measure == "relative":
            return comparable(result)
        table = table_of(result, batch, self.inputs)
        if table is None:
            return None
        rows = as_logits(table, self.probabilities)
        if step > 1 and self.inputs.tokens and rows.ndim == 3:  # as if each window ran by itself
            rows, step = torch.cat([spread(window, step) for window in rows]), 1
        return spread(rows.flatten(0, -2), step)

    def normalized(self, outputs: Any) -> Any:
        """Return `outputs` with log-probabilities in the place of logits."""
        return outputs.float().log_softmax(-1) if self.measure == "nats" else outputs

    def summed(self, found: Any, dense: Any, samples: int) -> tuple[Tensor, int]:
        """Return a sum of distances, and over how many predictions or samples it is.

        The outputs of the `dense` model are `normalized`.  An output of another shape, as where
        fewer boxes are found, is wholly in error.
        """
        if self.loss is not None:
            # What it writes to the dense model's outputs must not stay in those that are kept.
            loss = self.loss(found, fresh(dense))
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
                raise OptionError(
                    f"the loss returned {safe_repr(loss):.80}; let it return a tensor with one "
                    "number"
                )
            return loss.reshape(()) * samples, samples
        if self.measure == "nats":
            # A few rows at a time, so that what is made of them stays in the processor's cache.
            cached = dense.device.type == "cpu" and not torch.is_grad_enabled()
            few = max(1, _CACHED // dense.shape[-1] if cached else len(dense))
            pairs = zip(dense.split(few), found.split(few), strict=True)
            sums = [summed_divergence(p, self.normalized(q)) for p, q in pairs]
            return torch.stack(sums).sum(), len(dense)
        outputs = zip(found, dense, self.powers, strict=True)
        errors = [_square(b - a if a.shape == b.shape else a) / power for b, a, power in outputs]
        return torch.stack(errors).mean(), samples


def _resumed(known: Recording, changed: Collection[Tensor], model: nn.Module, batch: Batch) -> Any:
    with failures_named(model, batch):
        return known.resumed(changed)


def _square(tensor: Tensor) -> Tensor:
    """Return the sum of squares; those of half precision would overflow."""
    finer = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return finer.abs().square().sum().double()


@dataclass(frozen=True, eq=False)
class Reference:
    """What the dense model puts out on some samples, and so how far other models are."""

    distance: Distance
    batches: Sequence[Batch] = field(repr=False)
    """Those of this rank."""
    expected: Sequence[Any] = field(repr=False)
    """Of the predictions of each batch, one in `step`."""
    step: int = 1
    ranks: Ranks = ALONE
    bfloat16: bool = False
    """Whether passes multiply in bfloat16."""
    passes: Sequence[Recording | None] = field(default=(), repr=False)
    """The dense model's, where they can be resumed."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        distance: Distance,
        dense: nn.Module,
        batches: Sequence[Batch],
        ranks: Ranks = ALONE,
        step: int = 1,
        *,
        resumable: bool = False,
        bfloat16: bool = False,
    ) -> Reference:
        """Run the dense model on the samples, and keep one prediction in `step`, or fewer.

        With `resumable`, its passes are recorded, to be resumed where a few weights have changed;
        with `bfloat16`, passes multiply in bfloat16.
        """
        mine = [batches[i] for i in ranks.share([1.0] * len(batches))]
        samples = sum(map(distance.inputs.count, batches))
        step = max(step, -(-distance.bytes * samples // MOST_BYTES))
        passes: list[Recording | None] = []
        plain = partial(_run, bfloat16=bfloat16)

        def run(model: nn.Module, batch: Batch) -> Any:
            result, recording = recorded(plain, model, batch, HELD_BYTES // len(mine))
            passes.append(recording)
            return result

        way = run if resumable and not is_on_disk(dense) else plain
        found = (distance.outputs(dense, batch, step, way) for batch in mine)
        expected = [fresh(distance.normalized(outputs)) for outputs in found]
        if distance.measure == "relative":
            count = ranks.broadcast("how many outputs there are", lambda: len(expected[0]))
            squares = torch.zeros(count, dtype=torch.float64, device=device_of(dense))
            for outputs in expected:
                squares += torch.stack([_square(one) for one in outputs])
            ranks.all_reduce("the squares of outputs", [squares])
            # What is always zero has no size that an error could be relative to.
            powers = tuple(square / samples or 1.0 for square in squares.tolist())
            distance = dataclasses.replace(distance, powers=powers)
        return cls(distance, mine, expected, step, ranks, bfloat16, passes)

    def part(self, batches: Sequence[Batch]) -> Reference:
        """Return the same on some of its batches alone; passes are not resumed."""
        mine = [any(one is other for other in batches) for one in self.batches]
        kept, expected = (list(compress(all_, mine)) for all_ in (self.batches, self.expected))
        return dataclasses.replace(self, batches=kept, expected=expected, passes=())

    def divergence(self, model: nn.Module, changed: Collection[Tensor] | None = None) -> float:
        """Return the distance that `likeness` has."""
        return self.likeness(model, changed).distance

    def likeness(self, model: nn.Module, changed: Collection[Tensor] | None = None) -> Likeness:
        """Compare what a model puts out with what the dense one does.

        Where the model is the dense one, but for the values of the parameters that are `changed`,
        what they do not change is not computed again, if passes can be resumed.  The distance has
        to be finite; else a `NonFiniteError` is raised.
        """
        found = self.compared(model, changed)
        if not math.isfinite(found.distance):
            what = "logits are" if self.distance.measure == "nats" else "outputs are"
            raise NonFiniteError(
                f"the pruned model's {what} NaN or infinite where the dense model's are not; "
                "use --dtype float32, or a higher --damp"
            )
        return found

    @torch.no_grad()
    def compared(self, model: nn.Module, changed: Collection[Tensor] | None = None) -> Likeness:
        """Return the same, whether it is finite or not."""
        sums = torch.zeros(3, dtype=torch.float64)
        for index, (batch, expected) in enumerate(zip(self.batches, self.expected, strict=True)):
            known = self.passes[index] if self.passes else None
            run: Callable[[nn.Module, Batch], Any] = partial(_run, bfloat16=self.bfloat16)
            if changed is not None and known is not None:
                run = partial(_resumed, known, changed)
            found = self.distance.outputs(model, batch, self.step, run)
            samples, same = self.distance.inputs.count(batch), 0.0
            total, count = self.distance.summed(found, expected, samples)
            if self.distance.measure == "nats":
                same = float((expected.argmax(-1) == found.argmax(-1)).sum())
            sums += torch.tensor([float(total), same, count], dtype=torch.float64)
        self.ranks.all_reduce("the distance from the dense model", [sums])
        total, same, count = sums.tolist()
        return Likeness(total / count, same / count)


def table_of(result: Any, batch: Batch, inputs: ModelInputs) -> Tensor | None:
    """Return a table of logits or of probabilities, a row a prediction; None if there is none.

    The sizes of labels say which dimension holds classes.  A matrix that a model makes of images is
    a classifier's; tokens are of a language model, and what is called `logits` of other sequences
    has a row for each position.
    """
    tokens = inputs.tokens
    named = named_logits(result)
    alone = result if tokens else known_output(result)[1]
    found = alone if named is None else named
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        return None
    sequences = reads_sequences(batch.values())
    if inputs.predictions is not None:
        labels = inputs.count(batch), *inputs.predictions
        place = place_of_classes(found.shape, labels, sequences=sequences)
        if place is not None:
            return found.movedim(place, -1)
    pixels = [x for x in batch.values() if x.is_floating_point() or x.dtype is torch.uint8]
    images = any(x.ndim == 4 for x in pixels)
    rows = tokens or (sequences and named is not None)
    if found.shape[-1] < 2 or not (rows or found.ndim == 2):
        return None  # such as those of a segmentation, a map for each class
    if not tokens and inputs.predictions != () and named is None and not images:
        return None  # it may be anything, such as a regression
    return found


def as_logits(table: Tensor, probabilities: bool | None = None) -> Tensor:
    """Return the logits of a table, (..., classes): its logarithms if it holds probabilities."""
    chances = holds_probabilities(table) if probabilities is None else probabilities
    return table.clamp(min=1e-30).log() if chances else table


def holds_probabilities(table: Tensor) -> bool:
    """Tell whether a table holds probabilities, whose sums are 1."""
    rows = table.detach().flatten(0, -2)
    # Of nearly all models the first row tells that it holds none.
    return all(
        bool((some >= 0).all()) and bool(((some.float().sum(-1) - 1).abs() < 1e-3).all())
        for some in (rows[:1], rows)
    )


def picks_predictions(model: nn.Module, inputs: ModelInputs) -> bool:
    """Whether a model is a language model that makes those predictions alone that are asked for."""
    return inputs.tokens and "logits_to_keep" in inspect.signature(model.forward).parameters


def spread(rows: Tensor, step: int) -> Tensor:
    """Return one row in so many, evenly spread, the last one among them."""
    return rows[(len(rows) - 1) % step :: step]


def summed_divergence(dense: Tensor, found: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergences of log-probabilities, summed up in float64.

    Never negative, and zero where both are the same; see `_Divergence`.
    """
    total: Tensor = _Divergence.apply(dense, found)  # type: ignore[no-untyped-call]
    return total


_UNDERFLOW = -87.0
"""Below this logarithm p is 0 in float32, or has lost digits; above it, q / p does not overflow."""


class _Divergence(torch.autograd.Function):
    """The sum of q - p - p log(q / p) over predictions and classes, for p dense and q found.

    It is that of p log(p / q), as p and q each add up to 1, but no term is negative, and each is of
    second order where q is near p: rounding of either sum to 1, of first order, drops out.
    """

    @staticmethod
    def forward(ctx: Any, dense: Tensor, found: Tensor) -> Tensor:
        """Keep q - p, which is the derivative by log q."""
        apart, p = found - dense, dense.exp()
        change = apart.expm1().mul_(p)
        terms = change - apart.mul_(p)
        if not computes_shapes_alone() and dense.amin() < _UNDERFLOW:
            change = torch.where(dense < _UNDERFLOW, found.exp(), change)
            terms = torch.where(dense < _UNDERFLOW, change, terms)
        ctx.save_for_backward(change)
        return terms.clamp_(min=0).sum(-1).double().sum()

    @staticmethod
    def backward(ctx: Any, total: Tensor) -> tuple[None, Tensor]:
        """Pass the gradient on to log q alone."""
        (change,) = ctx.saved_tensors
        return None, change * total.to(change.dtype)
