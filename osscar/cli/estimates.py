"""What a run of ``osscar prune`` will take: told by ``--dry-run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from osscar.base.devices import resolve_device
from osscar.base.timing import Stage
from osscar.cli.common import document, show, write_json
from osscar.data.batches import CalibrationData, as_inputs
from osscar.models.loaded import LoadedModel
from osscar.network.modules import number_format
from osscar.request import PruningRequest
from osscar.run.dry_run import estimate_as_asked


def dry_run(
    loaded: LoadedModel,
    data: CalibrationData,
    request: PruningRequest,
    seconds: Mapping[Stage, float],
    json: Path | None,
) -> None:
    """Print what a run will take, and write it as JSON; what came before took `seconds`."""
    found = estimate_as_asked(loaded.model, data, request)
    before = {stage: seconds[stage] for stage in (Stage.START, Stage.LOAD)}
    found = dataclasses.replace(found, stages={**before, **found.stages})
    show(*found.sections())
    content = {
        "model": loaded.source,
        "device": str(resolve_device(request.device)),
        "threads": torch.get_num_threads(),
        "dtype": str(number_format(loaded.model)).removeprefix("torch."),
        **dataclasses.asdict(found),
        "seconds": found.seconds,
        "stages": [
            {"stage": str(stage), "seconds": taken} for stage, taken in found.stages.items()
        ],
        "settings": request.to_json(),
        "calibration": {**as_inputs(loaded.model, data).settings, **data.describe()},
    }
    write_json(json, document("estimate", 5, content))
