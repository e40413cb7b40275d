"""How large models are, and how fast: medians of turns (`osscar.base.timing.interleaved`)."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from timeit import Timer
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graph.tracing.preserve import without_cache
from osscar.base.errors import ModelError
from osscar.base.timing import clock, interleaved
from osscar.network.modules import count_parameters, evaluating, forward, tensors_in
from osscar.network.operations import count_flops
from osscar.offload.on_disk import room_for_pass
from osscar.proof.equivalence import cache_name


@dataclass(frozen=True)
class Footprint:
    """The size of a model: parameters, tied ones counted once, and bytes.

    Operations are those of one token or sample, as `osscar.network.operations.count_flops` counts
    them.  `disk_bytes` are of its safetensors files, None if it has none.
    """

    parameters: int
    parameter_bytes: int
    flops: float
    disk_bytes: int | None


def count_parameter_bytes(model: nn.Module) -> int:
    """Count the bytes of parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def count_disk_bytes(path: str | Path | None) -> int | None:
    """Sum the sizes of the safetensors files in a directory, or give None if there are none."""
    if path is None:
        return None
    files = list(Path(path).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


# ---- speed -------------------------------------------------------------------------------


_REPETITIONS = 5


def _forward_timer(model: nn.Module, batch: Mapping[str, Tensor]) -> Timer:
    return Timer(partial(forward, model, batch), timer=clock)


# ---- one forward pass --------------------------------------------------------------------


def measure_forward(
    models: Sequence[nn.Module], batch: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return size, operations and seconds (median, and quartiles) of models timed in turns."""
    positions = max(map(Tensor.numel, tensors_in(dict(batch))), default=0)
    with torch.no_grad(), evaluating(*models), ExitStack() as stack:
        for model in models:
            stack.enter_context(without_cache(model))
            stack.enter_context(room_for_pass(model, positions))
        flops = [count_flops(model, batch) for model in models]
        timers = [_forward_timer(model, batch) for model in models]
        turns = interleaved(timers, _REPETITIONS, "Timing")
    found = []
    for model, operations, seconds in zip(models, flops, turns, strict=True):
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        found.append(
            {
                "parameters": count_parameters(model),
                "parameter_bytes": count_parameter_bytes(model),
                "flops": operations,
                "seconds": median,
                "seconds_between": [lower, upper],
            }
        )
    return found


@dataclass(frozen=True)
class SampleSpeed:
    """Samples per second of one model, in forward passes over one batch."""

    samples_per_second: float
    batch_size: int
    repetitions: int


def sample_speeds(
    models: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    samples: int,
    repetitions: int,
) -> list[SampleSpeed]:
    """Time each model on its own batch of so many samples."""
    timers = list(map(_forward_timer, models, batches))
    turns = interleaved(timers, repetitions, "Timing")
    medians = map(statistics.median, turns)
    return [SampleSpeed(samples / seconds, samples, repetitions) for seconds in medians]


# ---- reading and writing text ------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model.

    Prefill reads a prompt in one forward pass that fills the key-value cache; decoding writes one
    token at a time with the cache.
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
    """Time models in turns on the same prompt, (tokens,).

    At most half as many new tokens are decoded as the prompt has, which is cut by as many: prompt
    and new tokens together stay within the models' context.
    """
    new_tokens = min(new_tokens, len(prompt) // 2)
    tasks = [_Decoding(model, prompt[None].to(model.device), new_tokens) for model in models]
    prefill = [Timer(partial(task.prefill, task.prompt), timer=clock) for task in tasks]
    decode = [Timer(task.decode, setup=task.prefill_before, timer=clock) for task in tasks]
    with torch.inference_mode():
        read = interleaved(prefill, repetitions, "Timing prefill")
        written = interleaved(decode, repetitions, "Timing decode")
    return [
        Speed(
            prefill_tokens_per_second=len(prompt) / statistics.median(reading),
            decode_tokens_per_second=new_tokens / statistics.median(writing),
            prompt_tokens=len(prompt),
            new_tokens=new_tokens,
            repetitions=len(reading),
        )
        for reading, writing in zip(read, written, strict=True)
    ]


@dataclass
class _Decoding:
    """One model that goes on with a prompt, (1, tokens); `output` is that of its last pass."""

    model: PreTrainedModel
    prompt: Tensor
    new_tokens: int
    output: Any = field(default=None, repr=False)

    def prefill(self, prompt: Tensor) -> Any:
        # like generation, skip the output layer at all positions but the last
        accepted = inspect.signature(self.model.forward).parameters
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        return self.model(input_ids=prompt, use_cache=True, **last_only)

    def prefill_before(self) -> None:
        self.output = self.prefill(self.prompt[:, : -self.new_tokens])

    def decode(self) -> None:
        name = cache_name(self.model)
        for _ in range(self.new_tokens):
            token = self.output.logits[:, -1:].argmax(-1)
            cache = getattr(self.output, name, None)
            if cache is None:
                kind = type(self.model).__name__
                raise ModelError(f"{kind} has no key-value cache to decode with")
            self.output = self.model(input_ids=token, use_cache=True, **{name: cache})
