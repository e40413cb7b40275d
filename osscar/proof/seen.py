"""What a model has seen of data, as a record of fixed size by which the data are recognized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import StringConstraints, with_config
from torch import Tensor

from osscar.base.errors import DataError, warn
from osscar.base.json_files import STRICT

Fingerprints: TypeAlias = Sequence[int] | npt.NDArray[np.uint64]
"""Hashes of 64 bits: of samples, or of runs of tokens."""

RUN = 32
"""Tokens of a run: some twenty words, which texts have in common that were copied."""

_MOST = 4096
"""Fingerprints that are kept of a set."""

LARGEST_SHARE = 0.01
"""Of samples, or runs of tokens, that data may have in common with what a model has seen."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@with_config(STRICT)
@dataclass(frozen=True)
class Seen:
    """The least fingerprints of a set, at most 4,096: a sample of it that any other set can draw.

    The share of another set that was seen is estimated on those of its fingerprints that lie below
    the largest which is kept here.  They are a fair sample, as hashes are uniform (bottom-k sketch:
    Cohen and Kaplan, Summarizing Data Using Bottom-k Sketches, 2007).

    count: How many different fingerprints the set had.
    least: Those that are kept, 16 hexadecimal digits each, in rising order.
    """

    count: int
    least: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{16})*$")]

    @classmethod
    def of(cls, fingerprints: Fingerprints) -> Seen:
        """Take a sample of a set."""
        different = np.unique(np.asarray(fingerprints, np.uint64))
        return cls(len(different), different[:_MOST].astype(">u8").tobytes().hex())

    def share(self, fingerprints: Fingerprints) -> float:
        """Estimate which share of the different fingerprints of another set are in this one."""
        known = np.frombuffer(bytes.fromhex(self.least), ">u8").astype(np.uint64)
        mine = np.unique(np.asarray(fingerprints, np.uint64))
        if self.count > len(known):
            mine = mine[mine < known[-1]]
        return float(np.isin(mine, known).mean()) if len(mine) else 0.0


def fingerprints_of_runs(tokens: Tensor, run: int = RUN) -> npt.NDArray[np.uint64]:
    """Return a hash of each run of so many tokens in a row; of fewer, of all of them.

    tokens: Ids, (..., tokens) int64; runs do not go on from one row to the next.
    """
    values = _mixed(tokens.cpu().numpy().astype(np.uint64))
    length = min(run, values.shape[-1])
    count = values.shape[-1] - length + 1
    total = np.zeros((*values.shape[:-1], count), np.uint64)
    for offset in range(length):
        total = total * _FACTOR + values[..., offset : offset + count]
    return _mixed(total).reshape(-1)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return hashes of numbers, by the finalizer of SplitMix64 (Steele et al., 2014)."""
    values = values + _FACTOR
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Calibration:
    """What a model was calibrated or recovered on, so that it is recognized and never scored."""

    source: str
    seen: Seen
    samples: int | None = None
    seqlen: int | None = None
    seed: int | None = None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Calibration:
        """Take what is needed of what ``describe()`` of a calibration set returns."""
        known = {f.name: described[f.name] for f in dataclasses.fields(cls) if f.name in described}
        return cls(**{**known, "seen": Seen(**described["seen"])})


class _Scored(Protocol):
    """Data that are to be scored."""

    @property
    def source(self) -> str:
        """Where they come from, in words."""

    def fingerprints(self) -> Fingerprints:
        """Return a hash of each sample, or of each run of tokens."""


def refuse_overlap(data: _Scored, calibration: Iterable[Calibration]) -> None:
    """Refuse to score what a model has seen, as its lineage tells; of little of it, warn."""
    seen = list(calibration)
    mine: Fingerprints = data.fingerprints() if seen else []
    for known in seen:
        share = known.seen.share(mine)
        said = (
            f"about {100 * share:.3g}% of {data.source} was used to calibrate or recover this model"
        )
        if share > LARGEST_SHARE:
            raise DataError(f"{said} ({known.source}); score other data")
        if share:
            warn(f"{said} ({known.source})")
