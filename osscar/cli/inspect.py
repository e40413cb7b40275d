"""``osscar inspect``: which structures of a model go together, and what may be pruned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from osscar.cli.common import (
    JsonOption,
    TrustOption,
    check_json_path,
    document,
    out,
    quiet,
    write_json,
)


def command(
    model: Annotated[str, typer.Argument(help="Model id, directory, `demo` or `smollm2-135m`.")],
    svg: Annotated[Path | None, typer.Option(help="Draw the groups to this SVG file.")] = None,
    all_groups: Annotated[
        bool, typer.Option("--all", help="Also list frozen groups inside the units of others.")
    ] = False,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show the coupling groups of a model as a table."""
    import torch

    import graph
    from graph.groups import Kind
    from osscar.errors import OutputError
    from osscar.models import load_model
    from osscar.report.tables import groups_table
    from osscar.slicing import context_length

    for path in (json, svg):
        check_json_path(path)
    with quiet():
        loaded = load_model(model, device="cpu", trust_remote_code=trust_remote_code)
        length = min(16, context_length(loaded.model) or 16)
        example = {"input_ids": torch.zeros(2, length, dtype=torch.int64)}
        traced = graph.trace(loaded.model, example)
    shown = [g for g in traced.groups if all_groups or g.prunable or g.kind is not Kind.OTHER]
    out.print(groups_table(shown))
    for group in shown:
        for freeze in group.frozen[:1]:
            where = (
                f"{freeze.operator} in {freeze.module or 'the model'}" if freeze.operator else ""
            )
            out.print(f"frozen: {group.name}: {freeze.reason} {where and f'({where})'}")
    hidden = len(traced.groups) - len(shown)
    if hidden:
        out.print(f"{hidden} frozen groups inside the units of others are not shown; --all does")
    prunable = sum(g.removable * g.units for g in traced.groups if g.prunable)
    total = sum(p.numel() for p in loaded.model.parameters())
    out.print(f"{prunable / total:.1%} of {total:,} parameters lie in prunable groups")
    if svg is not None:
        try:
            out.print(f"drawing: {traced.draw(svg)}")
        except OSError as error:
            raise OutputError(f"cannot write {svg}: {error.strerror}") from error
    content = {
        "model": loaded.source,
        "parameters": total,
        "prunable_parameters": prunable,
        "groups": [dataclasses.asdict(group) for group in traced.groups],
    }
    write_json(json, document("inspect", 1, content))
