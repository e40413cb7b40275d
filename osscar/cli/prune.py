"""``osscar prune`` and ``osscar sweep``: from a model to smaller ones on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osscar.base.errors import OptionError
from osscar.base.files import resolved
from osscar.base.inputs import named_from
from osscar.base.ranks import together
from osscar.base.timing import Stage, timed
from osscar.checkpoint.directory import SavedCheckpoint, renew_report
from osscar.checkpoint.files import PAGE_FILE
from osscar.cli.commands import asked_points
from osscar.cli.common import check_files, out, say, say_verdict, show, way_back, write_json
from osscar.cli.opening import (
    beside,
    calibration,
    check_room,
    held_out,
    limit_of,
    opened,
    quiet,
    saved_line,
    saving,
    write_copy,
)
from osscar.cli.options import PruneOptions, SweepOptions, recovery_of, request_of
from osscar.cli.recover import LOG, tell_recovery
from osscar.data.batches import CalibrationData, as_inputs
from osscar.data.loaders import DEFAULT_SAMPLES, DEFAULT_WINDOWS
from osscar.data.text import CalibrationSet
from osscar.models.loaded import LoadedModel
from osscar.offload.on_disk import is_on_disk
from osscar.recovery.recover import Recovery, recover_as_asked
from osscar.recovery.samples import split
from osscar.recovery.training import RecoveryLog
from osscar.report.sections import facts, skipped_table
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from osscar.run.prune_page import layers_table, prune_page, run_facts, verdict
from osscar.run.result import PruningResult, measured
from osscar.run.run_log import RunLog
from osscar.run.sweep import Sweep, SweepDirectory
from osscar.run.sweep_page import sweep_table
from osscar.run.target import check_samples, prune_to_target, usual_draw


def run(model: str, options: PruneOptions) -> None:
    """Prune a model into a directory."""
    with together() as ranks:
        check_files(options, model)
        request = request_of(options, PruningRequest)
        if request.quality is not None and options.samples is not None:
            check_samples(request.quality, options.samples, options.samples)
        recovery, where = recovery_of(options, request), options.out
        log, training = RunLog(beside(where, "run")), RecoveryLog(beside(where, LOG))
        logs = (log, training) if options.recover else (log,)
        with saving(options, where, [model], ranks, logs) as overwrite:
            loaded, data = _opened(model, options, request, overwrite if ranks.first else None)
            dense = loaded.model
            if recovery is not None:
                split(as_inputs(dense, data), recovery)  # refuses too few

            def recovered(pruned: PruningResult, part: Any, attempt: int = 0) -> Recovery:
                assert recovery is not None
                own = RecoveryLog(log.attempt(attempt).directory / "recovery")
                known = (own if attempt else training) if ranks.first else None
                return recover_as_asked(pruned, dense, part, recovery, known, ranks, say)

            given = dense, data, request, log if ranks.first else None, ranks, say
            found: Recovery | None = None
            if request.quality is None:
                result = prune_as_asked(*given)
                if recovery is not None:
                    found = recovered(result, data)
                    result = dataclasses.replace(result, model=found.model)
            else:
                again = None if recovery is None else recovered
                result, found = prune_to_target(*given, again)
            if ranks.first:
                content, saved = _saved(result, found, loaded, data, options, overwrite)
        if ranks.first:
            _tell(content, saved, where)


_SHORTEST = 64
"""Tokens of a window at least, where a short text is cut into as many as a target takes."""


def _opened(
    model: str, options: PruneOptions, request: PruningRequest, overwrite: bool | None
) -> tuple[LoadedModel, CalibrationData]:
    """Open the model, and draw its data; check the room for it unless `overwrite` is None."""
    limit = limit_of(model, options, request)
    with timed(Stage.LOAD):
        loaded = opened(model, options, device=request.device, max_memory=limit)
        if options.recover and is_on_disk(loaded.model):
            raise OptionError(
                "--recover needs the weights in memory, and --max-memory keeps them on disk; "
                "omit one of them"
            )
        if overwrite is not None:
            check_room(loaded, options.out, overwrite)
        return loaded, calibration(
            loaded, options, request.seed, **_drawn(loaded, options, request)
        )


def _drawn(loaded: LoadedModel, options: PruneOptions, request: PruningRequest) -> dict[str, Any]:
    """Return how the samples of a quality target are drawn; of a short text, shorter windows."""
    if request.quality is None:
        return {}
    usual = DEFAULT_SAMPLES if loaded.tokenizer is None else DEFAULT_WINDOWS
    most = max(2 * usual, usual_draw(request.quality))
    samples = most if options.samples is None else options.samples
    asked: dict[str, Any] = {"samples": samples, "overlapping": False}
    if loaded.tokenizer is None or options.seqlen is not None:
        return asked
    found = loaded.calibration(options.calibration, seed=request.seed, **asked)
    assert isinstance(found, CalibrationSet)
    length = found.tokens.numel() // samples
    short = len(found.tokens) < samples and length >= _SHORTEST
    return {**asked, "seqlen": length} if short else asked


def _saved(
    result: PruningResult,
    recovery: Recovery | None,
    loaded: LoadedModel,
    data: CalibrationData,
    options: PruneOptions,
    overwrite: bool,
) -> tuple[dict[str, Any], SavedCheckpoint]:
    """Save the smaller model with its report, and return both."""
    content = result.document(
        loaded.model, data, source=loaded.source, recovery=recovery,
        measure=False,
    )  # fmt: skip
    with timed(Stage.SAVE):
        path = resolved(options.out)
        saved = result.save(path, tokenizer=loaded.companion, report=content, overwrite=overwrite)
    with timed(Stage.REPORT):  # whatever becomes of it, the model is saved
        content |= measured(loaded.model, result.model, data)
        report = named_from(content, saved.path)
        renew_report(saved, report, prune_page(report, saved.path.name))
    write_copy(options, content, saved)
    return content, saved


def _tell(content: Mapping[str, Any], saved: SavedCheckpoint, where: Path) -> None:
    """Print what a run came to."""
    show(
        layers_table(content["layers"]),
        skipped_table(content["skipped"]),
        facts("", run_facts(content)),
    )
    if content["recovery"] is not None:
        tell_recovery(content["recovery"])
    say_verdict(verdict(content))
    out.print(saved_line(saved, where))
    say(f"report: {where / PAGE_FILE}")


def sweep(model: str, options: SweepOptions) -> None:
    """Prune to several budgets, and show quality against speed."""
    check_files(options, model)
    base, points = asked_points(options, PruningRequest)
    place = SweepDirectory(options.out)
    with way_back(lambda: place.kept), quiet():
        limit = limit_of(model, options, base)
        loaded = opened(model, options, device=base.device, max_memory=limit)
        data = calibration(loaded, options, base.seed)
        score = held_out(loaded, options)
        swept = Sweep(place, base, points, score, say)
        document = swept.run(loaded.model, data, source=loaded.source)
    show(sweep_table(document), skipped_table(document["skipped"]))
    say(f"report: {options.out / PAGE_FILE}")
    write_json(options.json, document)
