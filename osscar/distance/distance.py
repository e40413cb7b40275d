"""How far a model is from the dense one: in its predictions, or in all that it returns."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import with_config
from torch import Tensor, nn

from graph.tracing.patches import computes_shapes_alone
from graph.tracing.preserve import without_cache
from osscar.base.errors import NonFiniteError, OptionError
from osscar.base.inputs import NATS, RELATIVE, AnyDistance, OwnDistance, safe_repr
from osscar.base.json_files import STRICT
from osscar.base.printable import listed, pluralize, published
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import ModelInputs
from osscar.data.reader import Batch, to_model
from osscar.distance.scores import Scores, asked_scores, real_positions, scores_of, watched
from osscar.network.hooks import HELD_BYTES, Recording
from osscar.network.modules import device_of, forward, forward_in_bfloat16, fresh
from osscar.network.predictions import as_logits, holds_probabilities, named_outputs
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.failures import failures_named
from osscar.proof.equivalence import comparable
from solvers.own_code import blamed

Measure: TypeAlias = Literal["nats", "relative", "own"]

UNITS = {"nats": "nats", "relative": "of the squared outputs", "own": "by the given distance"}
"""What distances are in, by their measure."""


@with_config(STRICT)
@dataclass(frozen=True)
class Compared:
    """What the distance of two models is, and why it is that."""

    measure: Measure
    """``nats``, the Kullback-Leibler divergence of a prediction; ``relative``, the squared error of
    each output over its square, a mean over outputs; or the caller's ``own``."""
    over: str
    """The outputs and positions that are compared, or the caller's function."""
    why: str
    value: float | None = None
    """The distance on held-out samples, where it was measured."""

    def measured(self, value: float | None) -> Compared:
        """Return the same with a distance; what is not finite is none."""
        known = value is not None and math.isfinite(value)
        return dataclasses.replace(self, value=value if known else None)

    def __str__(self) -> str:
        return f"{_MEASURES[self.measure]} {self.over}, since {self.why}"


_MEASURES = {
    "nats": "divergence in nats, of",
    "relative": "squared error over the square, of",
    "own": "that of",
}
"""What distances are, in words."""


class Likeness(NamedTuple):
    """How like the dense model another is."""

    distance: float
    """A mean over predictions, or samples."""
    agreement: float
    """The share of predictions of the dense model's likeliest class; 0 without predictions."""


MOST_BYTES = 256 << 20
"""Memory of the dense predictions that are kept; of more, evenly spread ones are taken."""

_ZERO = 1e-3
"""Rounding of what the caller measures of equal outputs is less."""

_GIVEN, _REAL = "it is given", " that is not padded"

_CACHED = 1 << 18
"""Numbers of float32 of which several tensors fit into a cache."""


def _run(model: nn.Module, batch: Batch, bfloat16: bool = False, source: str = "the data") -> Any:
    """Run a model, with products of bfloat16 if `bfloat16`."""
    batch, run = to_model(batch, model), forward_in_bfloat16 if bfloat16 else forward
    with failures_named(model, batch, source), without_cache(model):
        return run(model, batch)


