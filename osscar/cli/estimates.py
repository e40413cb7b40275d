"""What a run of ``osscar prune`` will take: told by ``--dry-run``, compared by ``--estimate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import osscar
from osscar.base.timing import Stage
from osscar.cli.common import out, say, write_json

if TYPE_CHECKING:
    from torch import nn

    from osscar.data.batches import CalibrationData
    from osscar.estimation.estimate import Estimate, EstimateDocument
    from osscar.estimation.stages import StageEstimate
    from osscar.models.language import LoadedModel
    from osscar.models.vision import VisionModel
    from osscar.request import PruningRequest

_LARGEST = 1 << 24
"""Bytes of an estimate's file."""


def dry_run(
    loaded: LoadedModel | VisionModel,
    data: CalibrationData,
    request: PruningRequest,
    spent: Mapping[Stage, float],
    json: Path | None,
) -> None:
    """Print what a run will take; write nothing but that.

    Parameters
    ----------
    loaded, data
        The model with its calibration data.
    request
        What is asked for.
    spent
        Seconds by phase, of what came before.
    json
        Where to write the same.
    """
    from osscar.base.memory import in_words
    from osscar.estimation.estimate import estimate_as_asked
    from osscar.report.estimate_tables import estimate_table

    found = estimate_as_asked(loaded.model, data, request)
    found = found.with_stages(_around(loaded, found, spent))
    out.print(estimate_table(found))
    if found.limit_bytes is not None and found.least_bytes is not None:
        say(
            f"memory: the limit of {in_words(found.limit_bytes)} will do; the least that would is "
            f"{in_words(found.least_bytes)}"
        )
    if request.has_budget:
        say("budget: what groups keep is a guess until their curves are measured")
    say("what cannot follow is found out by the run alone")
    content = document_of(found, loaded, data)
    write_json(json, dataclasses.asdict(content))


def where_it_runs(model: nn.Module, device: str) -> dict[str, Any]:
    """Return what the time of a run depends on besides what is asked for."""
    import torch

    from osscar.base.devices import resolve_device
    from osscar.network.modules import number_format

    return {
        "device": str(resolve_device(device)),
        "threads": torch.get_num_threads(),
        "dtype": str(number_format(model)).removeprefix("torch."),
    }


def document_of(
    found: Estimate, loaded: LoadedModel | VisionModel, data: CalibrationData
) -> EstimateDocument:
    """Return an estimate as ``docs/json.md`` describes it."""
    from osscar.estimation.estimate import EstimateDocument

    return EstimateDocument(
        schema="osscar.estimate/1",
        osscar_version=osscar.__version__,
        model=loaded.source,
        calibration={**found.calibration, **data.describe()},
        settings=dict(found.settings),
        **where_it_runs(loaded.model, found.settings["device"]),
        stages=found.stages,
        seconds=found.seconds,
        low=found.low,
        high=found.high,
        peak_bytes=found.peak_bytes,
        read_bytes=sum(one.read_bytes for one in found.stages),
        written_bytes=sum(one.written_bytes for one in found.stages),
        passes=found.passes,
        limit_bytes=found.limit_bytes,
        least_bytes=found.least_bytes,
        sample_seconds=found.sample_seconds,
        kept_share=found.kept_share,
        probe_seconds=found.probe_seconds,
    )


def read_estimate(file: Path | None) -> EstimateDocument | None:
    """Read what ``--dry-run --json`` wrote; None where there is none.

    Raises
    ------
    FileError
        If it is no such file.
    """
    from osscar.base.errors import FileError
    from osscar.base.json_files import read_json
    from osscar.cli.common import check_input
    from osscar.estimation.estimate import EstimateDocument

    if file is None:
        return None
    check_input(file)
    try:
        return read_json(file, EstimateDocument, limit=_LARGEST)
    except FileError as error:
        advice = "--estimate takes what --dry-run --json FILE wrote of the same run"
        raise FileError(error.path, f"{error.reason}; {advice}") from error


def _around(
    loaded: LoadedModel | VisionModel, found: Estimate, spent: Mapping[Stage, float]
) -> list[StageEstimate]:
    """Return what the command does besides: it loads, measures both models, and saves."""
    from osscar.checkpoint.directory import weight_bytes
    from osscar.estimation.scaled import Scaled
    from osscar.estimation.stages import StageEstimate
    from osscar.evaluation.forward import measuring_seconds
    from osscar.offload.on_disk import is_on_disk

    stored = weight_bytes(loaded.model, loaded.stored_dtype)
    on_disk, kept = is_on_disk(loaded.model), found.kept_share
    opened = next(one for one in found.stages if one.stage == str(Stage.OPEN)).peak_bytes
    one = found.sample_seconds
    measuring = 0.0 if on_disk else measuring_seconds([one, kept * one])
    smaller = round(kept * stored)
    held = weight_bytes(loaded.model)
    peak = opened if on_disk else opened - held + round(2 * kept * held) + smaller
    loading = spent[Stage.LOAD]
    saving = Scaled(kept * loading, 0.3 * kept * loading, 4 * kept * loading + 2 * one)
    return [
        StageEstimate.of(Stage.START, Scaled.certain(spent[Stage.START], 0.5)),
        StageEstimate.of(Stage.LOAD, Scaled.certain(loading, 0.5), opened, read=stored),
        StageEstimate.of(Stage.REPORT, Scaled.certain(measuring, 0.3), opened),
        StageEstimate.of(Stage.SAVE, saving, peak, read=smaller, written=smaller),
    ]
