"""The one rule by which samples are divided, and the parts that a quality target takes.

Whatever divides samples takes the first of them for one thing and the last for another.  So they
are shuffled once, by the seed, where they enter (`shuffled`).  Samples that are copies of one
another stay together, so that what is measured on one part says something about new samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from osscar.base.errors import DataError
from osscar.base.printable import share
from osscar.data.batches import ModelInputs
from osscar.data.reader import TOKENS
from osscar.data.samples import SampleSet, digest_of, named_generator
from osscar.data.text import CalibrationSet
from osscar.proof.seen import LARGEST_SHARE, RUN, Seen, fingerprints_of_runs

_ONE_IN = 8
_FEWEST = 4
"""With fewer samples, all are needed for the fit."""

_OVERLAP = 1 / 8
"""Windows of text that have a larger share in common are copies."""


def shuffled(inputs: ModelInputs, seed: int) -> ModelInputs:
    """Return samples in random order, in which copies are adjacent and of one `sample_groups`.

    The last sample has the fewest copies, so that some can be held out without one that is fitted
    to.  The order of copies among themselves stays, and so does that of a text whose windows all
    overlap.  Tensors are not copied.  The same samples and seed give the same order everywhere.
    """
    numbers = copies(inputs)
    drawn = torch.randperm(int(numbers.max()) + 1, generator=named_generator("order", seed))
    counts = numbers.bincount()
    fewest = (counts == counts.min()).nonzero()[:, 0]
    drawn[fewest[drawn[fewest].argmax()]] = len(drawn)
    order = inputs.positions[torch.argsort(drawn[numbers], stable=True)]
    groups = torch.empty(int(inputs.positions.max()) + 1, dtype=torch.int64)
    groups[inputs.positions] = numbers
    return dataclasses.replace(inputs, order=order, sample_groups=groups)


def copies(inputs: ModelInputs) -> Tensor:
    """Return a number for each sample, from 0 on, (n,) int64, which copies of it share.

    These are equal samples, found by a digest; those of one number of `sample_groups`; and windows
    of text that overlap by more than an eighth.
    """
    positions, apart = inputs.positions.tolist(), inputs.apart
    digests = [
        digest_of(apart[at] if apart else {n: x[at] for n, x in inputs.tensors.items()})
        for at in positions
    ]
    alike = [digests]
    pairs = list[tuple[int, int]]()
    if inputs.sample_groups is not None:
        alike.append(inputs.sample_groups[inputs.positions].tolist())
    for values in alike:
        first: dict[int, int] = {}
        pairs += ((first.setdefault(value, at), at) for at, value in enumerate(values))
    if inputs.tokens:
        pairs += _overlapping(inputs.tensors[TOKENS][inputs.positions])
    one, other = np.array(pairs).T
    linked = coo_matrix((np.ones(len(pairs)), (one, other)), shape=(len(positions),) * 2)
    return torch.from_numpy(connected_components(linked, directed=False)[1]).long()


def run_length(windows: Tensor) -> int:
    """Return in runs of how many tokens windows of text, (..., tokens), are compared."""
    return max(1, min(RUN, windows.shape[-1] // 2))


def _overlapping(windows: Tensor) -> list[tuple[int, int]]:
    """Return pairs of windows, (n, tokens), that have more than an eighth of the text in common."""
    count, length = len(windows), run_length(windows)
    runs = fingerprints_of_runs(windows, length).reshape(count, -1)
    rows = np.repeat(np.arange(count), runs.shape[1])
    order = np.lexsort((rows, runs.reshape(-1)))
    values, rows = runs.reshape(-1)[order], rows[order]
    common = (values[1:] == values[:-1]) & (rows[1:] != rows[:-1])
    pairs, often = np.unique(rows[:-1][common] * count + rows[1:][common], return_counts=True)
    found = pairs[often + length - 1 > _OVERLAP * windows.shape[1]]
    return [divmod(int(pair), count) for pair in found]


def held_out(samples: int, most: int | None = None) -> int:
    """Return how many samples are held out: one in eight, at least one; none of fewer than four.

    No weight is fitted to them, and choices are made on them.  Pruning chooses the damping of each
    layer on the last of its samples, and reports the divergence there; a recovery chooses the step
    that it keeps.
    """
    if samples < _FEWEST:
        return 0
    return min(max(1, samples // _ONE_IN), most or samples)


class Parts(NamedTuple):
    """Data in three parts, none of which shares a sample, or a copy of one, with another."""

    pruned_on: Any
    searched: Any
    tested: Any


def in_parts(data: Any, numbers: Tensor, seed: int) -> Parts:
    """Split samples at random: half to prune on, a quarter to search on, a quarter to test on.

    Shares are of different `numbers`, which copies share (`copies`).  A DataError is raised if more
    than 1 % of the text of a part is also in another's.
    """
    different = int(numbers.max()) + 1
    place = torch.randperm(different, generator=named_generator("parts", seed))[numbers]
    quarter = different // 4
    first, last = different - 2 * quarter, different - quarter
    shares = place < first, (place >= first) & (place < last), place >= last
    parts = Parts(*(rows_of(data, mine.nonzero()[:, 0]) for mine in shares))
    if isinstance(data, CalibrationSet):
        mine, *others = (fingerprints_of_runs(part.tokens) for part in parts)
        known = max(Seen.of(mine).share(other) for other in others)
        if known > LARGEST_SHARE:
            raise DataError(
                f"{share(known)} of the text that a quality target is measured on is also pruned "
                f"on, more than {share(LARGEST_SHARE)}: the windows of {data.source} overlap, or "
                "the text repeats itself; cut them with overlapping=False, give a longer text, or "
                "another seed"
            )
    return parts


def rows_of(data: Any, rows: Tensor) -> Any:
    """Return the samples at these positions, (n,) int64."""
    if isinstance(data, CalibrationSet):
        return dataclasses.replace(data, tokens=data.tokens[rows])
    if isinstance(data, SampleSet):
        return data.rows(rows)
    if isinstance(data, Mapping):
        return {name: tensor[rows.to(tensor.device)] for name, tensor in data.items()}
    return data[rows.to(data.device)]
