"""``osscar inspect``: which structures of a model go together, and what may be pruned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from osscar.base.printable import are, counted
from osscar.cli.common import (
    ImageSizeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    check_json_path,
    document,
    out,
    quiet,
    say,
    stated_preprocessing,
    write_json,
)


def command(
    model: ModelArgument,
    svg: Annotated[Path | None, typer.Option(help="Draw the groups to this SVG file.")] = None,
    all_groups: Annotated[
        bool, typer.Option("--all", help="Also list frozen groups inside the units of others.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Code that builds the dense model, where MODEL is a directory that holds a pruned "
            "model of your own code."
        ),
    ] = None,
    image_size: ImageSizeOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show the coupling groups of a model as a table."""
    from graph.groups import UnitKind
    from osscar.base.errors import OptionError
    from osscar.evaluation.size import count_owned
    from osscar.models.load import load_model
    from osscar.network.modules import count_parameters
    from osscar.preparation.opened import opened
    from osscar.report.run_tables import groups_table

    stated = stated_preprocessing(None, None, image_size, False)
    check_json_path(json, inputs=(model,))
    check_json_path(svg, inputs=(model,), written=(json,), option="--svg")
    with quiet():
        loaded = load_model(
            model,
            pretrained=False,
            dense=against,
            device="cpu",
            trust_remote_code=trust_remote_code,
            preprocessing=stated,
        )
        if loaded.example is None:
            raise OptionError(
                f"nothing tells what {loaded.source} reads: let the code return (model, example "
                "inputs), or give --image-size CxHxW, such as 3x32x32"
            )
        with opened(loaded.model, loaded.example, copy=False) as ready:
            groups, residual = ready.groups, ready.residual
    shown = [g for g in groups if all_groups or g.prunable or g.kind is not UnitKind.OTHER]
    out.print(groups_table(shown, residual))
    for group in shown:
        for freeze in group.frozen[:1]:
            where = (
                f"{freeze.operator} in {freeze.module or 'the model'}" if freeze.operator else ""
            )
            say(f"frozen: {group.name}: {freeze.reason} {where and f'({where})'}")
    hidden = len(groups) - len(shown)
    if hidden:
        frozen = counted(hidden, "frozen group")
        say(f"{frozen} inside the units of others {are(hidden)} not shown; --all does")
    prunable, total = count_owned(loaded.model, groups), count_parameters(loaded.model)
    say(f"{prunable / total:.1%} of {total:,} parameters lie in prunable groups")
    if svg is not None:
        say(f"drawing: {ready.traced.draw(svg)}")
    content = {
        "model": loaded.source,
        "parameters": total,
        "prunable_parameters": prunable,
        "groups": [dataclasses.asdict(group) for group in groups],
    }
    write_json(json, document("inspect", 1, content))
