"""Samples of equal shapes run together: the one rule by which they are grouped into batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osscar.data.samples import IGNORED, SampleList, SampleSet


def shapes_of(sample: Mapping[str, Tensor]) -> tuple[Hashable, ...]:
    """Return by what samples are told from others that cannot be in one batch with them."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sample.items())


def alike(shapes: Sequence[Hashable], size: int) -> list[list[int]]:
    """Return the positions of samples in batches: those of equal shapes, so many at a time."""
    batches, latest = list[list[int]](), dict[Hashable, list[int]]()
    for at, shape in enumerate(shapes):
        if len(latest.get(shape, ())) % size == 0:
            latest[shape] = []
            batches.append(latest[shape])
        latest[shape].append(at)
    return batches


def joined(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of samples of equal shapes, one or several in each."""
    return {name: torch.cat([one[name] for one in samples]) for name in samples[0]}


def rows_and_batches(data: SampleSet, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield batches of equal shapes, and which samples they hold, (n,) int64."""
    if isinstance(data, SampleList):
        rows = range(len(data))
        ends = [0 if data.labels is None else end_of(data.labels[row]) for row in rows]
        shapes = [(shapes_of(one), end) for one, end in zip(data.samples, ends, strict=True)]
        for some in alike(shapes, size):
            yield torch.tensor(some), joined([data.samples[row] for row in some])
        return
    done = 0
    for batch in data.batches(size):
        count = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
        yield torch.arange(done, done + count), batch
        done += count


def end_of(labels: Tensor) -> int:
    """Return after how many labels of a sample none counts; of how many, if none does at all."""
    known = (labels.flatten() != IGNORED).nonzero()
    return int(known[-1]) + 1 if len(known) else labels.numel()
