"""What a run of ``osscar prune`` will take: told by ``--dry-run``, compared by ``--estimate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import osscar
from osscar.base.devices import resolve_device
from osscar.base.errors import FileError
from osscar.base.json_files import read_json
from osscar.base.memory import in_words
from osscar.base.timing import Stage
from osscar.cli.common import check_input, out, say, write_json
from osscar.data.batches import CalibrationData
from osscar.estimation.estimate import estimate_as_asked, of_command
from osscar.estimation.values import Estimate, EstimateDocument
from osscar.models.loaded import LoadedModel
from osscar.network.modules import number_format
from osscar.report.run_tables import estimate_table, extrapolated
from osscar.request import PruningRequest

_LARGEST = 1 << 24
"""Bytes of an estimate's file."""


def dry_run(
    loaded: LoadedModel,
    data: CalibrationData,
    request: PruningRequest,
    seconds: Mapping[Stage, float],
    json: Path | None,
) -> None:
    """Print what a run will take, and write it as JSON; what came before took `seconds`."""
    found = of_command(estimate_as_asked(loaded.model, data, request), loaded, seconds)
    out.print(estimate_table(found))
    say(extrapolated(found))
    if found.limit_bytes is not None and found.least_bytes is not None:
        say(
            f"memory: the limit of {in_words(found.limit_bytes)} will do; the least that would is "
            f"{in_words(found.least_bytes)}"
        )
    if request.has_budget:
        say("budget: what groups keep is a guess until their curves are measured")
    write_json(json, dataclasses.asdict(document_of(found, loaded, data)))


def where_it_runs(model: nn.Module, device: str) -> dict[str, Any]:
    """Return what the time of a run depends on besides what is asked for."""
    return {
        "device": str(resolve_device(device)),
        "threads": torch.get_num_threads(),
        "dtype": str(number_format(model)).removeprefix("torch."),
    }


def document_of(found: Estimate, loaded: LoadedModel, data: CalibrationData) -> EstimateDocument:
    """Return an estimate as ``docs/json.md`` describes it."""
    own = {one.name: getattr(found, one.name) for one in dataclasses.fields(found)}
    return EstimateDocument(
        **{**own, "calibration": {**found.calibration, **data.describe()}},
        **where_it_runs(loaded.model, found.settings["device"]),
        schema="osscar.estimate/2",
        osscar_version=osscar.__version__,
        model=loaded.source,
    )


def read_estimate(file: Path | None) -> EstimateDocument | None:
    """Read what ``--dry-run --json`` wrote; None where there is none."""
    if file is None:
        return None
    check_input(file)
    try:
        return read_json(file, EstimateDocument, limit=_LARGEST)
    except FileError as error:
        advice = "--estimate takes what --dry-run --json FILE wrote of the same run"
        raise FileError(error.path, f"{error.reason}; {advice}") from error
