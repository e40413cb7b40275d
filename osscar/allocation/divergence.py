"""How far the pruned model's predictions are from the dense ones, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from graph.tracing.patches import computes_shapes_alone
from graph.tracing.preserve import without_cache
from osscar.allocation.curvature import logits_of
from osscar.base.errors import NonFiniteError
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import Batch, ModelInputs
from osscar.network.modules import forward
from osscar.preparation.failures import batch_named
from osscar.preparation.prepare import Prepared

Around: TypeAlias = Callable[[int], AbstractContextManager[Any]]
"""Makes the context in which the pass of a batch, by its number, runs."""


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
    def of(
        cls, prepared: Prepared, samples: int, batch_size: int = 1, around: Around = nullcontext
    ) -> Reference | None:
        """Run the dense model on the last samples; None if it puts out no logits."""
        last = prepared.inputs.part(-samples)
        batches = last.batches(prepared.model, batch_size)
        mine = [batches[i] for i in prepared.ranks.share([1.0] * len(batches))]
        logarithms: list[Tensor] = []
        rows: list[slice] = []
        for index, batch in enumerate(mine):
            with around(index):
                found = _logarithms(prepared.model, batch, prepared.inputs, index)
            if found is None:
                break
            rows.append(thinned(found, len(batches)))
            logarithms.append(found[rows[-1]].clone())
        if prepared.ranks.any("the dense predictions", len(logarithms) < len(mine)):
            return None
        return cls(mine, logarithms, rows, last, prepared.ranks)

    def divergence(self, model: nn.Module, around: Around = nullcontext) -> float:
        """Return the mean Kullback-Leibler divergence from the dense predictions, in nats."""
        return self.likeness(model, around).nats

    def likeness(self, model: nn.Module, around: Around = nullcontext) -> Likeness:
        """Compare what a model predicts with what the dense one does.

        The pass of each batch, by its number, runs in the context `around` it.
        """
        total, same, count = 0.0, 0, 0
        kept = zip(self.batches, self.logarithms, self.rows, strict=True)
        for index, (batch, dense, rows) in enumerate(kept):
            with around(index):
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
