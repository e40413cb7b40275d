"""How well models do on data: the perplexity of text, and the outputs of anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from osscar.allocation.divergence import as_logits
from osscar.base.errors import DataError, ModelError, NonFiniteError, OsscarError
from osscar.base.inputs import whole_number
from osscar.base.memory import let_shortage_pass
from osscar.base.messages import warn
from osscar.base.progress import track
from osscar.checkpoint.first_pass import check_causal
from osscar.data.batches import Batch, as_inputs, named_inputs, to_model
from osscar.data.images import ImageSet
from osscar.data.samples import IGNORED, SampleSet
from osscar.data.tensors import SampleList, TensorSet
from osscar.data.text import TextSet
from osscar.data.tokens import CalibrationSet
from osscar.evaluation.forward import forward_seconds
from osscar.evaluation.speed import Speed, measure_speed
from osscar.network.modules import check_usable, evaluating
from osscar.network.predictions import (
    LOGITS,
    known_output,
    named_logits,
    named_outputs,
    place_of_classes,
    reads_sequences,
    scored_output,
)
from osscar.offload.on_disk import room_for_pass
from osscar.preparation.repeatable import check_repeatable
from osscar.proof.equivalence import call

ROWS_AT_ONCE = 128
"""Positions whose logits are float32 at a time: 25 MB with a vocabulary of 49,152."""

_FEW_TOKENS, _FEW_SAMPLES = 32, 2
"""That tell whether two passes are alike."""

_TOP = 5


@dataclass(frozen=True)
class TextQuality:
    """How well a model predicts a text.

    Attributes
    ----------
    perplexity
        Exponential of the mean negative log-likelihood per scored token.
    tokens
        Number of tokens scored.
    windows
        Number of windows they lie in.
    seqlen
        Tokens per window; the last may be shorter.
    special_tokens
        How many of them, at the beginning of each, the tokenizer puts before a text.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    special_tokens: int = 0


@dataclass(frozen=True)
class SampleQuality:
    """How well a model does on images, or on samples of any other kind.

    Attributes
    ----------
    samples
        Number of samples scored.
    classes_in
        The output that is taken as scores of classes, which the next six are of: `logits`, or the
        only one beside single numbers such as a loss; of several the first of a tuple, and of a
        mapping the only matrix with a row for each sample, with a warning.  The classes are the
        dimension that the labels lack (see `osscar.network.predictions.place_of_classes`).  Tensors
        without labels need no such output: None if there is none.
    predictions
        How many predictions have a label.
    top1, top5
        Share of the predictions whose label is the first, or among the first five, of the classes;
        None without labels, and top5 also where there are no more than five classes.
    perplexity
        Exponential of the mean negative log-likelihood of the labels, where samples have one for
        each position; else None.
    agreement
        Share of the predictions whose first class is the dense model's; None without one.
    kl
        Mean Kullback-Leibler divergence of the classes from the dense model's, in nats a
        prediction; None without one.
    errors
        How far each output is from the dense model's, by name: the sum of squared differences over
        the sum of squares, 0 if they are equal and 1 if it were all zeros. Empty without a dense
        model; None where that one's are all zero.
    """

    samples: int
    classes_in: str | None
    predictions: int
    top1: float | None
    top5: float | None
    perplexity: float | None
    agreement: float | None
    kl: float | None
    errors: Mapping[str, float | None]


@dataclass(frozen=True)
class SampleSpeed:
    """Samples per second of one model, in forward passes over one batch."""

    samples_per_second: float
    batch_size: int
    repetitions: int


def score(
    models: Sequence[nn.Module],
    data: Any,
    *,
    dense: nn.Module | None = None,
    classes: Sequence[str] = (),
    batch_size: int | None = None,
) -> list[Any]:
    """Measure how well several models do on the same data, as `osscar.evaluate` does for one.

    Outputs of images and tensors are compared with those of the `dense` model.  By default 4
    windows, or 32 images or samples, run at once.
    """
    everyone = [*models, *(() if dense is None or dense in models else (dense,))]
    return task_of(everyone, data, classes, batch_size).score(models, dense)


def task_of(
    models: Sequence[nn.Module], data: Any, classes: Sequence[str], batch_size: int | None
) -> Task:
    """Return what models are asked about data, which they have been found to read."""
    for model in models:
        check_usable(model)
    for kind, task in _TASKS.items():
        if isinstance(data, kind):
            size = task.batch_size if batch_size is None else batch_size
            return task(
                models, data, classes, whole_number(size, "the batch size (--batch-size)", 1)
            )
    raise DataError(
        f"the data are a {type(data).__name__}; give what osscar.load_text, osscar.load_images, "
        "osscar.load_tensors, osscar.load_batches or osscar.load_calibration returns"
    )


