"""``osscar.json``: what has to be known of a checkpoint to read it again, in every one we write.

Directories of version 0.1.0 have none; what theirs would say lies in ``osscar_plan.json``, and in
the report of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from osscar.base.errors import CheckpointError, FileError
from osscar.base.files import write_json
from osscar.base.json_files import MEGABYTE, STRICT, read_json
from osscar.base.version import VERSION
from osscar.shrinking.lineage import Calibration, Lineage, Origin
from osscar.shrinking.plan import PruningPlan

MANIFEST_FILE = "osscar.json"
REPORT_FILE = "osscar_report.json"
"""For people and tools; nothing here reads it, but in directories of version 0.1.0."""

PAGE_FILE = "report.html"
"""The same as a page, which is replaced only where `Manifest.files` names it."""

OLD_PLAN_FILE = "osscar_plan.json"
CONFIG_FILE = "config.json"

_LONGEST = 512 * MEGABYTE
"""A plan of a million units takes ten."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Parameters
    ----------
    osscar_version
        That wrote it.
    stock
        Whether plain transformers reads it.
    files
        What else was written into the directory.
    lineage
        Of the model.
    schema
        Of the file.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.checkpoint/2"]
    osscar_version: str
    stock: bool
    files: tuple[str, ...]
    lineage: Lineage

    @classmethod
    def of(cls, stock: bool, lineage: Lineage, files: tuple[str, ...] = ()) -> Manifest:
        """Describe a checkpoint that this version writes."""
        return cls("osscar.checkpoint/2", VERSION, stock, files, lineage)

    def write(self, directory: Path) -> None:
        """Write it into a checkpoint's directory.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        write_json(directory / MANIFEST_FILE, dataclasses.asdict(self), indent=1)


def is_checkpoint(directory: Path) -> bool:
    """Tell whether a directory holds a checkpoint, as far as the names of its files tell."""
    names = (MANIFEST_FILE, OLD_PLAN_FILE, CONFIG_FILE)
    return any((directory / name).is_file() for name in names)


def read_manifest(directory: Path) -> Manifest | None:
    """Return what a directory says of its checkpoint; None if we did not write it.

    Raises
    ------
    CheckpointError
        If what it says cannot be read, or makes no sense.
    """
    file = directory / MANIFEST_FILE
    try:
        if file.is_file():
            return read_json(file, Manifest, limit=_LONGEST)
        return _read_old(directory)
    except FileError as error:
        raise CheckpointError(
            f"{error.path} is not the description of a checkpoint that this version of OSSCAR "
            f"reads: {error.reason}"
        ) from error


# ---- version 0.1.0 -----------------------------------------------------------------------

_TRANSFORMERS = Origin("transformers")
_LENIENT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True)
class _OldPlan:
    """``osscar_plan.json``; the first of them named no origin, and were all of transformers."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: Literal["osscar-plan/1"]
    plans: tuple[PruningPlan, ...]
    origin: Origin | None = _TRANSFORMERS


@dataclass(frozen=True)
class _OldCalibration:
    source: str
    sha256: str = ""
    images: tuple[str, ...] = ()
    samples: int | None = None
    seqlen: int | None = None
    seed: int | None = None
    preprocessing: Mapping[str, int | float | str | tuple[int | float, ...]] | None = None

    def known(self) -> Calibration:
        fields: dict[str, Any] = {**vars(self)}
        del fields["preprocessing"]
        return Calibration(**fields)


@dataclass(frozen=True)
class _OldReport:
    __pydantic_config__: ClassVar[ConfigDict] = _LENIENT

    schema: Literal["osscar.prune/1"]
    calibration: _OldCalibration
    model: str = ""
    classes: tuple[str, ...] = ()


def _read_old(directory: Path) -> Manifest | None:
    plan = None
    if (directory / OLD_PLAN_FILE).is_file():
        plan = read_json(directory / OLD_PLAN_FILE, _OldPlan, limit=_LONGEST)
    lineage = Lineage() if plan is None else Lineage(plans=plan.plans, origin=plan.origin)
    try:
        report = read_json(directory / REPORT_FILE, _OldReport)
    except FileError:  # none, or not of ours
        return None if plan is None else Manifest.of(False, lineage)
    lineage = dataclasses.replace(
        lineage,
        source=report.model,
        classes=report.classes,
        preprocessing=report.calibration.preprocessing,
        calibration=(report.calibration.known(),),
    )
    return Manifest.of(plan is None, lineage)
