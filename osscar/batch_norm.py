"""Batch-norm statistics, estimated again where pruning has changed what layers put out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from osscar.errors import CalibrationError, NonFiniteError


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> int:
    """Replace running means and variances by their averages over some data.

    In one pass: each layer normalizes a batch by the batch's own statistics, as in training, and
    averages them over the batches with equal weights.  No weight changes.

    Parameters
    ----------
    model
        A model in evaluation mode.
    batches
        Keyword arguments of the model.  A last batch of less than half the size of the first is
        left out, as its statistics would count as much as the others'.

    Returns
    -------
    int
        How many layers have new statistics; one that is never called keeps its own.

    Raises
    ------
    NonFiniteError
        If a statistic is not finite; the model keeps its old ones.
    CalibrationError
        If a layer sees a single value a channel, which has no variance.
    """
    layers = batch_norms(model)
    if not layers:
        return 0
    before = {name: _statistics(layer) for name, layer in layers.items()}
    momenta = {name: layer.momentum for name, layer in layers.items()}
    done = False
    try:
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
            layer.train()
        for batch in _even(batches):
            _run(model, batch)
        for name, layer in layers.items():
            _check_finite(name, layer)
        done = True
    finally:
        seen = [name for name, layer in layers.items() if done and layer.num_batches_tracked]
        for name, layer in layers.items():
            layer.momentum = momenta[name]
            layer.eval()
            if name not in seen:
                for tensor, old in zip(_statistics(layer, copy=False), before[name], strict=True):
                    tensor.copy_(old)
    return len(seen)


def _run(model: nn.Module, batch: Mapping[str, Any]) -> None:
    try:
        model(**batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise CalibrationError(
            "batch-norm statistics need more than one value a channel: give more samples, or leave "
            "the statistics as they were (--no-batch-norm)"
        ) from error


def _even(batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    size = 0
    for batch in batches:
        rows = max((len(t) for t in batch.values() if isinstance(t, Tensor) and t.ndim), default=0)
        size = size or rows
        if 2 * rows >= size:
            yield batch


def _statistics(layer: _BatchNorm, copy: bool = True) -> list[Tensor]:
    stored = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    tensors = [tensor for tensor in stored if tensor is not None]
    return [tensor.clone() for tensor in tensors] if copy else tensors


def _check_finite(name: str, layer: _BatchNorm) -> None:
    for tensor in _statistics(layer, copy=False):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the batch-norm statistics of {name!r} are not finite on the calibration data; "
                "use --dtype float32, or leave them as they were (--no-batch-norm)"
            )
