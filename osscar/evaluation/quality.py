"""How well models do on data: the perplexity of text, and the outputs of anything else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from osscar.base.errors import DataError, ModelError, NonFiniteError, warn
from osscar.base.inputs import whole_number
from osscar.base.timing import progress_bar
from osscar.checkpoint.validation import check_causal
from osscar.data.batches import as_inputs
from osscar.data.images import ImageSet
from osscar.data.reader import Batch, Reader, to_model
from osscar.data.samples import IGNORED, SampleList, SampleSet, TensorSet, end_of, rows_and_batches
from osscar.data.text import CalibrationSet, TextSet
from osscar.distance.distance import summed_divergence
from osscar.distance.scores import labelled_scores
from osscar.evaluation.confidence import MOST_EXPONENT
from osscar.network.modules import check_usable, evaluating, token_embeddings
from osscar.network.predictions import (
    LOGITS,
    as_logits,
    known_output,
    named_logits,
    named_outputs,
    outputs_by_name,
    reads_sequences,
)
from osscar.offload.on_disk import room_for_pass
from osscar.preparation.failures import check_repeatable, failures_named, together
from osscar.proof.equivalence import call
from osscar.proof.lineage import lineage_of

WINDOWS_AT_ONCE, SAMPLES_AT_ONCE = 4, 32

ROWS_AT_ONCE = 128
"""Positions whose logits are float32 at a time: 25 MB with a vocabulary of 49,152."""

_FEW_TOKENS, _FEW_SAMPLES = 32, 2
"""On which two passes are compared, as their outputs have to be the same."""

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
        only one with a dimension that the labels lack, which is that of the classes (see
        `osscar.network.predictions.place_of_classes`).  Without labels it is the only one beside
        single numbers such as a loss; None if there is none.
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


def score(
    models: Sequence[nn.Module],
    data: Any,
    *,
    dense: nn.Module | None = None,
    batch_size: int | None = None,
) -> list[Any]:
    """Measure how well several models do on the same data, as `osscar.evaluate` does for one."""
    for model in models:
        check_usable(model)
    samples = isinstance(data, SampleSet)
    size = SAMPLES_AT_ONCE if samples else WINDOWS_AT_ONCE
    if batch_size is not None:
        size = whole_number(batch_size, "the batch size (batch_size, `--batch-size`)", 1)
    if samples:
        return _score_samples(models, data, dense, size)
    text = Windows.of(models, data)
    return [_score_windows(model, text, size) for model in models]


# ---- text --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, (tokens,) int64, of which so many at the beginning are special."""

    windows: tuple[Tensor, ...]
    special_tokens: int = 0

    @classmethod
    def of(cls, models: Sequence[Any], data: Any) -> Windows:
        """Return windows of a text for all models (DataError, ModelError)."""
        if not isinstance(data, TextSet | CalibrationSet):
            raise DataError(
                f"the data are a {type(data).__name__}; give what osscar.load_text, "
                "osscar.load_images, osscar.load_tensors, osscar.load_batches or "
                "osscar.load_calibration returns"
            )
        for model in models:
            check_usable(model)
            if not isinstance(model, PreTrainedModel) or token_embeddings(model) is None:
                raise ModelError(
                    f"{type(model).__name__} is no language model of transformers; score it on "
                    "what osscar.load_images or osscar.load_tensors returns"
                )
        if isinstance(data, CalibrationSet):
            for model in models:
                as_inputs(model, data)
            return cls(tuple(data.tokens))
        largest = int(data.tokens.max())
        known: int = min(model.get_input_embeddings().num_embeddings for model in models)
        if largest >= known:
            raise ModelError(
                f"the tokenizer returns token {largest}, and the model has {known} embeddings; "
                "use the tokenizer that belongs to the model"
            )
        return cls(data.cut(models), len(data.before))


