"""How far a model is from the dense one: in its predictions, or in all that it puts out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graph.tracing.patches import computes_shapes_alone
from graph.tracing.preserve import without_cache
from osscar.base.errors import NonFiniteError
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import Batch, ModelInputs
from osscar.network.modules import forward, fresh
from osscar.network.predictions import (
    known_prediction,
    named_logits,
    place_of_classes,
    reads_sequences,
)
from osscar.preparation.failures import batch_named
from osscar.preparation.prepare import Prepared
from osscar.proof.equivalence import comparable


class Likeness(NamedTuple):
    """How like the dense model's predictions others are.

    `nats` is the mean Kullback-Leibler divergence from them, and `agreement` the share of
    predictions whose likeliest class is the dense one's.
    """

    nats: float
    agreement: float


MOST_BYTES = 256 << 20
"""Memory of the dense predictions that are kept; of more, evenly spread ones are taken."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the dense model predicts on some samples.

    `logarithms` are log-probabilities, (predictions, classes), for each of them, and `rows` which
    of its predictions these are.  Ranks share out the samples; those here are this one's.
    """

    batches: Sequence[Batch] = field(repr=False)
    logarithms: Sequence[Tensor] = field(repr=False)
    rows: Sequence[slice] = field(repr=False)
    inputs: ModelInputs = field(repr=False)
    """Of all ranks."""
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, prepared: Prepared, samples: int, batch_size: int = 1) -> Reference | None:
        """Run the dense model on the last samples; None if it puts out no logits."""
        last = prepared.inputs.part(-samples)
        batches = last.batches(prepared.model, batch_size)
        mine = [batches[i] for i in prepared.ranks.share([1.0] * len(batches))]
        logarithms: list[Tensor] = []
        rows: list[slice] = []
        for index, batch in enumerate(mine):
            found = _logarithms(prepared.model, batch, prepared.inputs, index)
            if found is None:
                break
            rows.append(thinned(found, len(batches)))
            logarithms.append(found[rows[-1]].clone())
        if prepared.ranks.any("the dense predictions", len(logarithms) < len(mine)):
            return None
        return cls(mine, logarithms, rows, last, prepared.ranks)

    def divergence(self, model: nn.Module) -> float:
        """Return the mean Kullback-Leibler divergence from the dense predictions, in nats."""
        return self.likeness(model).nats

    def likeness(self, model: nn.Module) -> Likeness:
        """Compare what a model predicts with what the dense one does."""
        total, same, count = 0.0, 0, 0
        kept = zip(self.batches, self.logarithms, self.rows, strict=True)
        for index, (batch, dense, rows) in enumerate(kept):
            found = _logarithms(model, batch, self.inputs, index)
            assert found is not None
            total += float(summed_divergence(dense, found[rows]))
            same += int((dense.argmax(-1) == found[rows].argmax(-1)).sum())
            count += len(dense)
        sums = torch.tensor([total, same, count], dtype=torch.float64)
        self.ranks.all_reduce("the divergence", [sums])
        total, agreeing, predictions = sums.tolist()
        if not math.isfinite(total):
            raise NonFiniteError(
                "the pruned model's logits are NaN or infinite where the dense model's are not; "
                "use --dtype float32, or a higher --damp"
            )
        return Likeness(total / predictions, agreeing / predictions)


@dataclass(frozen=True, eq=False)
class OutputReference:
    """What the dense model puts out on some samples, where that is no scores of classes.

    `expected` are the tensors of each batch that hold real or complex numbers.  Ranks share out the
    samples; those here are this one's.
    """

    batches: Sequence[Batch] = field(repr=False)
    expected: Sequence[Sequence[Tensor]] = field(repr=False)
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, prepared: Prepared, samples: int, batch_size: int = 1) -> OutputReference:
        """Run the dense model on the last samples."""
        batches = prepared.inputs.part(-samples).batches(prepared.model, batch_size)
        mine = [batches[i] for i in prepared.ranks.share([1.0] * len(batches))]
        outputs = [_outputs(prepared.model, batch, index) for index, batch in enumerate(mine)]
        return cls(mine, fresh(outputs), prepared.ranks)

    def divergence(self, model: nn.Module) -> float:
        """Return the squared error of each output over its square, a mean over outputs.

        One of another shape, such as of boxes of which fewer are found, is wholly in error.
        """
        # Of each output: squares of errors, and of what the dense model puts out.
        count = self.ranks.broadcast("how many outputs there are", lambda: len(self.expected[0]))
        sums = torch.zeros(count, 2, dtype=torch.float64)
        for index, (batch, expected) in enumerate(zip(self.batches, self.expected, strict=True)):
            pairs = zip(expected, _outputs(model, batch, index), strict=True)
            for place, (a, b) in enumerate(pairs):
                error = b.double() - a.double() if a.shape == b.shape else a.double()
                both = [one.square().sum().cpu() for one in (error, a.double())]
                sums[place] += torch.stack(both)
        self.ranks.all_reduce("the distance of outputs", [sums])
        errors = [error / size for error, size in sums.tolist() if size > 0]
        distance = math.fsum(errors) / max(1, len(errors))
        if not math.isfinite(distance):
            raise NonFiniteError(
                "the pruned model puts out what is NaN or infinite where the dense one does not; "
                "use --dtype float32, or a higher --damp"
            )
        return distance


def _outputs(model: nn.Module, batch: Batch, index: int) -> list[Tensor]:
    with torch.no_grad(), without_cache(model), batch_named(model, index):
        found = comparable(forward(model, batch))
    return [torch.view_as_real(one) if one.is_complex() else one for one in found]


def logits_of(result: Any, batch: Batch, inputs: ModelInputs) -> Tensor | None:
    """Return a table of logits, a row a prediction, (..., classes); None if there is none."""
    table = table_of(result, batch, inputs)
    return None if table is None else as_logits(table)


def table_of(result: Any, batch: Batch, inputs: ModelInputs) -> Tensor | None:
    """Return a table of logits or of probabilities, a row a prediction; None if there is none.

    Where there are labels, their sizes say which dimension holds classes.  A matrix that a model
    makes of images is a classifier's; tokens are of a language model, and what is called `logits`
    of other sequences has a row for each position.
    """
    tokens = inputs.tokens
    named = named_logits(result)
    alone = result if tokens else known_prediction(result)
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
    """Return scores of classes, (..., classes), of which the softmax is what a model predicts.

    They are the table itself, or its logarithms where it holds probabilities.
    """
    chances = holds_probabilities(table) if probabilities is None else probabilities
    return table.clamp(min=1e-30).log() if chances else table


def holds_probabilities(table: Tensor) -> bool:
    """Tell whether a table holds probabilities, whose sums are 1."""
    rows = table.detach().flatten(0, -2)
    # Of nearly all models the first row tells that it holds none.
    return _sum_to_one(rows[:1]) and _sum_to_one(rows)


def _sum_to_one(rows: Tensor) -> bool:
    sums = rows.float().sum(-1)
    return bool((rows >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())


def _logarithms(model: nn.Module, batch: Batch, inputs: ModelInputs, index: int) -> Tensor | None:
    with torch.no_grad(), without_cache(model), batch_named(model, index):
        logits = logits_of(forward(model, batch), batch, inputs)
    return None if logits is None else log_probabilities(logits)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithms of what logits predict, float32 (predictions, classes)."""
    return logits.flatten(0, -2).float().log_softmax(-1)


def thinned(logarithms: Tensor, batches: int) -> slice:
    """Return which predictions of one of so many batches are kept: evenly spread ones."""
    most = max(1, MOST_BYTES // (batches * logarithms.shape[-1] * 4))
    step = -(-len(logarithms) // most)
    return slice(step // 2, None, step)


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
