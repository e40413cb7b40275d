"""What a model is worth: quality, speed and size, alone or beside its dense original."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osscar.core.errors import ModelError, NonFiniteError, OptionError, TextError
from osscar.core.modules import count_parameters
from osscar.core.progress import track
from osscar.data.text import encode
from osscar.evaluation.size import (
    Footprint,
    count_disk_bytes,
    count_flops,
    count_parameter_bytes,
    read_peak_memory,
    reset_peak_memory,
)
from osscar.evaluation.speed import Speed, measure_speed

DEFAULT_SEQLEN = 512

ROWS_AT_ONCE = 128
"""Positions whose logits are float32 at a time: 25 MB with a vocabulary of 49,152."""


@dataclass(frozen=True)
class Quality:
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
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int


@dataclass(frozen=True)
class Evaluation:
    """Quality, speed and size of one model; ``dataclasses.asdict`` makes it JSON.

    Attributes
    ----------
    quality, speed, footprint
        What was measured.
    device, dtype
        Where and in which number format.
    """

    quality: Quality
    speed: Speed
    footprint: Footprint
    device: str
    dtype: str


@dataclass(frozen=True)
class Ratios:
    """A model's numbers divided by those of the dense one; more speed is above 1."""

    perplexity: float
    prefill_speed: float
    decode_speed: float
    parameters: float
    parameter_bytes: float
    flops_per_token: float
    disk_bytes: float | None


@dataclass(frozen=True)
class Comparison:
    """A model beside its dense original."""

    model: Evaluation
    dense: Evaluation
    ratios: Ratios


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
    batch_size: int = 4,
    new_tokens: int = 32,
    repetitions: int = 5,
    path: Path | None = None,
) -> Evaluation:
    """Measure quality, speed and size of a language model.

    Parameters
    ----------
    model, tokenizer, text, windows, seqlen, batch_size
        As in :func:`measure_quality`.
    new_tokens, repetitions
        As in :func:`osscar.evaluation.speed.measure_speed`; the prompt is the first window.
    path
        The model's directory, whose size is reported.

    Raises
    ------
    TextError, OptionError, ModelError, NonFiniteError
        As in :func:`measure_quality`.
    """
    protocol = _Protocol(windows, seqlen, batch_size, new_tokens, repetitions)
    return _evaluate_all([(model, path)], tokenizer, text, protocol)[0]


def compare(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
    batch_size: int = 4,
    new_tokens: int = 32,
    repetitions: int = 5,
    path: Path | None = None,
    dense_path: Path | None = None,
) -> Comparison:
    """Measure a model and its dense original on the same text, and time them in turns.

    Both are in memory at the time, so on a CPU the peak memory of each includes the other.

    Parameters
    ----------
    model, dense
        Two models with the same tokenizer.
    tokenizer, text, windows, seqlen, batch_size, new_tokens, repetitions
        As in :func:`evaluate`.
    path, dense_path
        Their directories, whose sizes are reported.

    Raises
    ------
    TextError, OptionError, ModelError, NonFiniteError
        As in :func:`measure_quality`.
    """
    protocol = _Protocol(windows, seqlen, batch_size, new_tokens, repetitions)
    pair = [(model, path), (dense, dense_path)]
    mine, theirs = _evaluate_all(pair, tokenizer, text, protocol)
    return Comparison(mine, theirs, _ratios(mine, theirs))


def measure_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
    batch_size: int = 4,
) -> Quality:
    """Measure perplexity over windows of a text that do not overlap.

    The text is tokenized whole, without special tokens, and cut into windows. Each is scored on
    its own: its first token is context only, every other token is scored once. What is left at the
    end is a shorter window, scored too if it has two tokens or more.

    Parameters
    ----------
    model
        A causal language model, in any floating-point format; log-likelihoods are float32.
    tokenizer
        Its tokenizer.
    text
        Text that was neither trained nor calibrated on.
    windows
        Score only so many windows from the start; None scores the text in full.
    seqlen
        Tokens per window; by default 512, or as many as the model can take if those are fewer.
    batch_size
        Windows at a time.

    Raises
    ------
    TextError
        If the text has fewer than two tokens.
    OptionError
        If a number is out of range.
    ModelError
        If the tokenizer has tokens that the model does not know.
    NonFiniteError
        If logits are NaN or infinite; the message says in which window.
    """
    pieces = _windows(model, encode(tokenizer, text), windows, _window_length(model, seqlen))
    return _score(model, pieces, batch_size)


@dataclass(frozen=True)
class _Protocol:
    """How to measure: the options of `evaluate` in one value."""

    windows: int | None
    seqlen: int | None
    batch_size: int
    new_tokens: int
    repetitions: int


