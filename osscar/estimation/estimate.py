"""What a pruning run will take, told before it begins: seconds, memory and disk, stage by stage.

The model is opened as the run opens it, and two probes are made on it (`osscar.estimation.probed`).
All else is counting: how often which samples pass how much of the model, how many layers of which
sort are summed up and solved.  Nothing is written, and the model is not changed.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict
from torch import nn

from osscar.base.devices import clock_of, resolve_device
from osscar.base.errors import RequestError
from osscar.base.inputs import shown
from osscar.base.json_files import STRICT
from osscar.base.timing import Clock, Stage
from osscar.estimation.scaled import Scaled
from osscar.estimation.stages import StageEstimate, expected
from osscar.pruning.prune import opened_for, prune
from osscar.request import PruningRequest


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Parameters
    ----------
    stages
        In the order in which they come.
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

    stages: tuple[StageEstimate, ...]
    settings: Mapping[str, Any] = field(repr=False)
    calibration: Mapping[str, Any]
    passes: int
    limit_bytes: int | None
    least_bytes: int | None
    sample_seconds: float
    kept_share: float
    probe_seconds: float

    @property
    def seconds(self) -> float:
        """Wall time of the run."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def low(self) -> float:
        """What it takes at least."""
        return sum(stage.low for stage in self.stages)

    @property
    def high(self) -> float | None:
        """What it takes at most; None where nothing bounds it."""
        highs = [stage.high for stage in self.stages if stage.high is not None]
        return sum(highs) if len(highs) == len(self.stages) else None

    @property
    def peak_bytes(self) -> int:
        """The most memory of the process, or of the card that it runs on."""
        return max((stage.peak_bytes for stage in self.stages), default=0)

    def with_stages(self, stages: Sequence[StageEstimate]) -> Estimate:
        """Return an estimate that has other stages, too, in their order."""
        order = [str(name) for name in Stage]
        every = sorted((*self.stages, *stages), key=lambda stage: order.index(stage.stage))
        return dataclasses.replace(self, stages=tuple(every))


def estimate_as_asked(
    model: nn.Module, calibration: Any, request: PruningRequest, clock: Clock | None = None
) -> Estimate:
    """Tell what `osscar.prune` will take; it writes nothing, and the model is not changed.

    Parameters
    ----------
    model, calibration
        As `osscar.prune` takes them.
    request
        What will be asked for.  `osscar.estimate` takes its fields as keywords: `PruningRequest`
        describes them.
    clock
        What time is; by default that of the wall.

    Returns
    -------
    Estimate
        Of all stages from the opening of the model to the comparison of its predictions.

    Raises
    ------
    RequestError
        If what to keep makes no sense for this model, or a limit of memory cannot be kept.
    NonFiniteError, CalibrationError, ModelError, graph.GraphError
        As `osscar.prune`.

    Examples
    --------
    >>> import osscar
    >>> loaded = osscar.load_model("demo")
    >>> calibration = osscar.load_calibration(None, loaded.tokenizer, samples=4, seqlen=64)
    >>> estimate = osscar.estimate(loaded.model, calibration, sparsity=0.5)
    >>> estimate.low <= estimate.seconds
    True
    """
    clock = clock_of(resolve_device(request.device)) if clock is None else clock
    began = clock()
    with ExitStack() as stack:
        ready = stack.enter_context(opened_for(model, calibration, request))
        opening = clock() - began
        found = expected(ready, request, clock)
        opened = StageEstimate.of(Stage.OPEN, Scaled.certain(opening), found.opened_bytes)
        return Estimate(
            stages=(opened, *found.stages),
            settings=json.loads(json.dumps(request.to_json())),
            calibration=ready.inputs.settings,
            passes=found.passes,
            limit_bytes=found.limit,
            least_bytes=found.least,
            sample_seconds=found.sample_seconds,
            kept_share=found.kept,
            probe_seconds=clock() - began - opening,
        )


def estimate(model: nn.Module, calibration: Any, **asked: Any) -> Estimate:
    """Tell what `osscar.prune` will take: `estimate_as_asked`, with the request as keywords."""
    return estimate_as_asked(model, calibration, PruningRequest(**asked))


estimate.__doc__ = estimate_as_asked.__doc__
estimate.__signature__ = inspect.signature(prune)  # type: ignore[attr-defined]


# ---- beside the run ----------------------------------------------------------------------


_LONGEST = 1e10
"""Seconds, three hundred years."""


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


@dataclass(frozen=True)
class EstimateDocument:
    """An estimate as a file holds it; ``docs/json.md`` describes its fields."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.estimate/1"]
    osscar_version: str
    model: str
    calibration: dict[str, Any]
    settings: dict[str, Any]
    device: str
    threads: int
    dtype: str
    stages: Annotated[tuple[StageEstimate, ...], AfterValidator(_checked_stages)]
    seconds: float
    low: float
    high: float | None
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    passes: int
    limit_bytes: int | None
    least_bytes: int | None
    sample_seconds: float
    kept_share: float
    probe_seconds: float

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

    def against(self, spent: Mapping[Stage, float], peak: int | None) -> dict[str, Any]:
        """Return what was estimated beside what a run has taken so far, as JSON-able data.

        Parameters
        ----------
        spent
            Seconds by phase, of those that have ended.
        peak
            The most memory of the process, or of the card that it runs on.
        """
        took = {str(name): seconds for name, seconds in spent.items()}
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
