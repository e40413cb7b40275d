"""What a pruning run will take, told before it begins: seconds, memory and disk, stage by stage.

The model is opened as the run opens it, and the stations of the run are timed on little of it
(`osscar.estimation.stations`).  Memory and files are counted.  Nothing is written, and the model is
not changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graph import CouplingGroup
from osscar.allocation.curvature import held_batches, parts, small_batches
from osscar.allocation.curves import curve_samples
from osscar.base.devices import clock_of, resolve_device
from osscar.base.errors import OptionError
from osscar.base.timing import Clock, Stage
from osscar.checkpoint.directory import weight_bytes
from osscar.estimation.stations import Span, Timed, timed_stations
from osscar.estimation.values import Estimate, StageEstimate, summed
from osscar.evaluation.forward import measuring_seconds
from osscar.models.loaded import LoadedModel
from osscar.network.modules import device_of
from osscar.offload.device_memory import DeviceMemory, memory_of
from osscar.offload.on_disk import is_on_disk, shelf_of
from osscar.preparation.linear_maps import linear_maps
from osscar.preparation.prepare import Prepared
from osscar.pruning.groups import held_out
from osscar.pruning.memory import Room, check_streamed, least_memory, put_out
from osscar.pruning.prune import prepare_for
from osscar.request import PruningRequest, by_keywords


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
    with prepare_for(model, calibration, request) as prepared:
        opening = clock() - began
        held = held_out(prepared, request)
        room = check_streamed(prepared, request, max(1, held))
        base = _held_bytes(memory_of(device_of(prepared.model)))
        timed = timed_stations(prepared, request, held, room, clock)
        needed = _needed_bytes(prepared, request, held, room, timed)
        read = _read_bytes(prepared, request, held, timed, base + max(needed.values()))
        shelf = shelf_of(prepared.model)
        stages = [_told(Stage.OPEN, Span.about(opening), base)]
        for stage, span in timed.stages.items():
            peak = base + needed.get(stage, 0)
            if shelf is not None:
                peak = min(peak + weight_bytes(prepared.model), shelf.ceiling)
            written = _log_bytes(prepared, timed) if stage is Stage.SOLVER else 0
            stages.append(_told(stage, span, peak, read.get(stage, 0), written))
        return Estimate(
            **summed(stages),
            classes=timed.classes,
            settings=json.loads(json.dumps(request.to_json())),
            calibration=prepared.inputs.settings,
            passes=timed.passes,
            limit_bytes=None if shelf is None else shelf.ceiling,
            least_bytes=None if room is None else least_memory(prepared, request, max(1, held)),
            sample_seconds=timed.sample_seconds,
            kept_share=timed.kept_share,
            probe_seconds=clock() - began - opening,
        )


estimate = by_keywords(PruningRequest, estimate_as_asked)


def of_command(found: Estimate, loaded: LoadedModel, seconds: Mapping[Stage, float]) -> Estimate:
    """Add what the command does besides: it starts, loads, measures both models, and saves.

    Parameters
    ----------
    found
        The estimate of the pruning itself.
    loaded
        The model.
    seconds
        By stage, what starting and loading have taken.
    """
    stored, held = weight_bytes(loaded.model, loaded.stored_dtype), weight_bytes(loaded.model)
    on_disk, kept, one = is_on_disk(loaded.model), found.kept_share, found.sample_seconds
    opened = next(stage for stage in found.stages if stage.stage == Stage.OPEN).peak_bytes
    measuring = 0.0 if on_disk else measuring_seconds([one, kept * one])
    smaller, loading = round(kept * stored), seconds[Stage.LOAD]
    peak = opened if on_disk else opened - held + round(2 * kept * held) + smaller
    saving = Span(0.3 * kept * loading, kept * loading, 4 * kept * loading + 2 * one)
    stages = [
        _told(Stage.START, Span.about(seconds[Stage.START], 0.5)),
        _told(Stage.LOAD, Span.about(loading, 0.5), opened, read=stored),
        _told(Stage.REPORT, Span.about(measuring, 0.3), opened),
        _told(Stage.SAVE, saving, peak, read=smaller, written=smaller),
    ]
    return dataclasses.replace(found, **summed([*found.stages, *stages]))


def _told(
    stage: Stage, span: Span, peak: int = 0, read: int = 0, written: int = 0
) -> StageEstimate:
    high = span.high if math.isfinite(span.high) else None
    return StageEstimate(str(stage), span.seconds, span.low, high, peak, read, written)


# ---- memory and files --------------------------------------------------------------------


def _held_bytes(memory: DeviceMemory) -> int:
    """Return what this process has in memory, or on the card."""
    try:
        return memory.held()
    except OptionError:  # a system that does not tell
        return memory.peak() or 0


def _needed_bytes(
    prepared: Prepared, request: PruningRequest, held: int, room: Room | None, timed: Timed
) -> dict[Stage, int]:
    """Return the bytes of memory that each stage needs beside what is held before."""
    found = Room.of(prepared, request, max(1, held)) if room is None else room
    copies = 0 if is_on_disk(prepared.model) else weight_bytes(prepared.model)
    needed = {
        Stage.TRIAL: 2 * copies + found.proof,
        Stage.DENSE: found.logits,
        Stage.ALLOCATION: found.forward,
        Stage.WALK: found.batches + found.forward,
        Stage.GRAM: found.batches + found.forward + found.sums,
        Stage.DAMPING: found.batches + found.matrices,
        Stage.SOLVER: found.batches + found.matrices,
        Stage.PROOF: round((1 + timed.kept_share) * copies) + found.proof,
        Stage.PRUNED: found.logits,
    }
    if timed.shared:
        factors, largest = _factor_bytes(prepared, timed.shared)
        needed[Stage.CURVATURE] = factors + _saved_bytes(prepared) + found.logits
        needed[Stage.CURVES] = factors + largest
    return needed


def _factor_bytes(prepared: Prepared, groups: Sequence[CouplingGroup]) -> tuple[int, int]:
    """Return the bytes of the factors that are held at once, and of the largest problem of them."""
    held = largest = 0
    apart = held_batches(prepared, small_batches(prepared, curve_samples(prepared)))
    copies = 2 if apart else 1  # one of the samples that are held out
    for part in parts(prepared.model, groups, copies):
        shapes = [one.read_weight().shape for _, maps in part for one in maps]
        held = max(held, sum(4 * copies * (p * p + m * m) for p, m in shapes))
        largest = max(largest, *(8 * (4 * p * p + 2 * m * m) for p, m in shapes))
    return held, largest


def _saved_bytes(prepared: Prepared) -> int:
    """Return the bytes of what a forward pass keeps for the backward pass."""
    [batch, *_] = small_batches(prepared, curve_samples(prepared))
    first = next(iter(batch.values()))
    positions = first.numel() if prepared.inputs.tokens else len(first)
    return 4 * positions * sum(put_out(prepared)[0])


def _read_bytes(
    prepared: Prepared, request: PruningRequest, held: int, timed: Timed, most: int
) -> dict[Stage, int]:
    """Return the bytes of weights on disk that stages read; none if they stay in memory."""
    shelf, weights = shelf_of(prepared.model), weight_bytes(prepared.model)
    if shelf is None or most + weights <= shelf.ceiling:
        return {}
    passes = {
        Stage.TRIAL: 6,
        Stage.DENSE: max(1, held),
        Stage.ALLOCATION: 2 if request.allocation == "fluctuation" else 0,
        Stage.WALK: timed.passes,
        Stage.PROOF: 8,
        Stage.PRUNED: max(1, held),
    }
    return {stage: count * weights for stage, count in passes.items()}


def _log_bytes(prepared: Prepared, timed: Timed) -> int:
    """Return the bytes of refitted weights, which the log of a run keeps."""
    losing = (g for g in prepared.groups if timed.keep.get(g.name, g.units) < g.units)
    maps = (one for group in losing for one in linear_maps(prepared.model, group))
    return sum(one.read_weight().numel() * one.number_format.itemsize for one in maps)
