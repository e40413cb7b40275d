"""Calibration text that a language model writes itself, for where there is no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from osscar.base.errors import DataError, ModelError
from osscar.base.files import digest
from osscar.base.printable import pluralize
from osscar.base.progress import stage
from osscar.data.text import as_words, special_tokens
from osscar.data.tokens import CalibrationSet, check_windows
from osscar.network.modules import device_of
from osscar.offload.on_disk import is_on_disk

_AT_ONCE = 32
"""Windows that are written side by side."""


def self_written(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 32,
    seqlen: int = 512,
    seed: int = 0,
) -> CalibrationSet:
    """Draw windows of tokens from what a language model predicts, one token after the other.

    Each begins with the special tokens that the tokenizer puts before a text, or with the one that
    begins or ends texts where it puts none, and goes on after the end of a text with the next.
    Nothing sharpens the predictions: the temperature is 1.

    Raises
    ------
    ModelError
        If the model writes no text by itself, or its weights stay on disk.
    DataError
        If nothing tells how a text begins, a window has no room for one, or a number is out of
        range.
    OptionError
        If something is of a wrong type.
    """
    check_windows(tokenizer, samples, seqlen, seed)
    _check_writes(model)
    first, after = _first_tokens(tokenizer), special_tokens(tokenizer)[1]
    drawn = seqlen - len(first) - len(after)
    if drawn < 1:
        raise DataError(
            f"a window of {pluralize(seqlen, 'token')} has room for none that the model writes, "
            f"beside {len(first) + len(after)} special ones; give longer ones (--seqlen)"
        )
    parts: list[Tensor] = []
    with (
        torch.random.fork_rng(),
        _drawing(model, drawn),
        stage("writing text", total=samples) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, samples, _AT_ONCE):
            some = min(_AT_ONCE, samples - start)
            begun = first.to(device_of(model)).expand(some, -1)
            parts.append(_written(model, begun).cpu())
            for _ in range(some):
                bar.advance()
    tokens = torch.cat([torch.cat(parts), after.expand(samples, -1)], dim=1)
    text = "".join(tokenizer.batch_decode(tokens))
    ends = as_words(tokenizer, first), as_words(tokenizer, after)
    return CalibrationSet(tokens, "text that the model wrote", seed, digest(text), *ends)


@torch.no_grad()
def _written(model: Any, begun: Tensor) -> Tensor:
    found: Tensor = model.generate(begun, attention_mask=torch.ones_like(begun))
    return found


@contextmanager
def _drawing(model: Any, tokens: int) -> Iterator[None]:
    """Have a model draw so many tokens from its plain predictions.

    Its own settings, which fill in what the caller leaves open, would sharpen and end them.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0
    )
    try:
        yield
    finally:
        model.generation_config = own


def _check_writes(model: Any) -> None:
    can_generate = getattr(model, "can_generate", None)
    writes = can_generate is not None and can_generate()
    if not writes or model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} writes no text by itself, one token after the other; give "
            "--calibration a text"
        )
    if is_on_disk(model):
        raise ModelError(
            "the weights stay on disk, and would be read once for each token that the model "
            "writes; give --calibration a text, such as one that it wrote elsewhere"
        )


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    before, _ = special_tokens(tokenizer)
    if len(before):
        return before
    known = [one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None]
    if not known:
        raise DataError(
            "the tokenizer names no token that begins or ends a text, from which a model could "
            "begin to write; give --calibration a text"
        )
    return torch.tensor(known[:1], dtype=torch.int64)
