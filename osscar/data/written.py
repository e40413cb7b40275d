"""Calibration text that a language model writes itself, for where there is no other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from osscar.base.errors import DataError, ModelError, NonFiniteError, OsscarError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.base.printable import pluralize
from osscar.base.progress import stage
from osscar.data.samples import named_generator
from osscar.data.text import as_words, special_tokens
from osscar.data.tokens import CalibrationSet, check_windows
from osscar.network.modules import context_length, device_of, evaluating, graphics_cards
from osscar.offload.on_disk import is_on_disk

_AT_ONCE = 16
"""Windows that are written side by side."""

_REMEDY = "give --calibration a text"


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
    Nothing sharpens the predictions: the temperature is 1.  Tokens that the tokenizer does not have
    are not drawn.

    Raises
    ------
    ModelError
        If the model writes no text by itself, its code fails, or its weights stay on disk.
    NonFiniteError
        If its predictions are not finite.
    DataError
        If nothing tells how a text begins, a window has no room for one or is longer than the model
        takes, or a number is out of range.
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
    context = context_length(model)
    if context is not None and seqlen > context:
        raise DataError(
            f"calibration windows have {seqlen} tokens and the model takes {context}; give a "
            "smaller window length (--seqlen)"
        )
    parts: list[Tensor] = []
    with (
        torch.random.fork_rng(graphics_cards(model)),
        evaluating(model),
        stage("writing text", total=samples) as bar,
    ):
        torch.manual_seed(named_generator("text that the model writes", seed).initial_seed())
        for start in range(0, samples, _AT_ONCE):
            begun = first.expand(min(_AT_ONCE, samples - start), -1).to(device_of(model))
            parts.append(_written(model, begun, drawn, len(tokenizer)).cpu())
            bar.advance(len(begun))
    tokens = torch.cat([torch.cat(parts), after.expand(samples, -1)], dim=1)
    ends = as_words(tokenizer, first), as_words(tokenizer, after)
    return CalibrationSet(tokens, "text that the model wrote", seed, None, *ends)


@torch.no_grad()
def _written(model: Any, begun: Tensor, tokens: int, known: int) -> Tensor:
    """Return windows that go on for so many tokens, of those that the tokenizer has."""
    own = model.generation_config
    # The model's own settings fill in what is left open, and would sharpen the text and end it.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens
    )
    try:
        found: Tensor = model.generate(
            begun,
            attention_mask=torch.ones_like(begun),
            logits_processor=LogitsProcessorList([_Known(known)]),
        )
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        raise ModelError(
            f"{type(model).__name__} fails to write text: {type(error).__name__}: "
            f"{first_line(error)}; {_REMEDY}"
        ) from error
    finally:
        model.generation_config = own
    due = (len(begun), begun.shape[1] + tokens)
    if found.shape != due:
        raise ModelError(
            f"{type(model).__name__} was asked for windows of {due} tokens and wrote "
            f"{tuple(found.shape)}; {_REMEDY}"
        )
    return found


class _Known:
    """Leaves out what the tokenizer does not have; refuses predictions that are not finite."""

    def __init__(self, known: int) -> None:
        self._known = known

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool((scores.isnan() | (scores == torch.inf)).any()):
            raise NonFiniteError(
                f"the model's logits after {pluralize(input_ids.shape[1], 'token')} of text that "
                "it wrote have NaN or infinite entries",
                "check its weights, or use --dtype float32",
            )
        scores[:, self._known :] = -torch.inf
        return scores


def _check_writes(model: Any) -> None:
    can_generate = getattr(model, "can_generate", None)
    writes = can_generate is not None and can_generate()
    if not writes or model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} writes no text by itself, one token after the other; {_REMEDY}"
        )
    if is_on_disk(model):
        raise ModelError(
            "the weights stay on disk (--max-memory), and would be read once for each token that "
            f"the model writes; {_REMEDY}, such as one that it wrote elsewhere"
        )


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    before, _ = special_tokens(tokenizer)
    if len(before):
        return before
    known = [one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None]
    if not known:
        raise DataError(
            "the tokenizer names no token that begins or ends a text, from which a model could "
            f"begin to write; {_REMEDY}"
        )
    return torch.tensor(known[:1], dtype=torch.int64)