# ---- text --------------------------------------------------------------------------------


class _Text:
    """Windows of text, which are scored by each model alone."""

    batch_size = 4
    sample = "token"
    together = False

    def __init__(
        self, models: Sequence[nn.Module], data: Any, classes: Sequence[str], batch_size: int
    ) -> None:
        for model in models:
            if not isinstance(model, PreTrainedModel) or model.get_input_embeddings() is None:
                raise ModelError(
                    f"{type(model).__name__} is no language model of transformers; score it on "
                    "what osscar.load_images or osscar.load_tensors returns"
                )
        self.rows, self.special_tokens = batch_size, 0
        if isinstance(data, CalibrationSet):
            self.windows = tuple(data.tokens)
            for model in models:
                as_inputs(model, data)
        else:
            self.windows, self.special_tokens = data.cut(models), len(data.before)
            for model in models:
                self._check_vocabulary(model, int(data.tokens.max()))

    @staticmethod
    def _check_vocabulary(model: Any, largest: int) -> None:
        known = model.get_input_embeddings().num_embeddings
        if largest >= known:
            raise ModelError(
                f"the tokenizer gives token {largest} but the model knows only {known}; "
                "use the tokenizer that belongs to the model"
            )

    def score(self, models: Sequence[nn.Module], dense: nn.Module | None) -> list[TextQuality]:
        return [self._score(model) for model in models]

    def _score(self, model: Any) -> TextQuality:
        windows, context = self.windows, max(1, self.special_tokens)
        whole = [one for one in windows if len(one) == len(windows[0])]
        batches = [
            *torch.split(torch.stack(whole), self.rows),
            *(one[None] for one in windows[len(whole) :]),
        ]
        total, done = 0.0, 0
        with evaluating(model), torch.inference_mode():
            check_repeatable(model, {"input_ids": windows[0][None, :_FEW_TOKENS].to(model.device)})
            check_causal(model, "the model")
            for batch in track(batches, "Scoring"):
                batch = batch.to(model.device)
                with room_for_pass(model, batch.numel()):
                    logits = named_logits(model(input_ids=batch, use_cache=False))
                    if logits is None:
                        raise ModelError(
                            f"{type(model).__name__} returns no logits; give a model that predicts "
                            "the next token"
                        )
                    for window, of_window in zip(batch, logits, strict=True):
                        place = f"window {done}"
                        total += _negative_log_likelihood(of_window, window, context, place)
                        done += 1
        tokens = sum(len(one) - context for one in windows)
        perplexity = _exponential(total / tokens)
        return TextQuality(perplexity, tokens, done, len(windows[0]), self.special_tokens)

    def example(self, model: nn.Module) -> tuple[Batch, int]:
        first = self.windows[0]
        return {"input_ids": first[None].to(next(model.parameters()).device)}, len(first)

    def speeds(self, models: Sequence[Any], repetitions: int, new_tokens: int) -> Sequence[Speed]:
        return measure_speed(
            models, self.windows[0], new_tokens=new_tokens, repetitions=repetitions
        )


def _negative_log_likelihood(logits: Tensor, window: Tensor, context: int, place: str) -> float:
    """Return the sum over the tokens but the first ones, a few positions at a time in float32."""
    total = 0.0
    for start in range(context - 1, len(window) - 1, ROWS_AT_ONCE):
        targets = window[start + 1 : start + 1 + ROWS_AT_ONCE]
        rows = logits[start : start + len(targets)].float()
        loss = F.cross_entropy(rows, targets, reduction="sum").item()
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the model's logits are NaN or infinite in {place}, tokens {start} to "
                f"{start + len(targets) - 1}; use --dtype float32, or check its weights"
            )
        total += loss
    return total


