"""What a request has timed, and where: a pass or one token, by torch or by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from transformers import DynamicCache

from graph import DependencyGraph
from osscar.allocation.clocks import Clock, InTorch, is_channels_last
from osscar.allocation.costs import traced_alike
from osscar.allocation.onnx_clock import InOnnxRuntime
from osscar.allocation.serving import check_served, filled_cache, token_step, token_step_traced
from osscar.allocation.task import PruningTask
from osscar.base.devices import this_device
from osscar.base.errors import RequestError, optional
from osscar.base.printable import pluralize
from osscar.data.batches import Batch
from osscar.network.modules import device_of, forward, number_format
from osscar.request import PruningRequest


def check_timed(model: nn.Module, request: PruningRequest) -> None:
    """Raise a `RequestError` if a model does not do, or is not written as, what is to be timed."""
    check_served(model, request)
    if request.timed_in == "onnxruntime" and number_format(model) != torch.float32:
        raise RequestError(
            f"timed_in is onnxruntime, and the model's weights are {number_format(model)}, in "
            "which ONNX Runtime lacks most operators; give it in float32 (`--dtype float32`, or "
            "model.float() in Python)"
        )


def clock_of(task: PruningTask) -> Clock:
    """Return the clock that a request asks for, before any unit leaves.

    A `RequestError` is raised where the model cannot be traced as it is timed.
    """
    return _CLOCKS[task.request.timed_in, task.request.timed](task)


def _passes(task: PruningTask) -> InTorch:
    model, batch = task.prepared.model, task.prepared.batches()[0]
    return InTorch(
        model,
        _traced(task, batch),
        f"a pass over {_shapes(batch)} in {_dtype(model)} by torch ({_device(device_of(model))})",
        lambda model: partial(forward, model, batch),
        any(is_channels_last(one) for one in batch.values()),
    )


def _tokens(task: PruningTask) -> InTorch:
    model, sample, request = task.prepared.model, task.prepared.sample, task.request
    assert request.context is not None
    before, rows = request.context - 1, model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = torch.arange(request.batch, device=device_of(model))[:, None] % rows
    batch = {"input_ids": tokens}

    def filled(model: nn.Module) -> DynamicCache:
        return filled_cache(model, sample, before, request.batch)

    with token_step_traced(model, filled(model)):
        traced = _traced(task, batch, f"one token after {before}")
    return InTorch(
        model,
        traced,
        f"one token of {pluralize(request.batch, 'sequence')} with {request.context:,} positions "
        f"in the key/value cache, in {_dtype(model)} by torch ({_device(device_of(model))})",
        lambda model: token_step(model, filled(model), batch),
    )


def _passes_in_onnx_runtime(task: PruningTask) -> InOnnxRuntime:
    model, batch = task.prepared.model, task.prepared.batches()[0]
    version = optional("onnxruntime", "onnx", "ONNX Runtime").__version__
    return InOnnxRuntime(
        model,
        _traced(task, batch),
        f"a pass over {_shapes(batch)} in {_dtype(model)} by ONNX Runtime {version} "
        f"({_device(torch.device('cpu'))})",
        batch,
        torch.get_num_threads(),
    )


_CLOCKS: Mapping[tuple[str, str], Callable[[PruningTask], Clock]] = {
    ("torch", "prefill"): _passes,
    ("torch", "decode"): _tokens,
    ("onnxruntime", "prefill"): _passes_in_onnx_runtime,
}
"""By the fields `timed_in` and `timed`."""


def _traced(task: PruningTask, batch: Batch, what: str = "a pass") -> DependencyGraph:
    refused, advice = "operators cannot be timed", f"give {task.request.instead_of_time('flops')}"
    return traced_alike(task.prepared, task.counted, batch, refused, advice, what)


# ---- in words ----------------------------------------------------------------------------


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in batch.items())


def _dtype(model: nn.Module) -> str:
    return str(number_format(model)).removeprefix("torch.")


def _device(device: torch.device) -> str:
    here = this_device(device)
    threads = here["threads"] and f", {pluralize(int(here['threads']), 'thread')}"
    return f"{here['device']}{threads}"
