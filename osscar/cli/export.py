"""``osscar export``: a checkpoint in the format of another engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from osscar.base.errors import OptionError
from osscar.cli.common import check_json_path, document, say, write_json
from osscar.cli.opening import quiet
from osscar.export.gguf import Exported, export_gguf
from osscar.export.pt2 import ExportedArchive, export_pt2
from osscar.models import user_code


def run(
    directory: Path,
    format: str,
    out: Path | None,
    dtype: str,
    against: str | None,
    overwrite: bool,
    json: Path | None,
) -> None:
    """Write a model for llama.cpp or torch.export."""
    check_json_path(json, inputs=(directory,), written=(out,))
    if format not in ("gguf", "pt2"):
        raise OptionError(f"--format is {format!r:.60}; give gguf or pt2")
    if format == "gguf" and against is not None:
        raise OptionError("--against is for pt2 and models of your own code; leave it away")
    written: Exported | ExportedArchive
    with quiet():
        if format == "pt2":
            dense = None if against is None else user_code.build(against)[0]
            written = export_pt2(directory, out, dense=dense, overwrite=overwrite)
        else:
            written = export_gguf(directory, out, dtype=dtype, overwrite=overwrite)
    how = ""
    if isinstance(written, Exported):
        how = f", {written.dtype}; llama.cpp calls it {written.architecture!r}"
    say(f"written: {written.path} ({written.bytes / 1e6:.1f} MB{how})")
    content = {"directory": str(directory), "format": format, **dataclasses.asdict(written)}
    write_json(json, document("export", 1, {**content, "path": str(written.path)}))
