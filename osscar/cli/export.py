"""``osscar export``: a checkpoint in the format of another engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from osscar.cli.common import check_files, document, say, write_json
from osscar.cli.opening import quiet
from osscar.cli.options import ExportOptions, refuse
from osscar.export.gguf import export_gguf
from osscar.export.traced import export_onnx, export_pt2
from osscar.models.load import build_from_code

_TRACED = {"onnx": export_onnx, "pt2": export_pt2}
"""Formats of models of any sort, which are traced."""


def run(directory: Path, options: ExportOptions) -> None:
    """Write a model for llama.cpp, ONNX Runtime or torch.export."""
    check_files(options, directory)
    format, dense = options.format, options.dense
    if format == "gguf":
        refuse(options, ("dense", "inputs"), "omit it, as it is for onnx and pt2")
    else:
        refuse(options, ("dtype",), "omit it, as it is for gguf")
    how: dict[str, Any] = {"out": options.out, "overwrite": options.overwrite}
    with quiet():
        if format == "gguf":
            written = export_gguf(directory, dtype=options.dtype or "f16", **how)
        else:
            built, example, _ = (None, None, None) if dense is None else build_from_code(dense)
            given = example if options.inputs is None else options.inputs
            written = _TRACED[format](directory, dense=built, example_inputs=given, **how)
    named = f", {written.dtype}; llama.cpp calls it {written.architecture!r}"
    say(
        f"written: {written.path} ({written.bytes / 1e6:.1f} MB"
        f"{'' if written.dtype is None else named})"
    )
    if written.padding:
        say(
            f"{written.padding} neurons of zeros were added, so that each layer has a multiple of "
            "32 and llama.cpp can quantize it; `osscar prune --set round_to=32` keeps real ones "
            "instead"
        )
    for verb, tensors in (("takes", written.inputs), ("returns", written.outputs)):
        if tensors:
            say(f"it {verb} {', '.join(f'{name} {kind}' for name, kind in tensors.items())}")
    if written.weights is not None:
        say(f"its weights are in {written.weights.name} beside it: move both together")
    content = {"directory": str(directory), "format": format, **dataclasses.asdict(written)}
    paths = {key: str(value) for key, value in content.items() if isinstance(value, Path)}
    write_json(options.json, document("export", 1, {**content, **paths}))
