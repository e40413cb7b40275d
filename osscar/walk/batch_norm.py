"""Batch-norm statistics after pruning, which has changed what the layers before them put out."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from osscar.base.errors import CalibrationError, NonFiniteError
from osscar.base.ranks import ALONE, Ranks
from osscar.network.modules import fresh
from osscar.preparation.failures import batch_named
from osscar.preparation.routing import reads
from osscar.shrinking.plan import PruningPlan

Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and variance of each channel, (channels,) float64."""


class BatchNormMode(enum.StrEnum):
    """Where a pruned model's batch-norm statistics come from."""

    CORRECT = "correct"
    """The dense model's, moved by as much as those on the calibration data have moved."""
    ESTIMATE = "estimate"
    """The calibration data alone."""
    KEEP = "keep"
    """The dense model's."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }


@dataclass(frozen=True, eq=False)
class _Part:
    """The statistics of one call of a layer: in which batch, and over how many values."""

    batch: int
    count: int
    statistics: Statistics


DenseStatistics: TypeAlias = Sequence[Mapping[str, Sequence[Statistics]]]
"""For each batch and each layer by name, the statistics of what the layer was called with."""


@torch.no_grad()
def dense_statistics(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    mode: BatchNormMode | str,
    ranks: Ranks = ALONE,
) -> DenseStatistics:
    """Measure what the batch-norm layers of a model that is still dense are called with.

    Parameters
    ----------
    model
        The model before pruning, in evaluation mode; not changed.
    batches
        Keyword arguments of it.
    mode
        Only `BatchNormMode.CORRECT` needs them; for any other mode nothing is run.
    ranks
        Among which the batches are shared out; only this one's are run.
    """
    if mode != BatchNormMode.CORRECT or not batch_norms(model):
        return ()
    found = []
    for index in _shared_out(batches, ranks):
        with batch_named(model, index):
            found.append(_seen(model, batches[index]))
    return found


def _shared_out(batches: Sequence[Mapping[str, Any]], ranks: Ranks) -> list[int]:
    """Return which batches are this rank's."""
    return ranks.share([len(next(iter(batch.values()))) for batch in batches])


def _seen(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Sequence[Statistics]]:
    """Run one batch, and return the statistics of each batch-norm layer's inputs."""
    seen: dict[str, list[Statistics]] = {name: [] for name in batch_norms(model)}
    with reads(model, seen, lambda name, x: seen[name].append(_measured(x))):
        model(**fresh(batch))
    return seen


@torch.no_grad()
def renew_statistics(
    model: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Any]],
    mode: BatchNormMode | str,
    dense: DenseStatistics = (),
    ranks: Ranks = ALONE,
) -> int:
    """Renew the running statistics of a pruned model.

    A layer's statistics on a batch are taken when those of all layers before it are renewed for
    that batch; the averages over all batches stay.  `ESTIMATE` takes them as they are: what
    training would store after one pass.  `CORRECT` compares them with the dense model's on the same
    batch, ``mean + (m - m_dense)`` and ``var * (v + eps) / (v_dense + eps)``, so that neither the
    choice of the data nor their kind matters, only what pruning did to them.

    Parameters
    ----------
    model
        The pruned model, in evaluation mode; its weights do not change.
    plan
        What was removed from it.
    batches
        Keyword arguments of it.
    mode
        Where statistics come from.
    dense
        What `dense_statistics` measured on the same batches.
    ranks
        Among which the batches are shared out; all come to the same statistics.

    Returns
    -------
    int
        How many layers have new statistics; one that is never called keeps its own.

    Raises
    ------
    NonFiniteError
        If a statistic is not finite.
    CalibrationError
        If a variance is to be estimated from one value a channel.
        In either case the model keeps its old statistics.
    """
    layers = batch_norms(model)
    if mode == BatchNormMode.KEEP or not layers:
        return 0
    before = {name: _stored(layer) for name, layer in layers.items()}
    parts: dict[str, list[_Part]] = {name: [] for name in layers}
    original = {name: _kept_statistics(name, dense, plan) for name in layers}

    def renew(name: str, x: Tensor) -> None:
        layer, count = layers[name], x.numel() // x.shape[1]
        mean, var = _measured(x)
        if mode == BatchNormMode.ESTIMATE:
            _set(layer, (mean, var))
            var = var * (count / _several(name, count))
        else:
            (old_mean, old_var), (dense_mean, dense_var) = before[name], next(original[name])
            mean = old_mean + mean - dense_mean
            var = old_var * (var + layer.eps) / (dense_var + layer.eps)
            _set(layer, (mean, var))
        parts[name].append(_Part(index, count, (mean, var)))

    averages: dict[str, Statistics] = {}
    try:
        with reads(model, layers, renew):
            for index in _shared_out(batches, ranks):
                model(**fresh(batches[index]))
        parts = _of_all(parts, ranks)
        found = {name: _average(seen) for name, seen in parts.items() if seen}
        for name, average in found.items():
            _check_finite(name, average)
        averages = found
    finally:
        for name, layer in layers.items():
            _set(layer, averages.get(name, before[name]))
    return len(averages)


def _kept_statistics(name: str, dense: DenseStatistics, plan: PruningPlan) -> Iterator[Statistics]:
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


def _measured(x: Tensor) -> Statistics:
    """Return mean and variance over all dimensions but the second."""
    around = [dim for dim in range(x.ndim) if dim != 1]
    var, mean = torch.var_mean(x.double(), around, correction=0)
    return mean, var


def _several(name: str, count: int) -> int:
    if count < 2:
        raise CalibrationError(
            f"batch norm {name!r} sees one value a channel and no variance: give more samples, or "
            "leave the statistics as they were (--batch-norm keep)"
        )
    return count - 1


def _of_all(parts: Mapping[str, Sequence[_Part]], ranks: Ranks) -> dict[str, list[_Part]]:
    """Return what all ranks have seen, by layer, in the order in which one process would see it."""
    if ranks.alone:
        return {name: list(seen) for name, seen in parts.items()}
    mine = {
        name: [
            _Part(part.batch, part.count, (part.statistics[0].cpu(), part.statistics[1].cpu()))
            for part in seen
        ]
        for name, seen in parts.items()
    }
    everyone = ranks.all_gather("batch-norm statistics", mine)
    return {
        name: sorted((part for told in everyone for part in told[name]), key=lambda p: p.batch)
        for name in parts
    }


def _average(parts: Sequence[_Part]) -> Statistics:
    """Weight batches by their number of values."""
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64)
    means = torch.stack([part.statistics[0] for part in parts])
    variances = torch.stack([part.statistics[1] for part in parts])
    shares = (counts / counts.sum()).to(means.device)
    return shares @ means, shares @ variances


def _stored(layer: _BatchNorm) -> Statistics:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.double(), layer.running_var.double()


def _set(layer: _BatchNorm, statistics: Statistics) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(statistics[0])
    layer.running_var.copy_(statistics[1])


def _check_finite(name: str, statistics: Statistics) -> None:
    for tensor in statistics:
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the batch-norm statistics of {name!r} are not finite on the calibration data; "
                "use --dtype float32, or leave them as they were (--batch-norm keep)"
            )
