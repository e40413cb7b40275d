"""``osscar recover``: a pruned model, trained towards its dense one, on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osscar.base.files import resolved
from osscar.base.json_files import read_json
from osscar.base.printable import published
from osscar.base.ranks import together
from osscar.checkpoint.builders import builder_of
from osscar.checkpoint.directory import SavedCheckpoint, save
from osscar.checkpoint.files import PAGE_FILE, REPORT_FILE, checkpoint_directory
from osscar.cli.common import check_files, document, out, say, show
from osscar.cli.opening import (
    beside,
    check_room,
    saved_line,
    saving,
    stated_preprocessing,
    tell_data,
    write_copy,
)
from osscar.cli.options import RecoverOptions, request_of
from osscar.data.batches import CalibrationData
from osscar.models.load import load_model
from osscar.models.loaded import LoadedModel
from osscar.models.names import ModelKind, kind_of
from osscar.network.modules import count_parameters
from osscar.proof.lineage import Computed
from osscar.recovery.page import recover_page, recovery_facts, recovery_table
from osscar.recovery.recover import Recovery, recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import samples_for
from osscar.recovery.training import RecoveryLog
from osscar.report.sections import facts

LOG = "recover"
"""Ends the name of the directory that holds the log of a recovery."""


def run(directory: Path, options: RecoverOptions) -> None:
    """Recover a pruned model."""
    with together() as ranks:
        request = request_of(options, RecoveryRequest)
        place = checkpoint_directory(directory)
        where = options.out
        if where is None:
            named = directory if directory.name not in ("", "..") else place
            where = named.with_name(f"{named.name}-recovered")
        check_files(options, directory, where)
        used = [] if resolved(where) == place else [place]  # where that is replaced by itself
        log = RecoveryLog(beside(where, LOG))
        with saving(options, where, used, ranks, [log]) as overwrite:
            report, before = place / REPORT_FILE, None
            if report.is_file():  # whatever is in it
                before = read_json(report, dict[str, Any])
            smaller, dense, data = _opened(place, options, request)
            if ranks.first:
                check_room(smaller, where, overwrite)
            tell_data("recovery", smaller, data, always=True)
            noted = log if ranks.first else None
            recovery = recover_as_asked(
                smaller.model, dense.model, data, request, noted, ranks, say
            )
            if ranks.first:
                names = {"model": published(str(directory)), "dense": published(dense.source)}
                content, saved = _saved(recovery, names, before, smaller, options, where, overwrite)
        if ranks.first:
            tell_recovery(content["recovery"])
            out.print(saved_line(saved, where))
            say(f"report: {where / PAGE_FILE}")


def _opened(
    place: Path, options: RecoverOptions, request: RecoveryRequest
) -> tuple[LoadedModel, LoadedModel, CalibrationData]:
    """Open both models, and draw what trains the smaller one."""
    how: dict[str, Any] = {"device": request.device, "dtype": options.dtype}
    how["trust_remote_code"] = options.trust_remote_code
    dense = load_model(options.dense, weights=options.weights, **how)
    # Second: classes of a file can be pickled only as they were loaded last.
    smaller = load_model(
        str(place),
        dense=options.dense if kind_of(place) is ModelKind.CODE_DIRECTORY else None,
        preprocessing=stated_preprocessing(options),
        **how,
    )
    data = smaller.training(
        text=options.text,
        images=options.images,
        inputs=options.inputs,
        windows=samples_for(request, windows=True),
        samples=options.samples,
        seqlen=options.seqlen,
        seed=request.seed,
    )
    return smaller, dense, data


def _saved(
    recovery: Recovery,
    names: Mapping[str, str],
    before: dict[str, Any] | None,
    smaller: LoadedModel,
    options: RecoverOptions,
    where: Path,
    overwrite: bool,
) -> tuple[dict[str, Any], SavedCheckpoint]:
    """Save the recovered model with its report, and return both."""
    model, path = recovery.model, resolved(where)
    content = {
        **names,
        "computed": dataclasses.asdict(Computed.of(model)),
        "parameters": count_parameters(model),
        "own_code": builder_of(model) is None,
        "recovery": recovery.document(),
        "before": before,
    }
    content = document("recover", 2, content)
    page, tokenizer = recover_page(content, path.name), smaller.companion
    saved = save(model, path, tokenizer=tokenizer, report=content, page=page, overwrite=overwrite)
    write_copy(options, content, saved)
    return content, saved


def tell_recovery(recovery: Mapping[str, Any]) -> None:
    """Print what a recovery came to."""
    show(recovery_table(recovery), facts("", recovery_facts(recovery)))
