"""What ``osscar prune`` writes beside the weights about the run, as those who open them read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osscar.core.inputs import read_json

REPORT_FILE = "osscar_report.json"


def read_report(directory: Path | None) -> Mapping[str, Any]:
    """Return what the report in a directory says; nothing where there is none that can be read."""
    if directory is None:
        return {}
    try:
        return read_json(directory / REPORT_FILE)
    except (OSError, ValueError):
        return {}


def calibration_of(directory: Path | None) -> Mapping[str, Any]:
    """Return what the report in a directory says about the calibration data; empty without."""
    calibration = read_report(directory).get("calibration")
    return calibration if isinstance(calibration, Mapping) else {}
