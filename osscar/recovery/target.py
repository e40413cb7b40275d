"""What a smaller model is trained towards: the dense one's predictions, or all that it puts out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from graph.tracing.preserve import without_cache
from osscar.allocation.curvature import as_logits, holds_probabilities, table_of
from osscar.allocation.divergence import log_probabilities, summed_divergence, thinned
from osscar.base.ranks import Ranks
from osscar.data.batches import Batch, ModelInputs, to_model
from osscar.network.modules import device_of, forward
from osscar.recovery.request import Loss
from osscar.shrinking.equivalence import comparable

Measure: TypeAlias = Literal["nats", "relative", "loss"]


@dataclass(frozen=True, eq=False)
class Target:
    """How far a model is from the dense one.

    By `measure`: ``nats``, the Kullback-Leibler divergence of a prediction; ``relative``, the
    squared error of each output over the square of the dense one, a mean over outputs; ``loss``,
    that of the caller.
    """

    inputs: ModelInputs
    measure: Measure
    loss: Loss | None = None
    probabilities: bool = False
    """Whether it is these that the models put out."""

    @classmethod
    def of(
        cls, dense: nn.Module, inputs: ModelInputs, batch: Batch, loss: Loss | None = None
    ) -> Target:
        """Look at what the dense model puts out."""
        if loss is not None:
            return cls(inputs, "loss", loss)
        with torch.no_grad(), without_cache(dense):
            table = table_of(forward(dense, batch), batch, inputs)
        if table is None:
            return cls(inputs, "relative")
        return cls(inputs, "nats", probabilities=holds_probabilities(table))

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """Return what is compared of a model's outputs: log-probabilities, tensors, or all."""
        with without_cache(model):
            result = forward(model, to_model(batch, model))
        if self.measure == "loss":
            return result
        if self.measure == "relative":
            return comparable(result)
        table = table_of(result, batch, self.inputs)
        assert table is not None  # as of the dense model, or of one of the same outputs
        return log_probabilities(as_logits(table, self.probabilities))

    def distance(self, found: Any, dense: Any, samples: int) -> tuple[Tensor, int]:
        """Return a sum of distances, and over how many predictions or samples it is."""
        if self.loss is not None:
            return self.loss(found, dense) * samples, samples
        if self.measure == "nats":
            return summed_divergence(dense, found), len(dense)
        errors = [
            (b - a).abs().square().sum() / _power(a) for a, b in zip(dense, found, strict=True)
        ]
        return torch.stack(errors).mean() * samples, samples


def _power(tensor: Tensor) -> Tensor:
    return tensor.abs().square().sum().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples that train nothing, what the dense model says of them, and so how far others are.

    Ranks share the samples out; of the predictions of each sample, `rows` are kept.
    """

    target: Target
    batches: Sequence[Batch] = field(repr=False)
    expected: Sequence[Any] = field(repr=False)
    rows: Sequence[Tensor | None] = field(repr=False)
    ranks: Ranks

    @classmethod
    @torch.no_grad()
    def of(
        cls, target: Target, dense: nn.Module, batches: Sequence[Batch], ranks: Ranks
    ) -> HeldOut:
        """Run the dense model on the samples, one a batch."""
        mine = batches[ranks.rank :: ranks.size]
        expected, rows = [], []
        for batch in mine:
            found = target.outputs(dense, batch)
            kept = thinned(found, len(batches)) if target.measure == "nats" else None
            expected.append(found if kept is None else found[kept].clone())
            rows.append(kept)
        return cls(target, mine, expected, rows, ranks)

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float | None:
        """Return the mean distance of a model; None where it is not finite."""
        total = torch.zeros(2, dtype=torch.float64, device=device_of(model))
        for batch, expected, rows in zip(self.batches, self.expected, self.rows, strict=True):
            found = self.target.outputs(model, batch)
            found = found if rows is None else found[rows]
            distance, count = self.target.distance(found, expected, self.target.inputs.count(batch))
            total += torch.stack([distance.double(), distance.new_tensor(count).double()])
        self.ranks.all_reduce("the distance of held-out samples", [total])
        distance, count = total.tolist()
        return distance / count if math.isfinite(distance) else None
