"""``osscar inspect``: which structures of a model go together, and what may be pruned."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from graph import UnitKind
from osscar.allocation.costs import Cost, count
from osscar.allocation.task import PruningTask
from osscar.base.errors import DataError, OptionError
from osscar.base.files import write_bytes
from osscar.base.printable import are, pluralize
from osscar.cli.common import check_files, document, say, show, write_json
from osscar.cli.opening import quiet, stated_preprocessing
from osscar.cli.options import InspectOptions, refuse
from osscar.data.batches import SAMPLES_AT_ONCE, WINDOWS_AT_ONCE
from osscar.data.samples import SampleList, TensorSet
from osscar.export.open_program import example_for
from osscar.models.load import load_model
from osscar.models.loaded import LoadedModel
from osscar.network.modules import count_parameters
from osscar.preparation.prepare import prepare
from osscar.report.sections import FORMS, file_of, groups_table
from osscar.request import PRUNED_KINDS, PruningRequest
from osscar.run.times_page import ModelTimes


def run(model: str, options: InspectOptions) -> None:
    """Show the coupling groups of a model."""
    stated = stated_preprocessing(options)
    if not options.times:
        refuse(options, ("batch_size", "seqlen", "dtype"), "give --times, too, or omit it")
    check_files(options, model)
    form = "" if options.svg is None else options.svg.suffix
    if options.times and form[1:] not in ("", *FORMS):
        raise OptionError(f"--svg is {str(options.svg)!r}; with --times give .svg, .png or .pdf")
    with quiet():
        loaded = load_model(
            model,
            weights=options.weights,
            pretrained=False,
            dense=options.dense,
            dtype=options.dtype,
            device=options.device if options.times else "cpu",
            trust_remote_code=options.trust_remote_code,
            preprocessing=stated,
        )
        data = _data(loaded, options)
        with prepare(loaded.model, data, copy=False, batch_size=options.batch_size) as prepared:
            groups, residual = prepared.every_group, prepared.residual
            times = None
            if options.times:  # at the widths that a speed-up may give groups
                times = ModelTimes.measured(PruningTask(prepared, PruningRequest(speedup=2.0)))
            cost = count(Cost.PARAMETERS, prepared, prepared.groups)
    shown = [g for g in groups if options.all_groups or g.prunable or g.kind is not UnitKind.OTHER]
    show(groups_table(shown, residual))
    for group in shown:
        for freeze in group.frozen[:1]:
            where = f" ({freeze.operator} in {freeze.module or 'the model'})"
            say(f"frozen: {group.name}: {freeze.reason}{where if freeze.operator else ''}")
    hidden = len(groups) - len(shown)
    if hidden:
        frozen = pluralize(hidden, "frozen group")
        say(f"{frozen} of inputs, outputs and parts of units {are(hidden)} not shown; use --all")
    free = [g for g in groups if g.prunable and g.units > 1]
    streams = {g.name: 0 for g in free if g.name in residual}
    budgeted = {g.name: 0 for g in free if g.kind in PRUNED_KINDS and g.name not in residual}
    total = count_parameters(loaded.model)
    prunable, both = (total - int(cost.of(some)) for some in (budgeted, budgeted | streams))
    beside = both - prunable
    more = f", and another {beside / total:.1%} with residual channels" if beside else ""
    say(f"a budget can prune {prunable / total:.1%} of {total:,} parameters{more}")
    if times is not None:
        show(times.table)
        say(
            f"times: {times.timed}, {1000 * times.dense:,.1f} ms; those of a group are of the "
            "operators that have its units, with all other groups whole, and rise most behind the "
            "widths of the last column"
        )
    if options.svg is not None:
        if times is None:
            prepared.traced.draw(options.svg)
        else:
            write_bytes(options.svg, file_of(times.figure(), form[1:] or "svg"))
        say(f"drawing: {options.svg}")
    content = {
        "model": loaded.source,
        "parameters": total,
        "prunable_parameters": prunable,
        "residual_parameters": beside,
        "groups": [dataclasses.asdict(group) for group in groups],
        "times": None if times is None else dataclasses.asdict(times),
    }
    write_json(options.json, document("inspect", 2, content))


def _data(loaded: LoadedModel, options: InspectOptions) -> Any:
    """Return inputs to prepare a model with: where it is timed, of the form of a batch."""
    example = loaded.example
    if example is None:
        try:
            example = example_for(loaded.model)  # of the size in its config
        except DataError:
            raise OptionError(
                f"the inputs of {loaded.source} are not known: let the code return (model, example "
                "inputs), or give --image-size CxHxW, the channels first, such as 3x32x32"
            ) from None
    if loaded.tokenizer is None:
        refuse(options, ("seqlen",), f"{loaded.source} reads no text; omit it")
    source = f"the example inputs of {loaded.source}"
    lengths = {name: len(tensor) for name, tensor in example.items() if tensor.ndim}
    differ = len(set(lengths.values())) > 1 or len(lengths) < len(example)
    if differ and options.times:
        raise OptionError(
            f"--times takes batches, and {source} differ along the first dimension, as those of a "
            f"graph do ({lengths}); omit it"
        )
    if differ:
        return SampleList(source, [example])
    if not options.times:
        return TensorSet(source, example)
    if loaded.tokenizer is not None:
        windows = options.batch_size or WINDOWS_AT_ONCE
        return torch.zeros(windows, options.seqlen or loaded.window_length, dtype=torch.int64)
    rows = torch.arange(options.batch_size or SAMPLES_AT_ONCE)
    return {name: tensor[rows % len(tensor)] for name, tensor in example.items()}
