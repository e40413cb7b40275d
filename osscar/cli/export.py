"""``osscar export``: a checkpoint in the format of another engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from osscar.base.errors import OptionError
from osscar.base.printable import pluralize
from osscar.cli.common import check_files, document, say, write_json
from osscar.cli.opening import quiet
from osscar.cli.options import ExportOptions
from osscar.export.gguf import Exported, export_gguf
from osscar.export.onnx import ExportedOnnx, export_onnx
from osscar.export.pt2 import ExportedArchive, export_pt2
from osscar.models import user_code

_Traced: TypeAlias = ExportedOnnx | ExportedArchive

_TRACED: dict[str, Callable[..., _Traced]] = {"onnx": export_onnx, "pt2": export_pt2}
"""Formats of models of any sort, which are traced."""


def run(directory: Path, options: ExportOptions) -> None:
    """Write a model for llama.cpp, ONNX Runtime or torch.export."""
    check_files(options, directory)
    format, out, overwrite = options.format, options.out, options.overwrite
    dense, inputs, dtype = options.dense, options.inputs, options.dtype
    if format != "gguf" and format not in _TRACED:
        raise OptionError(f"--format is {format!r:.60}; give gguf, onnx or pt2")
    written: Exported | _Traced
    if format == "gguf":
        for option, given in (("--dense", dense), ("--inputs", inputs)):
            if given is not None:
                raise OptionError(f"{option} is for onnx and pt2; omit it")
        with quiet():
            written = export_gguf(directory, out, dtype=dtype or "f16", overwrite=overwrite)
        how = [f"{written.dtype}; llama.cpp calls it {written.architecture!r}"]
    else:
        if dtype is not None:
            raise OptionError("--dtype is for gguf; omit it")
        with quiet():
            built, example, _ = (None,) * 3 if dense is None else user_code.build(dense)
            written = _TRACED[format](
                directory,
                out,
                dense=built,
                example_inputs=example if inputs is None else inputs,
                overwrite=overwrite,
            )
        how = []
    say(f"written: {written.path} ({', '.join([f'{written.bytes / 1e6:.1f} MB', *how])})")
    if isinstance(written, Exported) and written.padding:
        say(
            f"{written.padding} neurons of zeros were added, so that each layer has a multiple of "
            "32 and llama.cpp can quantize it; `osscar prune --round-to 32` keeps real ones instead"
        )
    if isinstance(written, ExportedOnnx):
        for verb, tensors in (("takes", written.inputs), ("returns", written.outputs)):
            told = ", ".join(f"{name} {tensor}" for name, tensor in tensors.items())
            say(f"it {verb} {told}")
        if written.unaligned_convolutions:
            which = pluralize(written.unaligned_convolutions, "convolution")
            say(
                f"{which} with a number of filters that is no multiple of 4: ONNX Runtime is "
                "slower at these on CPUs; `osscar prune --round-to 4` leaves none"
            )
        if written.weights is not None:
            say(f"its weights are in {written.weights.name} beside it: move both together")
    content = {"directory": str(directory), "format": format, **dataclasses.asdict(written)}
    paths = {key: str(value) for key, value in content.items() if isinstance(value, Path)}
    write_json(options.json, document("export", 1, {**content, **paths}))