def _evaluate_all(
    models: list[tuple[PreTrainedModel, Path | None]],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    protocol: _Protocol,
) -> list[Evaluation]:
    tokens = encode(tokenizer, text)
    length = min(_window_length(model, protocol.seqlen) for model, _ in models)
    measured: list[tuple[Quality, Footprint]] = []
    for model, path in models:
        pieces = _windows(model, tokens, protocol.windows, length)
        reset_peak_memory(model.device)
        quality = _score(model, pieces, protocol.batch_size)
        peak = read_peak_memory(model.device)
        measured.append((quality, _footprint(model, pieces[0], peak, path)))
    speeds = _speeds([model for model, _ in models], tokens[:length], protocol)
    return [
        Evaluation(quality, speed, size, str(model.device), str(model.dtype).split(".")[-1])
        for (model, _), (quality, size), speed in zip(models, measured, speeds, strict=True)
    ]


def _speeds(models: list[PreTrainedModel], prompt: Tensor, protocol: _Protocol) -> list[Speed]:
    with _evaluation_mode(*models):
        return measure_speed(
            models, prompt, new_tokens=protocol.new_tokens, repetitions=protocol.repetitions
        )


def _window_length(model: PreTrainedModel, seqlen: int | None) -> int:
    limit: int = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQLEN
    if seqlen is None:
        return min(limit, DEFAULT_SEQLEN)
    if not 2 <= seqlen <= limit:
        raise OptionError(
            f"a window of {seqlen} tokens does not fit this model; give from 2 to {limit}, which "
            "is its context (--seqlen)"
        )
    return seqlen


def _windows(
    model: PreTrainedModel, tokens: Tensor, windows: int | None, seqlen: int
) -> tuple[Tensor, ...]:
    if windows is not None and windows < 1:
        raise OptionError(f"cannot score {windows} windows; give at least 1 (--windows)")
    if len(tokens) < 2:
        raise TextError(f"the text has {len(tokens)} tokens; scoring needs at least 2")
    known, largest = model.get_input_embeddings().num_embeddings, int(tokens.max())
    if largest >= known:
        raise ModelError(
            f"the tokenizer gives token {largest} but the model knows only {known}; "
            "use the tokenizer that belongs to the model"
        )
    pieces = torch.split(tokens, seqlen)
    return tuple(piece for piece in pieces[:windows] if len(piece) > 1)


def _score(model: PreTrainedModel, pieces: tuple[Tensor, ...], batch_size: int) -> Quality:
    if batch_size < 1:
        raise OptionError(f"the batch size must be at least 1, not {batch_size} (--batch-size)")
    whole = [piece for piece in pieces if len(piece) == len(pieces[0])]
    rest = pieces[len(whole) :]
    batches = [*torch.split(torch.stack(whole), batch_size), *(piece[None] for piece in rest)]
    total, done = 0.0, 0
    with _evaluation_mode(model), torch.inference_mode():
        for batch in track(batches, "Scoring"):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            for window, window_logits in zip(batch, logits, strict=True):
                total += _negative_log_likelihood(window_logits, window, f"window {done}")
                done += 1
    tokens = sum(len(piece) - 1 for piece in pieces)
    return Quality(_exponential(total / tokens), tokens, len(pieces), len(pieces[0]))


def _negative_log_likelihood(logits: Tensor, window: Tensor, place: str) -> float:
    """Sum over the tokens but the first, a few positions at a time in float32."""
    total = 0.0
    for start in range(0, len(window) - 1, ROWS_AT_ONCE):
        targets = window[start + 1 : start + 1 + ROWS_AT_ONCE]
        rows = logits[start : start + len(targets)].float()
        loss = nn.functional.cross_entropy(rows, targets, reduction="sum").item()
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the model's logits are NaN or infinite in {place}, tokens {start} to "
                f"{start + len(targets) - 1}; try dtype float32, else its weights are damaged"
            )
        total += loss
    return total


def _exponential(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        raise NonFiniteError(
            f"the mean negative log-likelihood is {mean:.3g}, so the perplexity overflows; "
            "the model's weights are damaged"
        ) from None


def _footprint(
    model: PreTrainedModel, window: Tensor, peak: int | None, path: Path | None
) -> Footprint:
    with _evaluation_mode(model):
        flops = count_flops(model, window[None].to(model.device))
    return Footprint(
        parameters=count_parameters(model),
        parameter_bytes=count_parameter_bytes(model),
        flops_per_token=flops / len(window),
        peak_memory_bytes=peak,
        disk_bytes=count_disk_bytes(path),
    )


def _ratios(mine: Evaluation, dense: Evaluation) -> Ratios:
    speed, other = mine.speed, dense.speed
    size, original = mine.footprint, dense.footprint
    stored = size.disk_bytes and original.disk_bytes and size.disk_bytes / original.disk_bytes
    return Ratios(
        perplexity=mine.quality.perplexity / dense.quality.perplexity,
        prefill_speed=speed.prefill_tokens_per_second / other.prefill_tokens_per_second,
        decode_speed=speed.decode_tokens_per_second / other.decode_tokens_per_second,
        parameters=size.parameters / original.parameters,
        parameter_bytes=size.parameter_bytes / original.parameter_bytes,
        flops_per_token=size.flops_per_token / original.flops_per_token,
        disk_bytes=stored,
    )


@contextmanager
def _evaluation_mode(*models: PreTrainedModel) -> Iterator[None]:
    """Turn dropout off, and leave the models as they were."""
    before = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)
