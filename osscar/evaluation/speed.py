"""How fast language models are, timed side by side (`osscar.base.timing`).

Medians are over the repetitions for prefill, over every single token for decoding.
"""

from __future__ import annotations

import inspect
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from osscar.base.devices import clock_of
from osscar.base.errors import ModelError, OptionError
from osscar.base.timing import Clock, interleaved, seconds_of

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the key-value cache, newest name first."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model.

    Prefill reads a prompt in one forward pass that fills the key-value cache; decoding writes one
    token at a time with the cache, for each sequence.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    repetitions: int


def measure_speed(
    models: Sequence[PreTrainedModel],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    repetitions: int = 5,
) -> list[Speed]:
    """Time models on the same prompt, (tokens,), interleaved, after a warm-up of each.

    At most half as many new tokens are decoded as the prompt has, which is cut by as many: prompt
    and new tokens together stay within the models' context.
    """
    if len(prompt) < 2 or new_tokens < 1 or repetitions < 1:
        raise OptionError(
            f"timing needs a prompt of at least 2 tokens, 1 new token and 1 repetition, not "
            f"{len(prompt)}, {new_tokens} and {repetitions}"
        )
    new_tokens = min(new_tokens, len(prompt) // 2)
    runs = [_Run(model, prompt[None].to(model.device), new_tokens) for model in models]
    prefill = interleaved([run.time_prefill for run in runs], repetitions, "Timing prefill")
    decode = interleaved([run.time_decode for run in runs], repetitions, "Timing decode")
    return [
        Speed(
            prefill_tokens_per_second=len(prompt) / statistics.median(read),
            decode_tokens_per_second=1 / statistics.median(written),
            prompt_tokens=len(prompt),
            new_tokens=new_tokens,
            repetitions=len(read),
        )
        for read, written in zip(prefill, decode, strict=True)
    ]


@dataclass(frozen=True)
class _Run:
    """One model at its task."""

    model: PreTrainedModel
    prompt: Tensor
    new_tokens: int

    @torch.inference_mode()
    def time_prefill(self) -> list[float]:
        return seconds_of(partial(self._read, self.prompt), self._clock)()

    @torch.inference_mode()
    def time_decode(self) -> list[float]:
        output = self._read(self.prompt[:, : self.prompt.shape[1] - self.new_tokens])
        ends = [self._clock()]
        for _ in range(self.new_tokens):
            output = self._write(output)
            ends.append(self._clock())
        return [end - began for began, end in itertools.pairwise(ends)]

    @property
    def _clock(self) -> Clock:
        return clock_of(self.prompt.device)

    def _read(self, prompt: Tensor) -> Any:
        # like generation, skip the output layer at all positions but the last
        accepted = inspect.signature(self.model.forward).parameters
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        return self.model(input_ids=prompt, use_cache=True, **last_only)

    def _write(self, output: Any) -> Any:
        token = output.logits[:, -1:].argmax(-1)
        for name in CACHE_NAMES:
            if getattr(output, name, None) is not None:
                cache = {name: getattr(output, name)}
                return self.model(input_ids=token, use_cache=True, **cache)
        raise ModelError(f"{type(self.model).__name__} has no key-value cache to decode with")
