"""What is held out of calibration data, and the three parts of it that a quality target takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osscar.base.errors import DataError
from osscar.base.printable import share
from osscar.data.samples import SampleSet, named_generator
from osscar.data.text import CalibrationSet
from osscar.proof.seen import LARGEST_SHARE, Seen, fingerprints_of_runs

_ONE_IN = 8
_FEWEST = 4
"""With fewer samples, all are needed for the fit."""


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
    """Data in three parts, none of which shares a sample with another."""

    pruned_on: Any
    choosing: Any
    reporting: Any


def in_parts(data: Any, samples: int, seed: int) -> Parts:
    """Split so many samples at random: half to prune on, and a quarter for each of the other parts.

    Parameters
    ----------
    data
        In any of the forms that `osscar.prune` takes, loaders aside.
    samples
        How many there are.
    seed
        The same seed gives the same parts.

    Raises
    ------
    DataError
        If more than 1 % of the text of a part is also in another's: windows overlap, or the text
        repeats itself.
    """
    order = torch.randperm(samples, generator=named_generator("parts", seed))
    quarter = samples // 4
    sizes = [samples - 2 * quarter, quarter, quarter]
    parts = Parts(*(rows_of(data, rows.sort().values) for rows in torch.split(order, sizes)))
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
