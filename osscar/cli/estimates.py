"""What a run of ``osscar prune`` will take: told by ``--dry-run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from osscar.base.devices import resolve_device
from osscar.base.memory import in_words
from osscar.base.timing import Stage
from osscar.cli.common import document, say, show, write_json
from osscar.data.batches import CalibrationData
from osscar.models.loaded import LoadedModel
from osscar.network.modules import number_format
from osscar.request import PruningRequest
from osscar.run.dry_run import estimate_as_asked, of_command


def dry_run(
    loaded: LoadedModel,
    data: CalibrationData,
    request: PruningRequest,
    seconds: Mapping[Stage, float],
    json: Path | None,
) -> None:
    """Print what a run will take, and write it as JSON; what came before took `seconds`."""
    found = of_command(estimate_as_asked(loaded.model, data, request), loaded, seconds)
    show(*found.sections())
    if found.limit_bytes is not None and found.least_bytes is not None:
        say(
            f"memory: the limit of {in_words(found.limit_bytes)} will do; the least that would is "
            f"{in_words(found.least_bytes)}"
        )
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
        "calibration": {**found.calibration, **data.describe()},
    }
    write_json(json, document("estimate", 4, content))
