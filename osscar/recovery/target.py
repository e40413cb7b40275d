"""What a smaller model is trained towards: the dense one's predictions, or all that it puts out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from graph.tracing.preserve import without_cache
from osscar.allocation.divergence import (
    as_logits,
    holds_probabilities,
    log_probabilities,
    summed_divergence,
    table_of,
    thinned,
)
from osscar.base.errors import ModelError, OptionError
from osscar.base.inputs import safe_repr
from osscar.base.ranks import Ranks
from osscar.data.batches import Batch, ModelInputs, to_model
from osscar.network.modules import device_of, forward, fresh
from osscar.preparation.failures import failures_named
from osscar.proof.equivalence import comparable
from osscar.recovery.request import Loss

Measure: TypeAlias = Literal["nats", "relative", "loss"]


@dataclass(frozen=True, eq=False)
class Target:
    """How far a model is from the dense one.

    By `measure`: ``nats``, the Kullback-Leibler divergence of a prediction; ``relative``, the
    squared error of each output of a sample over the mean square of the dense one's (`powers`), a
    mean over outputs; ``loss``, that of the caller.
    """

    inputs: ModelInputs
    measure: Measure
    loss: Loss | None = None
    probabilities: bool = False
    """Whether it is these that the models put out."""
    powers: tuple[float, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(
        cls, dense: nn.Module, inputs: ModelInputs, batches: Sequence[Batch], loss: Loss | None
    ) -> Target:
        """Look at what the dense model puts out."""
        if loss is not None:
            return cls(inputs, "loss", loss)
        with failures_named(dense, batches[0]), without_cache(dense):
            table = table_of(forward(dense, batches[0]), batches[0], inputs)
        if table is not None:
            return cls(inputs, "nats", probabilities=holds_probabilities(table))
        target = cls(inputs, "relative")
        found = target.outputs(dense, batches[0])
        if not any(one.is_floating_point() or one.is_complex() for one in found):
            raise ModelError(
                f"{type(dense).__name__} puts out whole numbers alone, through which no gradients "
                "flow; let its forward return what they are made of, or scores"
            )
        squares = [[_square(one) for one in target.outputs(dense, batch)] for batch in batches]
        samples = sum(map(inputs.count, batches))
        means = (float(sum(of_one)) / samples for of_one in zip(*squares, strict=True))
        # What is always zero has no size that an error could be relative to.
        return dataclasses.replace(target, powers=tuple(mean or 1.0 for mean in means))

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """Return what is compared of a model's outputs: log-probabilities, tensors, or all."""
        batch = to_model(batch, model)
        with failures_named(model, batch), without_cache(model):
            result = forward(model, batch)
        if self.measure == "loss":
            return result
        if self.measure == "relative":
            return comparable(result)
        table = table_of(result, batch, self.inputs)
        return table if table is None else log_probabilities(as_logits(table, self.probabilities))

    @torch.no_grad()
    def check_alike(self, smaller: nn.Module, dense: nn.Module, batch: Batch) -> None:
        """Run models, and refuse those whose outputs differ in form; a loss may compare any."""
        found, expected = (self.outputs(model, batch) for model in (smaller, dense))
        if self.measure == "loss":
            return
        mine, due = _shapes(found), _shapes(expected)
        if mine != due:
            raise ModelError(
                f"the smaller model puts out {mine} where the dense one puts out {due}, so that "
                f"it does not come from this {type(dense).__name__}; give the dense model that it "
                "was pruned from"
            )

    def distance(self, found: Any, dense: Any, samples: int) -> tuple[Tensor, int]:
        """Return a sum of distances, and over how many predictions or samples it is."""
        if self.loss is not None:
            # What it writes to the dense model's outputs must not stay in those that are kept.
            return _scalar(self.loss(found, fresh(dense))) * samples, samples
        if self.measure == "nats":
            return summed_divergence(dense, found), len(dense)
        pairs = zip(found, dense, self.powers, strict=True)
        errors = [_square(b - a) / power for b, a, power in pairs]
        return torch.stack(errors).mean(), samples


def _square(tensor: Tensor) -> Tensor:
    """Return the sum of squares; those of half precision would overflow."""
    finer = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return finer.abs().square().sum().double()


def _shapes(outputs: Any) -> list[list[int]] | str:
    """Return the shapes of what is compared of a model's outputs."""
    if outputs is None:
        return "no scores of classes"
    return [list(one.shape) for one in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def _scalar(found: Any) -> Tensor:
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
        raise OptionError(
            f"the loss returned {safe_repr(found):.80}; let it return a tensor with one number"
        )
    return found.reshape(())


def in_batches(samples: Sequence[Batch], at_once: int) -> list[Batch]:
    """Return batches of so many samples, of batches of one."""
    starts = range(0, len(samples), at_once)
    some = [samples[start : start + at_once] for start in starts]
    return [{name: torch.cat([one[name] for one in each]) for name in each[0]} for each in some]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples that train nothing, what the dense model says of them, and so how far others are.

    Ranks share the batches out; of the predictions of each, `rows` are kept.
    """

    target: Target
    batches: Sequence[Batch] = field(repr=False)
    expected: Sequence[Any] = field(repr=False)
    rows: Sequence[slice | None] = field(repr=False)
    ranks: Ranks

    @classmethod
    @torch.no_grad()
    def of(
        cls, target: Target, dense: nn.Module, batches: Sequence[Batch], ranks: Ranks
    ) -> HeldOut:
        """Run the dense model on the samples."""
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
