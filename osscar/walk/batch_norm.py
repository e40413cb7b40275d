"""Batch-norm statistics after pruning, which has changed what the layers before them put out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from osscar.base.errors import NonFiniteError
from osscar.base.ranks import ALONE, Ranks
from osscar.consumers.observe import reads
from osscar.network.modules import forward
from osscar.preparation.failures import failures_named
from osscar.proof.plan import PruningPlan

_Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and variance of each channel, (channels,) float64."""

BatchNormMode: TypeAlias = Literal["correct", "keep"]
"""Where statistics come from afterwards: the dense model's, moved by as much as those on the
calibration data have moved; or the dense model's as they are."""

DenseStatistics: TypeAlias = Sequence[Mapping[str, Sequence[_Statistics]]]
"""For each batch and each layer by name, the statistics of what the layer was called with."""

_Seen: TypeAlias = tuple[int, int, _Statistics]
"""The statistics of one call of a layer: in which batch, and over how many values."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }


@torch.no_grad()
def dense_statistics(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    mode: BatchNormMode,
    ranks: Ranks = ALONE,
) -> DenseStatistics:
    """Measure what the batch-norm layers of a model that is still dense are called with.

    Nothing is run where the mode needs none of it.  Of the batches, keyword arguments of the model,
    only those of this rank are run.
    """
    layers = batch_norms(model)
    if mode == "keep" or not layers:
        return ()
    found = []
    for index in _shared_out(batches, ranks):
        seen: dict[str, list[_Statistics]] = {name: [] for name in layers}

        def see(name: str, x: Tensor, seen: dict[str, list[_Statistics]] = seen) -> None:
            seen[name].append(_measured(x))

        with failures_named(model, index), reads(model, seen, see):
            forward(model, batches[index])
        found.append(seen)
    return found


def _shared_out(batches: Sequence[Mapping[str, Any]], ranks: Ranks) -> list[int]:
    """Return which batches are this rank's."""
    return ranks.share([len(next(iter(batch.values()))) for batch in batches])


@torch.no_grad()
def renew_statistics(
    model: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Any]],
    mode: BatchNormMode,
    dense: DenseStatistics = (),
    ranks: Ranks = ALONE,
) -> int:
    """Renew the running statistics of a pruned model; return how many layers have new ones.

    A layer's statistics on a batch are taken when those of all layers before it are renewed for
    that batch; the averages over all batches stay, the same on all ranks.  They are compared with
    the dense model's on the same batch, ``mean + (m - m_dense)`` and
    ``var * (v + eps) / (v_dense + eps)``, so that neither the choice of the data nor their kind
    matters, only what pruning did to them.  A layer that is never called keeps its own.

    Raises
    ------
    NonFiniteError
        If a statistic is not finite; the model keeps its old ones.
    """
    layers = batch_norms(model)
    if mode == "keep" or not layers:
        return 0
    before = {name: _stored(layer) for name, layer in layers.items()}
    seen: dict[str, list[_Seen]] = {name: [] for name in layers}
    original = {name: _kept_statistics(name, dense, plan) for name in layers}

    def renew(name: str, x: Tensor) -> None:
        layer, (mean, var) = layers[name], _measured(x)
        (old_mean, old_var), (dense_mean, dense_var) = before[name], next(original[name])
        mean = old_mean + mean - dense_mean
        var = old_var * (var + layer.eps) / (dense_var + layer.eps)
        _set(layer, (mean, var))
        seen[name].append((index, x.numel() // x.shape[1], (mean, var)))

    averages: dict[str, _Statistics] = {}
    try:
        with reads(model, layers, renew):
            for index in _shared_out(batches, ranks):
                forward(model, batches[index])
        found = {name: _average(some) for name, some in _of_all(seen, ranks).items() if some}
        for name, average in found.items():
            _check_finite(name, average)
        averages = found
    finally:
        for name, layer in layers.items():
            _set(layer, averages.get(name, before[name]))
    return len(averages)


def _kept_statistics(name: str, dense: DenseStatistics, plan: PruningPlan) -> Iterator[_Statistics]:
    """Yield the dense statistics of a layer, call by call, of those channels that are left."""
    gone = {
        index
        for group in plan.groups
        for slot in group.slots
        if slot.tensor == f"{name}.running_mean"
        for index in slot.indices(set(range(group.units)) - set(group.kept))
    }
    for batch in dense:
        for mean, var in batch.get(name, ()):
            stay = torch.tensor([i for i in range(len(mean)) if i not in gone], device=mean.device)
            yield mean[stay], var[stay]


def _measured(x: Tensor) -> _Statistics:
    """Return mean and variance over all dimensions but the second."""
    around = [dim for dim in range(x.ndim) if dim != 1]
    var, mean = torch.var_mean(x.double(), around, correction=0)
    return mean, var


def _of_all(seen: Mapping[str, list[_Seen]], ranks: Ranks) -> Mapping[str, list[_Seen]]:
    """Return what all ranks have seen, by layer, in the order in which one process would see it."""
    if ranks.alone:
        return seen
    mine = {
        name: [(batch, count, (mean.cpu(), var.cpu())) for batch, count, (mean, var) in some]
        for name, some in seen.items()
    }
    everyone = ranks.all_gather("batch-norm statistics", mine)
    return {
        name: sorted((one for told in everyone for one in told[name]), key=lambda one: one[0])
        for name in seen
    }


def _average(seen: Sequence[_Seen]) -> _Statistics:
    """Weight batches by their number of values."""
    counts = torch.tensor([count for _, count, _ in seen], dtype=torch.float64)
    means = torch.stack([mean for *_, (mean, _) in seen])
    variances = torch.stack([var for *_, (_, var) in seen])
    shares = (counts / counts.sum()).to(means.device)
    return shares @ means, shares @ variances


def _stored(layer: _BatchNorm) -> _Statistics:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.double(), layer.running_var.double()


def _set(layer: _BatchNorm, statistics: _Statistics) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(statistics[0])
    layer.running_var.copy_(statistics[1])


def _check_finite(name: str, statistics: _Statistics) -> None:
    for tensor in statistics:
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the batch-norm statistics of {name!r} are not finite on the calibration data; "
                "use --dtype float32, or leave them as they were (--batch-norm keep)"
            )