@dataclass(frozen=True, eq=False)
class Distance:
    """How far a model is from the dense one, by what it returns for the same inputs."""

    inputs: ModelInputs
    compared: Compared
    scores: Scores | None = None
    """The output of which a divergence is measured."""
    function: OwnDistance | None = None
    probabilities: bool = False
    """Whether the models return these, and not logits."""
    powers: tuple[float, ...] = ()
    """The mean square of each output of the dense model over samples."""
    bytes: int = 0
    """Memory of the log-probabilities of a sample."""

    @classmethod
    @torch.no_grad()
    def from_outputs(
        cls, dense: nn.Module, inputs: ModelInputs, batch: Batch, asked: AnyDistance = None
    ) -> Distance:
        """Look at what the dense model returns for a batch.

        `asked` is the ``distance`` of a request; by default the rules of `osscar.distance.scores`
        tell whether an output holds scores of classes.  An `OptionError` is raised where a
        divergence is asked for and nothing has rows, or where the caller's distance of the dense
        model from itself is not zero.
        """
        if isinstance(asked, OwnDistance):
            own = cls(inputs, Compared("own", published(asked.source), _GIVEN), function=asked)
            result = _run(dense, batch, source=inputs.source)
            zero = own.each(result, fresh(result), batch).abs().max()
            if not zero <= _ZERO:
                raise OptionError(
                    f"distance is {asked}, which returned {float(zero):.3g} for two equal models; "
                    "let it return 0 where both models return the same"
                )
            return own
        with watched(dense, inputs, batch) as seen:
            result = _run(dense, batch, source=inputs.source)
        one = seen(result)
        found = asked_scores(one) if asked == NATS else scores_of(one)
        if asked == RELATIVE or (asked is None and found is None):
            outputs, named = _numbers(result, batch), _named(result)
            some = any(x.shape != y.shape for x, (_, y) in zip(outputs, named, strict=True))
            over = f"{listed([*dict(named)], 6)}{_REAL if some else ''}"
            why = "nothing says that they are scores of classes" if asked is None else _GIVEN
            return cls(inputs, Compared("relative", over, why))
        if found is None:
            there = ", ".join(f"{name!r} {tuple(x.shape)}" for name, x in one.outputs.items())
            raise OptionError(
                f"distance is 'nats', and no output of {type(dense).__name__} is known to hold "
                f"scores of classes ({there}); call it 'logits', or give a function"
            )
        table, whole = found.table(result, batch), one.outputs[found.output]
        one_only = whole[0].numel() == table.shape[-1]
        at = f" at {'one' if one_only else 'each'} position" if whole.ndim > 2 else ""
        padded = _REAL if table.ndim < whole.ndim else ""
        over = f"{found.output!r}, {table.shape[-1]} classes{at}{padded}"
        return cls(
            inputs,
            Compared("nats", over, found.why),
            found,
            probabilities=holds_probabilities(table),
            bytes=4 * table.numel() // inputs.count(batch),
        )

    @property
    def measure(self) -> Measure:
        """What distances are."""
        return self.compared.measure

    def outputs(
        self,
        model: nn.Module,
        batch: Batch,
        step: int = 1,
        run: Callable[[nn.Module, Batch], Any] = _run,
    ) -> Any:
        """Return what is compared of a model's outputs: rows of logits, tensors, or all.

        It is every `step`-th prediction, without padding; `run` makes a forward pass.
        """
        if self.scores is None:
            result = run(model, batch)
            return result if self.function is not None else _numbers(result, batch)
        asked = batch
        if step > 1 and picks_predictions(model, self.inputs):
            positions = torch.arange(batch["input_ids"].shape[1])
            asked, step = {**batch, "logits_to_keep": spread(positions, step)}, 1
        rows = as_logits(self.scores.table(run(model, asked), batch), self.probabilities)
        if step > 1 and self.inputs.tokens and rows.ndim == 3:  # as if each window ran by itself
            rows, step = torch.cat([spread(window, step) for window in rows]), 1
        return spread(rows.flatten(0, -2), step)

    def normalized(self, outputs: Any) -> Any:
        """Return `outputs` with log-probabilities in the place of logits."""
        return outputs.float().log_softmax(-1) if self.measure == "nats" else outputs

    def each(self, found: Any, dense: Any, batch: Batch) -> Tensor:
        """Return the caller's distances, a number a sample."""
        assert self.function is not None
        # What it writes to the dense model's outputs must not stay in those that are kept.
        with blamed(self.function.source, OptionError):
            values = self.function.function(found, fresh(dense), batch)
        samples = self.inputs.count(batch)
        if not (isinstance(values, Tensor) and values.is_floating_point()) or values.shape != (
            samples,
        ):
            raise OptionError(
                f"distance is {self.function}, which returned {safe_repr(values):.80} for "
                f"{pluralize(samples, 'sample')}; let it return a tensor with one number a sample, "
                f"of the shape ({samples},)"
            )
        if not computes_shapes_alone() and bool((values < -_ZERO).any()):
            raise OptionError(
                f"distance is {self.function}, which returned {float(values.min()):.3g}; let it "
                "return 0 or more, and more where the models are farther apart"
            )
        return values.double()

    def summed(self, found: Any, dense: Any, batch: Batch) -> tuple[Tensor, int]:
        """Return a sum of distances, and over how many predictions or samples it is."""
        samples = self.inputs.count(batch)
        if self.function is not None:
            return self.each(found, dense, batch).sum(), samples
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