def _score_windows(model: Any, text: Windows, size: int) -> TextQuality:
    """Return a language model's perplexity, its context not scored (ModelError, NonFiniteError)."""
    windows, context = text.windows, max(1, text.special_tokens)
    whole = [one for one in windows if len(one) == len(windows[0])]
    batches = [
        *torch.split(torch.stack(whole), size),
        *(one[None] for one in windows[len(whole) :]),
    ]
    losses = list[float]()
    with evaluating(model), torch.inference_mode(), progress_bar("Scoring", len(batches)) as bar:
        check_repeatable(model, {"input_ids": windows[0][None, :_FEW_TOKENS].to(model.device)})
        check_causal(model, "the model")
        for batch in batches:
            for window, logits in _predicted(model, batch.to(model.device)):
                losses.append(_loss(logits[context - 1 : -1], window[context:]))
                if not math.isfinite(losses[-1]):
                    raise NonFiniteError(
                        f"the model's logits are NaN or infinite in window {len(losses) - 1}; use "
                        "dtype float32 (`--dtype float32`), or check its weights"
                    )
            bar.advance()
    tokens = sum(len(one) - context for one in windows)
    perplexity = math.exp(min(sum(losses) / tokens, MOST_EXPONENT))
    return TextQuality(perplexity, tokens, len(windows), len(windows[0]), text.special_tokens)


