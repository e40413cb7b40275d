"""What a language model is worth: perplexity, speed and size, alone or beside the dense one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osscar.base.errors import ModelError, NonFiniteError, OptionError, TextError
from osscar.base.inputs import shown, whole_number
from osscar.base.printable import counted
from osscar.base.progress import track
from osscar.checkpoint.first_pass import check_causal
from osscar.data.text import encode, special_tokens
from osscar.evaluation.result import Comparison, Evaluation
from osscar.evaluation.size import (
    Footprint,
    measure_footprint,
    read_peak_memory,
    reset_peak_memory,
)
from osscar.evaluation.speed import Speed, measure_speed
from osscar.network.modules import check_usable, context_length, evaluating
from osscar.network.predictions import named_logits
from osscar.offload.on_disk import room_for_pass
from osscar.preparation.repeatable import check_repeatable

DEFAULT_SEQLEN = 512

_FEW = 32
"""Tokens that tell whether two passes are alike."""

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
    special_tokens
        How many of them, at the beginning of each, the tokenizer puts before a text.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    special_tokens: int = 0


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
    path: str | Path | None = None,
) -> Evaluation[Quality, Speed]:
    """Measure quality, speed and size of a language model.

    Parameters
    ----------
    model
        A causal language model, in any floating-point format.
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
    new_tokens
        Tokens to write when speed is measured; the prompt is the first window, and at most half of
        its length is written.
    repetitions
        Times that the model reads and writes, at the least.
    path
        The model's directory, whose size is reported.

    Raises
    ------
    TextError
        If the text has fewer than two tokens.
    OptionError
        If a number is out of range.
    ModelError
        If the model is none of language, reads ahead, has no key-value cache, two of its passes
        over the same tokens differ, or its tokenizer has tokens that it does not know.
    NonFiniteError
        If logits are NaN or infinite; the message says in which window.
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
    path: str | Path | None = None,
    dense_path: str | Path | None = None,
) -> Comparison[Quality, Speed]:
    """Measure a model and its dense original on the same text, and time them in turns.

    Both are in memory at the time, so on a CPU the peak memory of each includes the other.

    Parameters
    ----------
    model, dense
        Two causal language models with the same tokenizer.
    tokenizer
        That tokenizer.
    text
        Text that neither trained nor calibrated either of them.
    windows
        Score only so many windows from the start; None scores the text in full.
    seqlen
        Tokens per window; by default 512, or as many as both can take if those are fewer.
    batch_size
        Windows at a time.
    new_tokens
        Tokens to write when speed is measured, after a prompt that is part of the first window.
    repetitions
        Times that each reads and writes, at the least.
    path, dense_path
        Their directories, whose sizes are reported.

    Raises
    ------
    TextError
        If the text has fewer than two tokens.
    OptionError
        If a number is out of range.
    ModelError
        If a model is none of language, reads ahead, has no key-value cache, two of its passes over
        the same tokens differ, or the tokenizer has tokens that it does not know.
    NonFiniteError
        If logits are NaN or infinite; the message says in which window.
    """
    protocol = _Protocol(windows, seqlen, batch_size, new_tokens, repetitions)
    pair = [(model, path), (dense, dense_path)]
    mine, theirs = _evaluate_all(pair, tokenizer, text, protocol)
    return Comparison.of(mine, theirs)


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

    The text is tokenized whole and cut into windows, each of which begins with the special tokens
    that the tokenizer puts before a text, if it does. Each is scored on its own: these, or else its
    first token, are context only, every other token is scored once. What is left at the end is a
    shorter window, scored too if it has a token to score.

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
        If the tokenizer has tokens that the model does not know, two passes of the model over the
        same tokens differ, it reads ahead, or it returns no logits.
    NonFiniteError
        If logits are NaN or infinite; the message says in which window.
    """
    _check(model, tokenizer)
    protocol = _Protocol(windows, seqlen, batch_size)
    cut = _windows(model, _Scored.of(tokenizer, text), windows, _window_length(model, seqlen))
    return _score(model, cut, protocol)


def score_windows(
    model: PreTrainedModel, windows: Sequence[Tensor], *, batch_size: int = 4
) -> Quality:
    """Measure perplexity over windows of tokens as they are, each on its own.

    Parameters
    ----------
    model
        A causal language model, which knows all of the tokens.
    windows
        Tokens of each, (seqlen,) int64, at least two; only the last ones may be shorter.
    batch_size
        Windows at a time.

    Raises
    ------
    OptionError
        If the batch size is not positive.
    NonFiniteError
        If logits are NaN or infinite; the message says in which window.
    """
    return _score(model, _Windows(tuple(windows), 0), _Protocol(None, None, batch_size))


@dataclass(frozen=True)
class _Protocol:
    """How to measure: the options of `evaluate` in one value."""

    windows: int | None
    seqlen: int | None
    batch_size: int
    new_tokens: int = 32
    repetitions: int = 5

    def __post_init__(self) -> None:
        whole_number(self.batch_size, "the batch size (--batch-size)", 1)
        if self.windows is not None:
            whole_number(self.windows, "the number of windows to score (--windows)", 1)
        whole_number(self.new_tokens, "the number of new tokens", 1)
        whole_number(self.repetitions, "the number of repetitions", 1)


@dataclass(frozen=True)
class _Scored:
    """A text in tokens, and what each window of it begins with."""

    tokens: Tensor
    before: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> _Scored:
        return cls(encode(tokenizer, text), special_tokens(tokenizer)[0])


@dataclass(frozen=True)
class _Windows:
    """Windows of a text, the first tokens of which are context only."""

    pieces: tuple[Tensor, ...]
    special_tokens: int

    @property
    def context(self) -> int:
        return max(1, self.special_tokens)


def _check(model: Any, tokenizer: Any) -> None:
    check_usable(model)
    if not isinstance(model, PreTrainedModel) or model.get_input_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} is no language model of transformers; images are what "
            "osscar.evaluate_images scores a model on"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"the tokenizer is a {type(tokenizer).__name__}; give that of transformers which "
            "belongs to the model"
        )


def _evaluate_all(
    models: list[tuple[PreTrainedModel, str | Path | None]],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    protocol: _Protocol,
) -> list[Evaluation[Quality, Speed]]:
    for model, _ in models:
        _check(model, tokenizer)
    scored = _Scored.of(tokenizer, text)
    length = min(_window_length(model, protocol.seqlen) for model, _ in models)
    with ExitStack() as stack:
        for model, _ in models:
            stack.enter_context(evaluating(model))
        measured = [_measure(model, path, scored, length, protocol) for model, path in models]
        speeds = measure_speed(
            [model for model, _ in models],
            torch.cat([scored.before, scored.tokens])[:length],
            new_tokens=protocol.new_tokens,
            repetitions=protocol.repetitions,
        )
    return [
        Evaluation(
            "token", quality, speed, size, str(model.device), str(model.dtype).split(".")[-1]
        )
        for (model, _), (quality, size), speed in zip(models, measured, speeds, strict=True)
    ]


def _measure(
    model: PreTrainedModel,
    path: str | Path | None,
    scored: _Scored,
    length: int,
    protocol: _Protocol,
) -> tuple[Quality, Footprint]:
    windows = _windows(model, scored, protocol.windows, length)
    reset_peak_memory(model.device)
    quality = _score(model, windows, protocol)
    peak = read_peak_memory(model.device)
    first = windows.pieces[0]
    inputs = {"input_ids": first[None].to(model.device)}
    return quality, measure_footprint(model, inputs, len(first), peak, path)


def _window_length(model: PreTrainedModel, seqlen: int | None) -> int:
    limit = context_length(model) or DEFAULT_SEQLEN
    if seqlen is None:
        return min(limit, DEFAULT_SEQLEN)
    if not isinstance(seqlen, int) or not 2 <= seqlen <= limit:
        raise OptionError(
            f"a window of {shown(seqlen)} tokens does not fit this model; give from 2 to {limit}, "
            "which is its context (--seqlen)"
        )
    return seqlen


def _windows(model: PreTrainedModel, scored: _Scored, windows: int | None, seqlen: int) -> _Windows:
    tokens, before = scored.tokens, scored.before
    if len(tokens) < 2:
        raise TextError(f"the text has {counted(len(tokens), 'token')}; scoring needs at least 2")
    if seqlen <= len(before):
        raise OptionError(
            f"a window of {seqlen} tokens has room for none of the text, since the tokenizer puts "
            f"{len(before)} before it; give longer ones (--seqlen)"
        )
    known, largest = model.get_input_embeddings().num_embeddings, int(tokens.max())
    if largest >= known:
        raise ModelError(
            f"the tokenizer gives token {largest} but the model knows only {known}; "
            "use the tokenizer that belongs to the model"
        )
    pieces = [torch.cat([before, cut]) for cut in torch.split(tokens, seqlen - len(before))]
    found = tuple(piece for piece in pieces[:windows] if len(piece) > 1)
    return _Windows(found, len(before))


def _score(model: PreTrainedModel, windows: _Windows, protocol: _Protocol) -> Quality:
    pieces, context = windows.pieces, windows.context
    whole = [piece for piece in pieces if len(piece) == len(pieces[0])]
    rest = pieces[len(whole) :]
    batches = [
        *torch.split(torch.stack(whole), protocol.batch_size),
        *(piece[None] for piece in rest),
    ]
    total, done = 0.0, 0
    few = {"input_ids": pieces[0][None, :_FEW].to(model.device)}
    with evaluating(model), torch.inference_mode():
        check_repeatable(model, few)
        check_causal(model, "the model")
        for batch in track(batches, "Scoring"):
            batch = batch.to(model.device)
            with room_for_pass(model, batch.numel()):
                logits = named_logits(model(input_ids=batch, use_cache=False))
                if logits is None:
                    raise ModelError(
                        f"{type(model).__name__} returns no logits; give a model that predicts the "
                        "next token"
                    )
                for window, window_logits in zip(batch, logits, strict=True):
                    place = f"window {done}"
                    total += _negative_log_likelihood(window_logits, window, context, place)
                    done += 1
    tokens = sum(len(piece) - context for piece in pieces)
    mean = _exponential(total / tokens)
    return Quality(mean, tokens, len(pieces), len(pieces[0]), windows.special_tokens)


def _negative_log_likelihood(logits: Tensor, window: Tensor, context: int, place: str) -> float:
    """Sum over the tokens but the first ones, a few positions at a time in float32."""
    total = 0.0
    for start in range(context - 1, len(window) - 1, ROWS_AT_ONCE):
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
