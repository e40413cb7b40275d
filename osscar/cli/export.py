"""``osscar export``: a checkpoint in the format of another engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from osscar.cli.common import (
    JsonOption,
    check_json_path,
    document,
    quiet,
    say,
    write_json,
)

_FORMATS = ("gguf", "pt2")


def command(
    directory: Annotated[
        Path, typer.Argument(help="A checkpoint: for gguf of a language model, with its tokenizer.")
    ],
    format: Annotated[
        str, typer.Option(help="gguf, of llama.cpp, or pt2, of torch.export.")
    ] = "gguf",
    out: Annotated[
        Path | None,
        typer.Option(help="The file; by default beside the directory, such as smaller-f16.gguf."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of the matrices in gguf: f32, f16 or bf16.")
    ] = "f16",
    against: Annotated[
        str | None,
        typer.Option(
            help="For pt2: code that builds the dense model, where the directory holds a pruned "
            "model of your own code."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file of that format.")] = False,
    json: JsonOption = None,
) -> None:
    """Write a model for llama.cpp, whatever the widths of its layers, or for torch.export.

    To gguf models of the LLaMA graph are written: LLaMA, Mistral, SmolLM2, Qwen2; to pt2 those
    whose exported program was pruned (--form graph). The file is read back and compared with the
    model before it takes its place.
    """
    from osscar.base.errors import OptionError
    from osscar.export.gguf import export_gguf

    check_json_path(json, inputs=(directory,), written=(out,))
    if format not in _FORMATS:
        raise OptionError(f"--format is {format!r:.60}; give {' or '.join(_FORMATS)}")
    if format == "pt2":
        from osscar.export.pt2 import export_pt2
        from osscar.models import user_code

        with quiet():
            dense = None if against is None else user_code.build(against)[0]
            archive = export_pt2(directory, out, dense=dense, overwrite=overwrite)
        say(f"written: {archive.path} ({archive.bytes / 1e6:.1f} MB)")
        content = {"directory": str(directory), "format": format, **dataclasses.asdict(archive)}
        write_json(json, document("export", 1, {**content, "path": str(archive.path)}))
        return
    if against is not None:
        raise OptionError("--against is for pt2 and models of your own code; leave it away")
    with quiet():
        written = export_gguf(directory, out, dtype=dtype, overwrite=overwrite)
    say(
        f"written: {written.path} ({written.bytes / 1e6:.1f} MB, {written.dtype}; llama.cpp calls "
        f"it {written.architecture!r})"
    )
    content = {"directory": str(directory), "format": format, **dataclasses.asdict(written)}
    write_json(json, document("export", 1, {**content, "path": str(written.path)}))
