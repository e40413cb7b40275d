"""``osscar.json``: what has to be known of a checkpoint to read it again, in every one we write."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import with_config

from osscar import __version__
from osscar.base.errors import CheckpointError
from osscar.base.files import write_json
from osscar.base.json_files import STRICT, read_json
from osscar.proof.lineage import Lineage

MANIFEST_FILE = "osscar.json"
REPORT_FILE = "osscar_report.json"
"""For people and tools; nothing here reads it."""

PAGE_FILE = "report.html"
"""The same as a page, which is replaced only where `Manifest.files` names it."""

CONFIG_FILE = "config.json"


@with_config(STRICT)
@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    stock: Whether plain transformers reads it.
    files: What else was written into the directory.
    fresh: Whether a new process has read it back, or only the one that wrote it.
    """

    schema: Literal["osscar.checkpoint/3"]
    osscar_version: str
    stock: bool
    files: tuple[str, ...]
    lineage: Lineage
    fresh: bool

    @classmethod
    def of(
        cls, stock: bool, lineage: Lineage, files: tuple[str, ...] = (), *, fresh: bool = True
    ) -> Manifest:
        """Describe a checkpoint that this version writes."""
        return cls("osscar.checkpoint/3", __version__, stock, files, lineage, fresh)

    def write(self, directory: Path) -> None:
        """Write it into a checkpoint's directory."""
        write_json(directory / MANIFEST_FILE, dataclasses.asdict(self), indent=1)


def checkpoint_directory(directory: str | os.PathLike[str]) -> Path:
    """Return the directory of a checkpoint, as far as the names of its files tell."""
    name = os.fspath(directory)
    source = os.path.expanduser(name)
    if any(os.path.isfile(os.path.join(source, one)) for one in (MANIFEST_FILE, CONFIG_FILE)):
        return Path(source).resolve()
    raise CheckpointError(
        f"{name!r} is no directory with a checkpoint; give one that `osscar prune` wrote, or one "
        "of a model of transformers"
    )


def read_manifest(directory: Path) -> Manifest | None:
    """Return what a directory says of its checkpoint; None if we did not write it (FileError)."""
    file = directory / MANIFEST_FILE
    return read_json(file, Manifest) if file.is_file() else None