def _predicted(model: Any, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each window, (tokens,), with the logits of its positions, (tokens, vocabulary)."""
    with room_for_pass(model, batch.numel()):
        logits = named_logits(model(input_ids=batch, use_cache=False))
        if logits is None:
            raise ModelError(
                f"{type(model).__name__} returns no logits; give a model that predicts the next "
                "token"
            )
        yield from zip(batch, logits, strict=True)


def _loss(logits: Tensor, following: Tensor) -> float:
    """Return the sum of the negative log-likelihoods of tokens."""
    rows = zip(*(torch.split(one, ROWS_AT_ONCE) for one in (logits, following)), strict=True)
    return sum(F.cross_entropy(x.float(), y, reduction="sum").item() for x, y in rows)


# ---- images and tensors ------------------------------------------------------------------


def arguments(model: nn.Module, batch: Tensor | Batch) -> Batch:
    """Return a batch by the names of a model's arguments, in the format of its weights."""
    named = Reader.of(model).named([batch]) if isinstance(batch, Tensor) else batch
    return to_model(named, model)


def _score_samples(
    models: Sequence[nn.Module],
    data: SampleSet,
    dense: nn.Module | None,
    size: int,
) -> list[SampleQuality]:
    runs = [*models, *(() if dense is None or dense in models else (dense,))]
    if isinstance(data, TensorSet | SampleList):
        every = [together(model, as_inputs(model, data)) for model in runs]
        size = 1 if any(one.alone for one in every) else size
    tallies = [_Tally() for _ in models]
    labels: Tensor | None = None
    done = 0
    with evaluating(*runs), torch.inference_mode():
        for now, batch in rows_and_batches(data, size):
            given = None if data.labels is None else _labels_at(data.labels, now, data)
            found = {model: _outputs(model, batch, data, given, first=not done) for model in runs}
            scores = found[models[0]].scores
            if not done and scores is not None:
                names = (lineage_of(model).classes for model in runs)
                labels = data.class_labels(next(filter(None, names), ()), scores.shape[1])
            for tally, model in zip(tallies, models, strict=True):
                theirs = None if dense is None or dense is model else found[dense]
                known = None if labels is None else _labels_at(labels, now, data)
                tally.add(found[model], theirs, known)
            done += len(now)
    return [tally.quality(done) for tally in tallies]


def _labels_at(labels: Tensor, now: Tensor, data: SampleSet) -> Tensor:
    """Return the labels of samples; those of samples apart end with the last that counts."""
    found = labels[now]
    return found[:, : end_of(found[0])] if data.alone and found.ndim == 2 else found


@dataclass(frozen=True)
class _Outputs:
    """The floating-point outputs of a model by name, in double precision on the CPU.

    `scores`, (predictions, classes), are those of the output `classes_in`; None if there is none.
    """

    model: str
    named: Mapping[str, Tensor]
    classes_in: str | None = None
    scores: Tensor | None = None


def _outputs(
    model: nn.Module, batch: Any, data: SampleSet, labels: Tensor | None, *, first: bool
) -> _Outputs:
    """Run a model on a batch, the `first` one twice, and find the scores of classes."""
    kind, named = type(model).__name__, arguments(model, batch)
    with failures_named(model, named, data.source):
        if first:
            few = slice(None if data.alone else _FEW_SAMPLES)
            check_repeatable(model, {name: one[few] for name, one in named.items()})
        result = call(model, named)
    exact: dict[str, Tensor] = {}
    for name, one in named_outputs(result):
        if one.is_floating_point() or one.is_complex():
            if not bool(torch.isfinite(one).all()):
                raise NonFiniteError(f"{name!r} of {kind} is NaN or infinite; check its weights")
            exact[name] = one.to("cpu", torch.promote_types(one.dtype, torch.float64))
    if not exact:
        raise ModelError(
            f"{kind} returned a {type(result).__name__} without a floating-point tensor; let "
            "its forward return one, or a dictionary or tuple of them"
        )
    sequences = reads_sequences(named.values())
    name, known = known_output(result)
    place = -1
    if labels is not None:
        scores = labelled_scores(outputs_by_name(result), labels.shape, sequences=sequences)
        if scores is not None:
            name, place = scores.output, scores.place
        elif isinstance(data, ImageSet) and not any(one.ndim == 2 for one in exact.values()):
            warn(f"{kind} returns no scores of classes, so that the labels of images are ignored")
            labels = None
        else:
            there = ", ".join(f"{key!r} {tuple(one.shape)}" for key, one in exact.items())
            wanted: list[Any] = [*labels.shape]
            wanted.insert(len(wanted) if sequences else 1, "classes")
            advice = "let the model return these, or score it on samples without labels"
            if any(labels.shape == one.shape for one in exact.values()):
                advice = "if the labels are one-hot, give the classes themselves, labels.argmax(1)"
            raise ModelError(
                f"{kind} returned {there}, and the labels are {tuple(labels.shape)}: scores of "
                f"classes would be {tuple(wanted)}, named {LOGITS!r} where there are other "
                f"outputs; {advice}"
            )
    dimensions = (2, 3) if sequences and name == LOGITS else (2,)
    if labels is None and (known is None or known.ndim not in dimensions or known.shape[-1] < 2):
        return _Outputs(kind, exact)
    return _Outputs(kind, exact, name, exact[name].movedim(place, -1).flatten(0, -2))


class _Tally:
    """What one model comes to, summed over batches."""

    def __init__(self) -> None:
        self.sums: Any = Counter()
        self.apart: Any = Counter()
        self.size: Any = Counter()
        self.classes_in: str | None = None
        self.classes, self.positions = 0, False

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
                lost = F.cross_entropy(as_logits(logits)[known], labels, reduction="sum")
                self.sums.update({"surprise": float(lost)})
            best = logits[known].topk(min(_TOP, self.classes)).indices == labels[:, None]
            first, among = int(best[:, 0].sum()), int(best.any(1).sum())
            self.sums.update(labelled=len(labels), first=first, among=among)
        if dense is not None and dense.scores is not None:
            theirs = dense.scores
            p, q = (as_logits(one).log_softmax(1) for one in (theirs, logits))
            same = int((logits.argmax(1) == theirs.argmax(1)).sum())
            kl = float(summed_divergence(p, q))
            self.sums.update({"compared": len(logits), "agreeing": same, "kl": kl})

    def _compare(self, mine: _Outputs, dense: _Outputs) -> None:
        """Add up how far outputs are apart."""
        shapes, others = ({n: tuple(t.shape) for n, t in o.named.items()} for o in (mine, dense))
        if shapes != others:
            raise ModelError(
                f"the models cannot be compared: {mine.model} returns {shapes}, and the dense one "
                f"{others}"
            )
        for name, known in dense.named.items():
            self.apart[name] += float((mine.named[name] - known).abs().square().sum())
            self.size[name] += float(known.abs().square().sum())

    def _mean(self, what: str, of: str) -> Any:
        return self.sums[what] / self.sums[of] if self.sums[of] else None

    def quality(self, samples: int) -> SampleQuality:
        """Return what it comes to."""
        surprise = self._mean("surprise", "labelled") if self.positions else None
        return SampleQuality(
            samples=samples,
            classes_in=self.classes_in,
            predictions=self.sums["labelled"],
            top1=self._mean("first", "labelled"),
            top5=self._mean("among", "labelled") if self.classes > _TOP else None,
            perplexity=None if surprise is None else math.exp(min(surprise, MOST_EXPONENT)),
            agreement=self._mean("agreeing", "compared"),
            kl=self._mean("kl", "compared"),
            errors={
                name: apart / self.size[name] if self.size[name] else None if apart else 0.0
                for name, apart in self.apart.items()
            },
        )