def _named(result: Any) -> list[tuple[str, Tensor]]:
    """Return outputs that are compared, with what they are called."""
    names = {id(x): name for name, x in named_outputs(result)}
    return [(names.get(id(x), "a tensor"), x) for x in comparable(result)]


def _numbers(result: Any, batch: Batch) -> list[Tensor]:
    """Return outputs that are numbers, without padded positions."""
    found = ((x, real_positions(name, x, batch)) for name, x in _named(result))
    return [x if real is None else x[real] for x, real in found]


def _square(tensor: Tensor) -> Tensor:
    """Return the sum of squares; those of half precision would overflow."""
    finer = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return finer.abs().square().sum().double()


@dataclass(frozen=True, eq=False)
class Reference:
    """What the dense model returns on some samples, and so how far other models are."""

    distance: Distance
    batches: Sequence[Batch] = field(repr=False)
    """Those of this rank."""
    expected: Sequence[Any] = field(repr=False)
    """Of the predictions of each batch, one in `step`."""
    step: int = 1
    ranks: Ranks = ALONE
    bfloat16: bool = False
    """Whether passes multiply in bfloat16."""
    passes: Sequence[Recording] = field(default=(), repr=False)
    """The dense model's, if they can be resumed."""

    @classmethod
    @torch.no_grad()
    def from_run(
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
        """Run the dense model on the samples, and keep one prediction in `step`, or fewer."""
        mine = [batches[i] for i in ranks.share([1.0] * len(batches))]
        samples = sum(map(distance.inputs.count, batches))
        step = max(step, -(-distance.bytes * samples // MOST_BYTES))
        resumable = resumable and not is_on_disk(dense)
        passes = [Recording(dense, HELD_BYTES // len(mine)) for _ in mine] if resumable else []
        expected = []
        for index, batch in enumerate(mine):
            with passes[index].noted() if passes else nullcontext():
                outputs = distance.outputs(dense, batch, step, partial(_run, bfloat16=bfloat16))
            expected.append(fresh(distance.normalized(outputs)))
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
        """Compare what a model returns with what the dense one does.

        Where the model is the dense one, but for the values of the parameters that are `changed`,
        what they do not change is not computed again, if passes can be resumed.  The distance has
        to be finite; else a `NonFiniteError` is raised.
        """
        found = self.compared(model, changed)
        if not math.isfinite(found.distance):
            what = "logits are" if self.distance.measure == "nats" else "outputs are"
            raise NonFiniteError(
                f"the pruned model's {what} NaN or infinite where the dense model's are not; "
                "use dtype float32 (`--dtype float32`), or a higher damp (`--set damp=1`)"
            )
        return found

    @torch.no_grad()
    def compared(self, model: nn.Module, changed: Collection[Tensor] | None = None) -> Likeness:
        """Return the same, whether it is finite or not."""
        sums = torch.zeros(3, dtype=torch.float64)
        for index, (batch, expected) in enumerate(zip(self.batches, self.expected, strict=True)):
            run = partial(_run, bfloat16=self.bfloat16)
            whole = changed is None or not self.passes
            with nullcontext() if whole else self.passes[index].resumed(changed or ()):
                found = self.distance.outputs(model, batch, self.step, run)
            same, (total, count) = 0.0, self.distance.summed(found, expected, batch)
            if self.distance.measure == "nats":
                same = float((expected.argmax(-1) == found.argmax(-1)).sum())
            sums += torch.tensor([float(total), same, count], dtype=torch.float64)
        self.ranks.all_reduce("the distance from the dense model", [sums])
        total, same, count = sums.tolist()
        return Likeness(total / count, same / count)


def picks_predictions(model: nn.Module, inputs: ModelInputs) -> bool:
    """Whether a model is a language model that makes those predictions alone that are asked for."""
    return inputs.tokens and "logits_to_keep" in inspect.signature(model.forward).parameters


def spread(rows: Tensor, step: int) -> Tensor:
    """Return one row in so many, evenly spread, the last one among them."""
    return rows[(len(rows) - 1) % step :: step]


def summed_divergence(dense: Tensor, found: Tensor) -> Tensor:
    """Return the sum, in float64, of Kullback-Leibler divergences of log-probabilities."""
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
