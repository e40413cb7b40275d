"""What an estimate consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from osscar.base.shown import Shown
from osscar.base.timing import Stage


class Span(NamedTuple):
    """Seconds that are expected, and between which they should be; the most may be infinite."""

    low: float
    seconds: float
    high: float

    @classmethod
    def about(cls, seconds: float, spread: float = 0.1) -> Span:
        """Return what was measured, give or take a share of it."""
        return cls(seconds * (1 - spread), seconds, seconds * (1 + spread))


def together(*spans: Span) -> Span:
    """Return what several take, one after the other."""
    return Span(*map(sum, zip(*spans, strict=True))) if spans else Span(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class LayerClass:
    """Groups whose problems are of one size, and the group that was solved for all of them.

    `rows` are the inputs of the consumer that reads most, and `source_rows` those of the group that
    was solved, which may be one of a smaller class.
    """

    groups: tuple[str, ...]
    rows: int
    source: str
    source_rows: int

    @property
    def extrapolated(self) -> int:
        """How many of the groups were not solved."""
        return sum(name != self.source for name in self.groups)


@dataclass(frozen=True, kw_only=True)
class Estimate(Shown):
    """What a run will take.

    Parameters
    ----------
    stages
        By stage, in the order in which they come: `seconds`, and between which `low` and `high`
        they should be; the latter is infinite where nothing bounds it.
    peak_bytes
        The most memory of the process, or of the card that it runs on.
    read_bytes, written_bytes
        Of files, in all.
    classes
        The groups that are solved, by the size of their problem.
    settings
        What is asked for, as `PruningRequest.to_json` has it.
    calibration
        How many samples of what shape there are.
    passes
        How often the calibration data set out through the model for the walk.
    limit_bytes, least_bytes
        The most memory that the run may take, and the least that would do, where the weights stay
        on disk; else None.
    sample_seconds, kept_share
        A forward pass of one sample through the dense model, and about which share of the model
        stays.
    probe_seconds
        What telling this took, once the model was open.
    """

    stages: Mapping[Stage, Span]
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    classes: tuple[LayerClass, ...] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    calibration: dict[str, Any]
    passes: int
    limit_bytes: int | None
    least_bytes: int | None
    sample_seconds: float
    kept_share: float
    probe_seconds: float

    @property
    def total(self) -> Span:
        """The sum over the stages."""
        return together(*self.stages.values())

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return self.total.seconds

    @property
    def low(self) -> float:
        """The least that this should be."""
        return self.total.low

    @property
    def high(self) -> float:
        """The most that this should be, infinite where nothing bounds a stage."""
        return self.total.high