def _exponential(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        raise NonFiniteError(
            f"the mean negative log-likelihood is {mean:.3g}, so the perplexity overflows; "
            "check the model's weights"
        ) from None


# ---- images and tensors ------------------------------------------------------------------


class _Samples:
    """Images or tensors, on which outputs are compared with the dense model's."""

    batch_size = 32
    together = True

    def __init__(
        self, models: Sequence[nn.Module], data: Any, classes: Sequence[str], batch_size: int
    ) -> None:
        self.models, self.data, self.classes, self.rows = models, data, classes, batch_size
        self.sample, self.alone = data.sample_name, data.alone
        if isinstance(data, TensorSet | SampleList):
            for model in models:
                as_inputs(model, data)

    def score(self, models: Sequence[nn.Module], dense: nn.Module | None) -> list[SampleQuality]:
        tallies = [_Tally() for _ in models]
        labels: Tensor | None = None
        done = 0
        with evaluating(*self.models), torch.inference_mode():
            for batch in self.data.batches(self.rows):
                if not done:
                    self._check_repeatable(batch)
                count = self._count(batch)
                rows = slice(done, done + count)
                raw = None if self.data.labels is None else self.data.labels[rows]
                found = {id(m): self._outputs(m, batch, count, raw) for m in self.models}
                if not done:
                    scores = found[id(models[0])].scores
                    if scores is not None:
                        labels = self.data.class_labels(self.classes, scores.shape[1])
                known = None if labels is None else labels[rows]
                for tally, model in zip(tallies, models, strict=True):
                    theirs = None if dense is None or dense is model else found[id(dense)]
                    tally.add(found[id(model)], theirs, known)
                done += count
        return [tally.quality(done) for tally in tallies]

    def _count(self, batch: Any) -> int:
        if self.alone:
            return 1
        return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))

    def _check_repeatable(self, batch: Any) -> None:
        first = slice(None if self.alone else _FEW_SAMPLES)
        few = batch[first] if isinstance(batch, Tensor) else {n: t[first] for n, t in batch.items()}
        for model in self.models:
            given = _arguments(model, few)
            with _failures_named(model, given):
                check_repeatable(model, given)

    def _outputs(self, model: nn.Module, batch: Any, count: int, labels: Tensor | None) -> _Outputs:
        given = _arguments(model, batch)
        with _failures_named(model, given):
            result = call(model, given)
        if isinstance(self.data, ImageSet):  # of a classifier there is a class for each image
            known = torch.zeros(count) if labels is None else labels
            classifies = _classifies(result, count)
            if labels is not None and not classifies:
                warn(
                    f"{type(model).__name__} puts out no scores of classes, so that the labels of "
                    "images are left out"
                )
            labels = known if classifies else None
        return _Outputs.of(model, result, count, labels, reads_sequences(given.values()))

    def example(self, model: nn.Module) -> tuple[Batch, int]:
        batch = _arguments(model, next(self.data.batches(1)))
        return batch, 1

    def speeds(
        self, models: Sequence[nn.Module], repetitions: int, new_tokens: int
    ) -> Sequence[SampleSpeed]:
        batches = [_arguments(model, next(self.data.batches(self.rows))) for model in models]
        rows = 1 if self.alone else min(self.rows, len(self.data))
        return [
            SampleSpeed(rows / seconds, rows, repetitions)
            for seconds in forward_seconds(models, batches, repetitions)
        ]


Task: TypeAlias = _Text | _Samples
"""What models are asked about data of one kind: a `score`, an `example` and `speeds`.

`sample` is what operations are counted for, and `together` whether models run side by side.
"""

_TASKS: dict[type, type[Task]] = {TextSet: _Text, CalibrationSet: _Text, SampleSet: _Samples}
"""By the type of data."""


def _arguments(model: nn.Module, batch: Tensor | Batch) -> Batch:
    """Return a batch by the names of a model's arguments, as its weights are."""
    named = named_inputs(model, (batch,)) if isinstance(batch, Tensor) else batch
    return to_model(named, model)


def _classifies(result: Any, count: int) -> bool:
    """Whether a model that reads images puts out a matrix with a row for each, among others."""
    tensors = [x for _, x in named_outputs(result) if x.is_floating_point()]
    return not tensors or any(x.ndim == 2 and len(x) == count for x in tensors)


@contextmanager
def _failures_named(model: nn.Module, given: Batch) -> Iterator[None]:
    """Say so where a model fails in the block, on what is to be scored."""
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        what = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ModelError(
            f"{type(model).__name__} fails on {what}: {type(error).__name__}: {error}; give data "
            "that it reads"
        ) from error


