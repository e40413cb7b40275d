"""Batch-norm statistics after pruning, which has changed what the layers before them return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from osscar.base.errors import NonFiniteError
from osscar.base.ranks import ALONE, Ranks
from osscar.consumers.layers import reads
from osscar.network.modules import forward
from osscar.preparation.failures import failures_named
from osscar.proof.plan import PruningPlan

_CACHED, _ON_CARD = 1 << 18, 1 << 24
"""Numbers of float64 of which several tensors fit into a cache, or take little of a card."""

_Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and variance of each channel, (channels,) float64."""

DenseStatistics: TypeAlias = Sequence[Mapping[str, Sequence[_Statistics]]]
"""For each batch and each layer by name, the statistics of what the layer was called with."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }


@contextmanager
def statistics_put_back(model: nn.Module) -> Iterator[None]:
    """Put the running statistics of a model back when the block ends."""
    before = [(x, x.clone()) for layer in batch_norms(model).values() for x in _running(layer)]
    try:
        yield
    finally:
        for running, values in before:
            running.copy_(values)


@torch.no_grad()
def dense_statistics(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], ranks: Ranks = ALONE
) -> DenseStatistics | None:
    """Measure what batch-norm layers, if any, are called with on this rank's batches."""
    layers = batch_norms(model)
    if not layers:
        return None
    found: list[dict[str, list[_Statistics]]] = []

    def see(name: str, x: Tensor) -> None:
        found[-1][name].append(_measured(x))

    for index in shared_out(batches, ranks):
        found.append({name: [] for name in layers})
        with failures_named(model, index), reads(model, layers, see):
            forward(model, batches[index])
    return found


def shared_out(batches: Sequence[Mapping[str, Any]], ranks: Ranks) -> list[int]:
    """Return which batches are this rank's."""
    return ranks.share([len(next(iter(batch.values()))) for batch in batches])


@torch.no_grad()
def renew_statistics(
    model: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Mapping[str, Any]],
    dense: DenseStatistics | None,
    ranks: Ranks = ALONE,
) -> int:
    """Renew the running statistics of a pruned model; return how many layers have new ones.

    A layer's statistics on a batch are taken when those of all layers before it are renewed, as
    ``mean + (m - m_dense)`` and ``var * (v + eps) / (v_dense + eps)``: only what pruning changed
    matters, and not the choice of the data.  The averages over all ranks stay.  If one is not
    finite, a `NonFiniteError` is raised, and the model keeps its old statistics.
    """
    if dense is None:
        return 0
    layers = batch_norms(model)
    before = {
        name: [x.to(torch.float64, copy=True) for x in _running(layer)]
        for name, layer in layers.items()
    }
    # The number of values of each layer, and its means and variances times that.
    sums = {name: mean.new_zeros(1 + 2 * len(mean)) for name, (mean, _) in before.items()}
    original = {name: _kept_statistics(name, dense, plan) for name in layers}

    def renew(name: str, x: Tensor) -> None:
        layer, (mean, var) = layers[name], _measured(x)
        (old_mean, old_var), (dense_mean, dense_var) = before[name], next(original[name])
        mean = old_mean + mean - dense_mean
        var = old_var * (var + layer.eps) / (dense_var + layer.eps)
        _set(layer, (mean, var))
        count = x.numel() // x.shape[1]
        sums[name] += count * torch.cat([mean.new_ones(1), mean, var])

    averages: Mapping[str, _Statistics] = {}
    try:
        with reads(model, layers, renew):
            for index in shared_out(batches, ranks):
                forward(model, batches[index])
        ranks.all_reduce("batch-norm statistics", list(sums.values()))
        averages = {name: _average(name, total) for name, total in sums.items() if total[0] > 0}
    finally:
        for name, layer in layers.items():
            _set(layer, averages.get(name, before[name]))
    return len(averages)


def _kept_statistics(name: str, dense: DenseStatistics, plan: PruningPlan) -> Iterator[_Statistics]:
    """Yield the dense statistics of the channels that are left of a layer, call by call."""
    gone = {
        index
        for group in plan.groups
        for slot in group.slots
        if slot.tensor == f"{name}.running_mean"
        for index in slot.indices(group.gone)
    }
    for batch in dense:
        for mean, var in batch.get(name, ()):
            stay = torch.tensor([i for i in range(len(mean)) if i not in gone], device=mean.device)
            yield mean[stay], var[stay]


def _measured(x: Tensor) -> _Statistics:
    """Return mean and variance over all dimensions but the second.

    Those of a few samples at a time are pooled: to page in a whole batch in float64 takes five
    times as long, and so does `torch.var_mean` over dimensions that are not the last.
    """
    few = (_CACHED if x.device.type == "cpu" else _ON_CARD) // max(1, x[:1].numel())
    means, variances, counts = [], [], []
    for some in torch.split(x, max(1, few)):
        values = some.double().transpose(0, 1).flatten(1)
        means.append(values.mean(1))
        apart = values - means[-1][:, None]
        variances.append(torch.linalg.vector_norm(apart, dim=1).square() / values.shape[1])
        counts.append(values.shape[1])
    shares = torch.tensor(counts, dtype=torch.float64, device=x.device) / sum(counts)
    found = torch.stack(means)
    mean = shares @ found
    return mean, shares @ (torch.stack(variances) + (found - mean).square())


def _average(name: str, total: Tensor) -> _Statistics:
    """Return the average of a layer's statistics, given their `sums`; refuse what is not finite."""
    mean, var = (total[1:] / total[0]).chunk(2)
    if not bool(total.isfinite().all()):
        raise NonFiniteError(
            f"the batch-norm statistics of {name!r} are not finite on the calibration data; "
            "use dtype float32 (`--dtype float32`), or leave them as they were (batch_norm keep, "
            "`--set batch_norm=keep`)"
        )
    return mean, var


def _running(layer: _BatchNorm) -> _Statistics:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _set(layer: _BatchNorm, statistics: Sequence[Tensor]) -> None:
    for old, new in zip(_running(layer), statistics, strict=True):
        old.copy_(new)
