"""``osscar inspect``: which structures of a model go together, and what may be pruned."""

from __future__ import annotations

import dataclasses

from graph import UnitKind
from osscar.base.errors import OptionError
from osscar.base.printable import are, pluralize
from osscar.cli.common import check_files, document, say, show, write_json
from osscar.cli.opening import quiet, stated_preprocessing
from osscar.cli.options import InspectOptions
from osscar.evaluation.size import count_owned
from osscar.models.load import load_model
from osscar.network.modules import count_parameters
from osscar.preparation.prepare import prepare
from osscar.report.run_tables import groups_table
from osscar.request import PRUNED_KINDS


def run(model: str, options: InspectOptions) -> None:
    """Show the coupling groups of a model."""
    stated = stated_preprocessing(options)
    check_files(options, model)
    with quiet():
        loaded = load_model(
            model,
            weights=options.weights,
            pretrained=False,
            dense=options.dense,
            device="cpu",
            trust_remote_code=options.trust_remote_code,
            preprocessing=stated,
        )
        if loaded.example is None:
            raise OptionError(
                f"nothing tells what {loaded.source} reads: let the code return (model, example "
                "inputs), or give --image-size CxHxW, the channels first, such as 3x32x32"
            )
        with prepare(loaded.model, loaded.example, copy=False) as prepared:
            groups, residual = prepared.every_group, prepared.residual
    shown = [g for g in groups if options.all_groups or g.prunable or g.kind is not UnitKind.OTHER]
    show(groups_table(shown, residual))
    for group in shown:
        for freeze in group.frozen[:1]:
            where = (
                f"{freeze.operator} in {freeze.module or 'the model'}" if freeze.operator else ""
            )
            say(f"frozen: {group.name}: {freeze.reason} {where and f'({where})'}")
    hidden = len(groups) - len(shown)
    if hidden:
        frozen = pluralize(hidden, "frozen group")
        say(f"{frozen} of inputs, outputs and parts of units {are(hidden)} not shown; use --all")
    shared = [group for group in groups if group.kind in PRUNED_KINDS and group.units > 1]
    budgeted = [group for group in shared if group.name not in residual]
    prunable, total = count_owned(loaded.model, budgeted), count_parameters(loaded.model)
    streams = [group for group in groups if group.name in residual]
    beside = count_owned(loaded.model, [*budgeted, *streams]) - prunable
    more = f", and another {beside / total:.1%} with residual channels" if beside else ""
    say(f"a budget can prune {prunable / total:.1%} of {total:,} parameters{more}")
    if options.svg is not None:
        say(f"drawing: {prepared.traced.draw(options.svg)}")
    content = {
        "model": loaded.source,
        "parameters": total,
        "prunable_parameters": prunable,
        "residual_parameters": beside,
        "groups": [dataclasses.asdict(group) for group in groups],
    }
    write_json(options.json, document("inspect", 1, content))