@dataclass(frozen=True)
class _Outputs:
    """What a model puts out of numbers with fractions, in double precision on the CPU, by name.

    `scores`, (predictions, classes), are of the one that is taken as scores of classes, which is
    called `classes_in`; None if there is none.
    """

    model: str
    named: Mapping[str, Tensor]
    classes_in: str | None = None
    scores: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        result: Any,
        count: int,
        labels: Tensor | None,
        sequences: bool = False,
    ) -> _Outputs:
        """Take what a model returned for some samples, of which labels are known or not.

        Of sequences each position may have scores of classes.
        """
        kind = type(model).__name__
        found = {
            name: one
            for name, one in named_outputs(result)
            if one.is_floating_point() or one.is_complex()
        }
        if not found:
            raise ModelError(
                f"{kind} returned a {type(result).__name__} without a floating-point tensor; let "
                "its forward return one, or a dictionary or tuple of them"
            )
        for name, one in found.items():
            if not bool(torch.isfinite(one).all()):
                raise NonFiniteError(f"{name!r} of {kind} is NaN or infinite; check its weights")
        exact = {
            name: one.to("cpu", torch.complex128 if one.is_complex() else torch.float64)
            for name, one in found.items()
        }
        place: int | None = -1
        if labels is None:
            name, known = known_output(result)
            dimensions = (2, 3) if sequences and name == LOGITS else (2,)
            if known is None or known.ndim not in dimensions or known.shape[-1] < 2:
                return cls(kind, exact)
        else:
            name, scored = scored_output(result, count, kind)
            place = place_of_classes(scored.shape, labels.shape, sequences=sequences)
        if place is None:
            assert labels is not None
            there = ", ".join(f"{key!r} {tuple(one.shape)}" for key, one in found.items())
            wanted: list[Any] = [count, *labels.shape[1:]]
            wanted.insert(len(wanted) if sequences else 1, "classes")
            raise ModelError(
                f"{kind} returned {there}, and the labels are {tuple(labels.shape)}: scores of "
                f"classes would be {tuple(wanted)}, named {LOGITS!r} where "
                "there are other outputs; let the model put out these, or score it on a TensorSet "
                "without labels"
            )
        return cls(kind, exact, name, exact[name].movedim(place, -1).flatten(0, -2))


class _Tally:
    """What one model comes to, summed over batches."""

    def __init__(self) -> None:
        self.classes_in: str | None = None
        self.classes = self.labelled = self.first = self.among = self.compared = self.agreeing = 0
        self.kl = self.surprise = 0.0
        self.positions = False
        self.apart: dict[str, float] = {}
        self.size: dict[str, float] = {}

    def add(self, mine: _Outputs, dense: _Outputs | None, labels: Tensor | None) -> None:
        """Count a batch; labels of -100 are left out."""
        if dense is not None:
            self._compare(mine, dense)
        logits = mine.scores
        if logits is None:
            return
        self.classes_in, self.classes = mine.classes_in, logits.shape[1]
        if labels is not None:
            self.positions = labels.ndim > 1
            if len(logits) < labels.numel():  # scores of the last position alone
                labels = labels[:, -1]
            labels = labels.flatten()
            known = labels != IGNORED
            labels = labels[known]
            if self.positions:
                scores = as_logits(logits)[known]
                self.surprise += float(F.cross_entropy(scores, labels, reduction="sum"))
            best = logits[known].topk(min(_TOP, self.classes)).indices
            self.labelled += len(labels)
            self.first += int((best[:, 0] == labels).sum())
            self.among += int((best == labels[:, None]).any(1).sum())
        if dense is not None and dense.scores is not None:
            theirs = dense.scores
            self.compared += len(logits)
            self.agreeing += int((logits.argmax(1) == theirs.argmax(1)).sum())
            p, q = (as_logits(one).log_softmax(1) for one in (logits, theirs))
            self.kl += float(F.kl_div(p, q, reduction="sum", log_target=True))

    def _compare(self, mine: _Outputs, dense: _Outputs) -> None:
        """Add up how far outputs are apart."""
        shapes, others = ({n: tuple(t.shape) for n, t in o.named.items()} for o in (mine, dense))
        if shapes != others:
            raise ModelError(
                f"the models cannot be compared: {mine.model} puts out {shapes}, and the dense one "
                f"{others}"
            )
        for name, known in dense.named.items():
            apart = float((mine.named[name] - known).abs().square().sum())
            self.apart[name] = self.apart.get(name, 0.0) + apart
            self.size[name] = self.size.get(name, 0.0) + float(known.abs().square().sum())

    def quality(self, samples: int) -> SampleQuality:
        """Return what it comes to."""
        labelled, compared = self.labelled, self.compared
        return SampleQuality(
            samples=samples,
            classes_in=self.classes_in,
            predictions=labelled,
            top1=self.first / labelled if labelled else None,
            top5=self.among / labelled if labelled and self.classes > _TOP else None,
            perplexity=_exponential(self.surprise / labelled) if self.positions else None,
            agreement=self.agreeing / compared if compared else None,
            kl=self.kl / compared if compared else None,
            errors={
                name: apart / self.size[name] if self.size[name] else None if apart else 0.0
                for name, apart in self.apart.items()
            },
        )
