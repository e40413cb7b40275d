"""What a pruning run will take, told before it begins: seconds, memory and disk, stage by stage.

The model is opened as the run opens it, and the stations of the run are timed on little of it
(`osscar.estimation.stations`).  Memory and files are counted.  Nothing is written, and the model is
not changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graph import CouplingGroup
from osscar.allocation.curvature import held_batches, parts, small_batches
from osscar.allocation.curves import curve_samples
from osscar.base.devices import clock_of, resolve_device
from osscar.base.errors import OptionError, RequestError
from osscar.base.timing import Clock, Stage
from osscar.checkpoint.directory import weight_bytes
from osscar.data.loaders import read_once
from osscar.estimation.stations import Timed, timed_stations
from osscar.estimation.values import Estimate, Span
from osscar.evaluation.forward import measuring_seconds
from osscar.models.loaded import LoadedModel
from osscar.network.modules import device_of
from osscar.offload.device_memory import DeviceMemory, memory_of
from osscar.offload.on_disk import is_on_disk, weight_cache
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
    NonFiniteError, DataError, ModelError, graph.GraphError
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
    if request.experts is not None:
        raise RequestError(
            "what it takes to prune whole experts is not estimated; on a few samples, prune itself "
            "tells"
        )
    calibration = read_once(model, calibration)
    clock = clock_of(resolve_device(request.device)) if clock is None else clock
    began = clock()
    with prepare_for(model, calibration, request) as prepared:
        opening = clock() - began
        held = held_out(prepared, request)
        room = check_streamed(prepared, request, max(1, held))
        base = _held_bytes(memory_of(device_of(prepared.model)))
        timed = timed_stations(prepared, request, held, room, clock)
        cache, weights = weight_cache(prepared.model), weight_bytes(prepared.model)
        peak = base + _needed_bytes(prepared, request, held, room, timed)
        read = 0
        if cache is not None:
            if peak + weights > cache.ceiling:  # else the weights stay in memory
                read = weights * _passes(held, timed)
            peak = min(peak + weights, cache.ceiling)
        return Estimate(
            stages=_ordered({Stage.OPEN: Span.about(opening), **timed.stages}),
            peak_bytes=peak,
            read_bytes=read,
            written_bytes=_log_bytes(prepared, timed),
            classes=timed.classes,
            settings=json.loads(json.dumps(request.to_json())),
            calibration=prepared.inputs.settings,
            passes=timed.passes,
            limit_bytes=None if cache is None else cache.ceiling,
            least_bytes=None if room is None else least_memory(prepared.model, room),
            sample_seconds=timed.sample_seconds,
            kept_share=timed.kept_share,
            probe_seconds=clock() - began - opening,
        )


estimate = by_keywords(PruningRequest, estimate_as_asked)


def of_command(found: Estimate, loaded: LoadedModel, seconds: Mapping[Stage, float]) -> Estimate:
    """Add what the command does besides: it starts, loads, measures both models, and saves.

    To save takes less memory than the trial: a copy of the smaller model, and what is written.
    """
    stored = weight_bytes(loaded.model, loaded.stored_dtype)
    kept, one = found.kept_share, found.sample_seconds
    measuring = 0.0 if is_on_disk(loaded.model) else measuring_seconds([one, kept * one])
    smaller, loading = round(kept * stored), seconds[Stage.LOAD]
    stages = {
        **found.stages,
        Stage.START: Span.about(seconds[Stage.START], 0.5),
        Stage.LOAD: Span.about(loading, 0.5),
        Stage.REPORT: Span.about(measuring, 0.3),
        Stage.SAVE: Span(0.3 * kept * loading, kept * loading, 4 * kept * loading + 2 * one),
    }
    return dataclasses.replace(
        found,
        stages=_ordered(stages),
        read_bytes=found.read_bytes + stored + smaller,
        written_bytes=found.written_bytes + smaller,
    )


def _ordered(stages: Mapping[Stage, Span]) -> dict[Stage, Span]:
    return {stage: stages[stage] for stage in Stage if stage in stages}


# ---- memory and files --------------------------------------------------------------------


def _held_bytes(memory: DeviceMemory) -> int:
    """Return what this process has in memory, or on the card."""
    try:
        return memory.held()
    except OptionError:  # a system that does not tell
        return memory.peak() or 0


def _needed_bytes(
    prepared: Prepared, request: PruningRequest, held: int, room: Room | None, timed: Timed
) -> int:
    """Return the most bytes of memory that a stage needs beside what is held before."""
    found = Room.of(prepared, request, max(1, held)) if room is None else room
    copies = 0 if is_on_disk(prepared.model) else weight_bytes(prepared.model)
    stages = [
        2 * copies + found.proof,  # the trial; the proof holds a smaller model
        found.batches + found.forward + found.sums,
        found.batches + found.matrices,
        found.logits,
    ]
    if timed.shared:
        factors, largest = _factor_bytes(prepared, timed.shared)
        stages += [factors + _saved_bytes(prepared) + found.logits, factors + largest]
    return max(stages)


def _factor_bytes(prepared: Prepared, groups: Sequence[CouplingGroup]) -> tuple[int, int]:
    """Return the bytes of the factors that are held at once, and of the largest problem of them."""
    held = largest = 0
    apart = held_batches(prepared, small_batches(prepared, curve_samples(prepared)))
    copies = 2 if apart else 1  # one of the samples that are held out
    for part in parts(prepared, groups, copies):
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


def _passes(held: int, timed: Timed) -> int:
    """Return how often a run reads the weights on disk: trial, proof, both models, and the walk."""
    return 6 + 8 + 2 * max(1, held) + timed.passes


def _log_bytes(prepared: Prepared, timed: Timed) -> int:
    """Return the bytes of refitted weights, which the log of a run keeps."""
    losing = (g for g in prepared.groups if timed.keep.get(g.name, g.units) < g.units)
    maps = (one for group in losing for one in prepared.linear_maps(group))
    return sum(one.read_weight().numel() * one.number_format.itemsize for one in maps)
