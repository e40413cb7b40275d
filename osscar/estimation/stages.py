"""What each stage of a run takes: seconds, memory and files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from osscar.base.errors import OptionError
from osscar.base.json_files import STRICT
from osscar.base.timing import Clock, Stage
from osscar.estimation.probed import Probed, expected_keep
from osscar.estimation.scaled import Scaled
from osscar.estimation.stage_seconds import Seconds
from osscar.estimation.stage_space import Space
from osscar.network.modules import device_of
from osscar.offload.device_memory import DeviceMemory, memory_of
from osscar.offload.on_disk import shelf_of
from osscar.preparation.opened import Opened
from osscar.pruning.groups import held_out
from osscar.pruning.memory import check_streamed, least_memory
from osscar.request import PruningRequest


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

    @classmethod
    def of(
        cls, phase: Stage, takes: Scaled, peak: int = 0, read: int = 0, written: int = 0
    ) -> StageEstimate:
        """Return what a stage takes."""
        high = takes.high if math.isfinite(takes.high) else None
        return cls(str(phase), takes.seconds, takes.low, high, peak, read, written)


@dataclass(frozen=True)
class Expected:
    """What is known of a run before it begins.

    Parameters
    ----------
    stages
        What its stages take, without those that were measured as they came.
    passes
        How often the calibration data set out for the walk.
    limit, least
        Bytes that the run may take, and that it needs at least, where the weights stay on disk.
    sample_seconds
        A forward pass of one sample of the dense model.
    kept
        About what share of the model stays.
    opened_bytes
        Of the process, or on the card, once the model was opened.
    """

    stages: tuple[StageEstimate, ...]
    passes: int
    limit: int | None
    least: int | None
    sample_seconds: float
    kept: float
    opened_bytes: int


def expected(ready: Opened, request: PruningRequest, clock: Clock) -> Expected:
    """Probe an opened model, and count what a run takes.

    Raises
    ------
    RequestError
        If what to keep makes no sense for this model, or a limit of memory cannot be kept.
    """
    held = held_out(ready, request)
    room = check_streamed(ready, request, max(1, held))
    opened_bytes = _held(memory_of(device_of(ready.model)))
    began = clock()
    keep = expected_keep(ready, request)
    allocating = clock() - began
    plan = Probed.of(ready, request, keep, held, clock)
    time = Seconds(ready, request, plan, clock)
    takes = {
        Stage.TRIAL: time.trial(),
        Stage.DENSE: time.dense(),
        **time.budget(allocating),
        Stage.WALK: time.walk(),
        Stage.GRAM: time.layers("gram"),
        Stage.DAMPING: time.layers("damping"),
        Stage.SOLVER: time.layers("solver"),
        Stage.PROOF: time.proof(),
        Stage.PRUNED: time.pruned(),
    }
    space = Space.of(ready, request, plan, room, opened_bytes)
    stages = [
        StageEstimate.of(phase, seconds, space.peak(phase), space.read(phase), space.written(phase))
        for phase, seconds in takes.items()
    ]
    shelf = shelf_of(ready.model)
    return Expected(
        tuple(stages),
        passes=len(plan.walk.itinerary),
        limit=None if shelf is None else shelf.ceiling,
        least=None if room is None else least_memory(ready, request, max(1, held)),
        sample_seconds=plan.forward.few.seconds,
        kept=plan.kept,
        opened_bytes=opened_bytes,
    )


def _held(memory: DeviceMemory) -> int:
    try:
        return memory.held()
    except OptionError:  # a system that does not tell
        return memory.peak() or 0
