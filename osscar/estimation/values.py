"""What an estimate consists of, in Python and in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict

from osscar.base.errors import RequestError
from osscar.base.inputs import shown
from osscar.base.json_files import STRICT
from osscar.base.timing import Stage

SCHEMA = "osscar.estimate/2"

_LONGEST = 1e10
"""Seconds, three hundred years."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage of a run will take.

    Parameters
    ----------
    stage
        Its name, of `osscar.base.timing.Stage`.
    seconds, low, high
        Wall time, and between which it should be; `high` is None where nothing bounds it.
    peak_bytes
        The most memory meanwhile, of the process, or of the card that it runs on; 0 where nothing
        is known.
    read_bytes, written_bytes
        Of files.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    stage: str
    seconds: float
    low: float
    high: float | None
    peak_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


@dataclass(frozen=True)
class LayerClass:
    """Groups whose problems are of one size, and the group that was solved for all of them.

    Parameters
    ----------
    groups
        Their names, in the order of the model.
    rows
        How many inputs the consumer has that reads most.
    source, source_rows
        The group that was solved, which may be one of a smaller class, and the same of it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    groups: tuple[str, ...]
    rows: int
    source: str
    source_rows: int

    @property
    def extrapolated(self) -> int:
        """How many of the groups were not solved."""
        return sum(name != self.source for name in self.groups)


def _checked_stages(stages: tuple[StageEstimate, ...]) -> tuple[StageEstimate, ...]:
    """Refuse stages that no dry run tells of."""
    names = [one.stage for one in stages]
    for one in stages:
        if one.stage not in set(Stage):
            raise ValueError(f"{one.stage!r:.60} is no stage of a run")
        if names.count(one.stage) > 1:
            raise ValueError(f"the stage {one.stage!r} is told twice")
        if not 0 <= one.low <= one.seconds <= (_LONGEST if one.high is None else one.high):
            raise ValueError(f"the stage {one.stage!r} does not take from its least to its most")
        if not one.seconds <= _LONGEST:
            raise ValueError(f"the stage {one.stage!r} takes {one.seconds:g} seconds")
        if min(one.peak_bytes, one.read_bytes, one.written_bytes) < 0:
            raise ValueError(f"the stage {one.stage!r} takes less than no memory or disk")
    if not stages:
        raise ValueError("it tells of no stage")
    return stages


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take.

    Parameters
    ----------
    stages
        In the order in which they come.
    seconds, low, high
        Sums over the stages: wall time, and between which it should be; `high` is None where
        nothing bounds one of them.
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

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    stages: Annotated[tuple[StageEstimate, ...], AfterValidator(_checked_stages)]
    seconds: float
    low: float
    high: float | None
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


def summed(stages: Sequence[StageEstimate]) -> dict[str, Any]:
    """Return stages in their order, and what they come to, as fields of an `Estimate`."""
    order = list(map(str, Stage))
    ordered = tuple(sorted(stages, key=lambda one: order.index(one.stage)))
    highs = [math.inf if one.high is None else one.high for one in stages]
    return {
        "stages": ordered,
        "seconds": sum(one.seconds for one in stages),
        "low": sum(one.low for one in stages),
        "high": sum(highs) if math.isfinite(sum(highs)) else None,
        "peak_bytes": max((one.peak_bytes for one in stages), default=0),
        "read_bytes": sum(one.read_bytes for one in stages),
        "written_bytes": sum(one.written_bytes for one in stages),
    }


@dataclass(frozen=True, kw_only=True)
class EstimateDocument(Estimate):
    """An estimate as a file holds it; ``docs/json.md`` describes its fields."""

    schema: Literal["osscar.estimate/2"]
    osscar_version: str
    model: str
    device: str
    threads: int
    dtype: str

    def check_for(self, asked: Mapping[str, Any]) -> None:
        """Refuse to be compared with another run than the one that was asked about.

        Parameters
        ----------
        asked
            The run's model, settings, calibration data, and where it runs, each under its name.

        Raises
        ------
        RequestError
            Saying what differs.
        """
        now = json.loads(json.dumps(dict(asked)))
        own = {name: getattr(self, name) for name in ("model", "device", "threads", "dtype")}
        told = {**self.settings, **self.calibration, **own}
        for name in sorted(now):
            if now[name] != told.get(name):
                raise RequestError(
                    f"the estimate is of another run: {name.replace('_', '-')} was "
                    f"{shown(told.get(name))} and is {shown(now[name])}; make it anew with "
                    "--dry-run, or leave --estimate away"
                )

    def against(self, seconds: Mapping[Stage, float], peak: int | None) -> dict[str, Any]:
        """Return what was estimated beside what a run has taken so far, as JSON-able data.

        Parameters
        ----------
        seconds
            By stage, of those that have ended.
        peak
            The most memory of the process, or of the card that it runs on.
        """
        took = {str(name): value for name, value in seconds.items()}
        stages = [
            {"stage": one.stage, "estimated": one.seconds, "seconds": took.get(one.stage)}
            for one in self.stages
        ]
        ended = [one for one in stages if one["seconds"] is not None]
        return {
            "stages": stages,
            "estimated_seconds": sum(one["estimated"] for one in ended),
            "seconds": sum(one["seconds"] for one in ended),
            "estimated_peak_bytes": self.peak_bytes,
            "peak_bytes": peak,
        }
