"""The time of a forward pass as a function of the units that groups keep: a table, kept on disk."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from osscar.base.errors import FileError, OutputError
from osscar.base.files import cache_directory, digest, reason_of, write_json
from osscar.base.json_files import STRICT, read_json


@dataclass(frozen=True)
class Part:
    """What takes time together: parts of a pass that depend on the same groups.

    Parameters
    ----------
    groups
        Names; none, where nothing that may lose units is involved.
    shares
        Ascending, from above 0 to 1: products of the shares of units that these groups keep.
    seconds
        What it took at each.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    groups: tuple[str, ...]
    shares: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, share: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolate the seconds, with which an operation less is a share of the time less."""
        return np.asarray(np.interp(share, self.shares, self.seconds))

    @property
    def sound(self) -> bool:
        """Whether it is such a table."""
        return (
            len(self.shares) == len(self.seconds) > 0
            and all(0 < share <= 1 for share in self.shares)
            and list(self.shares) == sorted(set(self.shares))
            and self.shares[-1] == 1
            and len(set(self.groups)) == len(self.groups)
            and all(seconds >= 0 for seconds in self.seconds)
        )


@dataclass(frozen=True)
class LatencyTable:
    """The cost of a model in time, relative to the dense model's.

    Parameters
    ----------
    parts
        They add up to the pass.
    dense_seconds
        Of the dense model's pass.
    units
        How many each group has that the table knows.
    """

    parts: tuple[Part, ...]
    dense_seconds: float
    units: Mapping[str, int]

    @property
    def sound(self) -> bool:
        """Whether it says that the model takes time, before and after pruning."""
        return (
            self.dense_seconds > 0
            and all(part.sound for part in self.parts)
            and 0 < self.of({}) < math.inf
        )

    def of(self, kept: Mapping[str, int]) -> float:
        """Return the time where groups keep so many units; those not named keep all."""
        return self.seconds(kept) / self.dense_seconds

    def seconds(self, kept: Mapping[str, int]) -> float:
        """Return the same in seconds."""
        return sum(float(part.at(self._share(part.groups, kept))) for part in self.parts)

    @property
    def dense(self) -> float:
        """The time of the model as it is."""
        return 1.0

    def over(
        self, name: str, counts: NDArray[np.int64], kept: Mapping[str, int]
    ) -> NDArray[np.float64]:
        """Return the time with each of some counts of one group, the others as they are kept.

        All but what the group takes part in is left out.
        """
        total = np.zeros(len(counts))
        for part in self.parts:
            if name in part.groups:
                rest = self._share([group for group in part.groups if group != name], kept)
                total += part.at(rest * counts / self.units[name])
        return total / self.dense_seconds

    def separable(self, names: Iterable[str]) -> bool:
        """Whether the times of these groups add up."""
        chosen = set(names)
        return all(len(chosen.intersection(part.groups)) <= 1 for part in self.parts)

    def _share(self, names: Iterable[str], kept: Mapping[str, int]) -> float:
        return math.prod(kept.get(name, self.units[name]) / self.units[name] for name in names)


def tabulated(
    groups: Sequence[frozenset[str]],
    kept: Sequence[Mapping[str, int]],
    seconds: Sequence[NDArray[np.float64]],
    dense_seconds: float,
    units: Mapping[str, int],
) -> LatencyTable:
    """Return the table of what was timed.

    Parameters
    ----------
    groups
        Those on whose widths each part depends.
    kept
        What groups keep in each model; those not named keep all.
    seconds
        Of the parts of each of these models.
    dense_seconds
        Of the whole dense model.
    units
        How many each group has.
    """
    together: dict[frozenset[str], list[int]] = {}
    for index, names in enumerate(groups):
        together.setdefault(names, []).append(index)
    parts = []
    for names, indices in together.items():
        at: dict[float, list[float]] = {}
        for counts, times in zip(kept, seconds, strict=True):
            share = math.prod(counts.get(name, units[name]) / units[name] for name in names)
            at.setdefault(share, []).append(float(times[indices].sum()))
        shares = tuple(sorted(at))
        means = tuple(statistics.fmean(at[share]) for share in shares)
        parts.append(Part(tuple(sorted(names)), shares, means))
    table = LatencyTable(tuple(parts), dense_seconds, dict(units))
    # What depends on no width was timed with every model, the dense one among them.
    return dataclasses.replace(table, dense_seconds=table.seconds({})) if {} in kept else table


# ---- kept on disk ------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTable:
    """A table in a file.

    Parameters
    ----------
    schema
        What this is, and in which version.
    measured
        On what: device, software, model, data, and the widths of the models that were timed.
    dense_seconds, parts
        As in `LatencyTable`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.latency/1"]
    measured: dict[str, str]
    dense_seconds: float
    parts: tuple[Part, ...]


def kept_table(measured: Mapping[str, str], units: Mapping[str, int]) -> LatencyTable | None:
    """Return the table that was measured on the same before; None if none was, or it is damaged.

    Parameters
    ----------
    measured
        On what it is to have been measured.
    units
        Those of the groups that it is to know.
    """
    file = _file(measured)
    try:
        if not file.exists():
            return None
        stored = read_json(file, StoredTable)
        known = {name for part in stored.parts for name in part.groups}
        table = LatencyTable(stored.parts, stored.dense_seconds, dict(units))
        if stored.measured != measured or not known <= set(units) or not table.sound:
            raise FileError(file, "it holds another table than its name says")
    except (FileError, OSError) as error:
        warnings.warn(f"{error}; what it should hold is measured anew", stacklevel=2)
        return None
    return table


def keep_table(measured: Mapping[str, str], table: LatencyTable) -> None:
    """Keep a table for the next run; where that is impossible, it is measured again."""
    stored = StoredTable("osscar.latency/1", dict(measured), table.dense_seconds, table.parts)
    file = _file(measured)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():
            raise OutputError(f"{file} is no file")  # a pipe would be written to, and waited for
        write_json(file, dataclasses.asdict(stored))
    except (OSError, OutputError) as error:
        warnings.warn(f"the times are not kept for the next run: {reason_of(error)}", stacklevel=2)


def _file(measured: Mapping[str, str]) -> Path:
    name = digest(json.dumps(dict(measured), sort_keys=True))[:32]
    return cache_directory() / "latency" / f"{name}.json"
