"""``osscar prune``: from a model to a smaller one on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from osscar.base.errors import OptionError
from osscar.base.files import resolved, write_text
from osscar.base.ranks import Ranks, together
from osscar.base.timing import Profile, Stage, timed
from osscar.checkpoint.atomic_directory import check_output
from osscar.checkpoint.directory import SavedCheckpoint, load, renew_report, weight_bytes
from osscar.checkpoint.manifest import PAGE_FILE
from osscar.cli.common import (
    check_json_path,
    out,
    say,
    say_next,
    say_verdict,
    show,
    way_back,
    write_json,
)
from osscar.cli.estimates import dry_run
from osscar.cli.opening import limit_of, opened, quiet, tell_dense
from osscar.cli.options import PruneOptions, asked_with, given, recovery_asked_with
from osscar.cli.recover import LOG, tell_data, tell_recovery
from osscar.cli.saving import finished, saved_line, to_evaluate
from osscar.data.batches import CalibrationData
from osscar.data.text import CalibrationSet
from osscar.models.loaded import LoadedModel
from osscar.network.modules import device_of, number_format
from osscar.offload.on_disk import is_on_disk
from osscar.recovery.recover import Recovery, recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import check_enough, samples_for
from osscar.recovery.training import RecoveryLog
from osscar.report.run_tables import skipped_table
from osscar.report.sections import facts
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from osscar.run.prune_page import layers_table, prune_page, run_facts, verdict
from osscar.run.result import PruningResult, measured
from osscar.run.run_log import RunLog

_OF_THIS_TIME = {
    *("out", "max_memory", "overwrite", "restart", "json", "report", "dry_run"),
}
"""Options that change nothing of what is saved."""


def run(model: str, options: PruneOptions, asked: Any, spent: Profile) -> None:
    """Prune, or tell what that will take."""
    with together() as ranks:
        if options.dry_run and not ranks.alone:
            raise OptionError("--dry-run estimates a run of one process; start it without torchrun")
        if options.out is None and not options.dry_run:
            raise OptionError("give --out, the directory that the smaller model goes to")
        read = (model, options.calibration, options.weights, options.recover_text)
        check_json_path(options.json, inputs=read, written=(options.out,))
        written = (options.out, options.json)
        check_json_path(options.report, inputs=read, written=written, option="--report")
        request = asked_with(asked)
        recovery = recovery_asked_with(options, request)
        job = _Job(model, options, request, recovery, ranks, spent)
        if options.out is None or options.dry_run:
            with quiet():
                dry_run(*job.load(None), request, spent.seconds, options.json)
            if options.recover:
                say("recovery: comes on top, and is not estimated")
            return
        words = {"model": model, **vars(options), **vars(asked)}
        kept = {name: str(value) for name, value in words.items() if name not in _OF_THIS_TIME}
        job.run(resolved(options.out), kept, {**given(options), **given(asked)})


@dataclasses.dataclass(frozen=True)
class _Logs:
    """Where a run stands, beside its output: its pruning, and the recovery after that if any."""

    path: Path
    recovers: bool

    @functools.cached_property
    def pruning(self) -> RunLog:
        """Of the groups that are done."""
        return RunLog(self.path.with_name(f"{self.path.name}.run"))

    @functools.cached_property
    def recovery(self) -> RecoveryLog:
        """Of the steps that are done."""
        return RecoveryLog(self.path.with_name(f"{self.path.name}.{LOG}"))

    @property
    def kept(self) -> str:
        """What a run that ends now leaves, in words; nothing if that is nothing."""
        logs = (self.pruning, self.recovery) if self.recovers else (self.pruning,)
        return ", and ".join(filter(None, (log.kept for log in logs)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep all other processes away while the block runs."""
        with self.pruning.held(), self.recovery.held() if self.recovers else nullcontext():
            yield

    def remove(self) -> None:
        """Forget all that was done, and last of it that the result is saved."""
        if self.recovers:
            self.recovery.remove()
        self.pruning.remove()


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run of one rank: what is asked for, and what it has spent since its command began."""

    model: str
    options: PruneOptions
    request: PruningRequest
    recovery: RecoveryRequest | None
    ranks: Ranks
    spent: Profile

    def load(self, path: Path | None) -> tuple[LoadedModel, CalibrationData]:
        """Open the model, whose smaller one is to go to a path, and draw its data."""
        options, request = self.options, self.request

        def room(loaded: LoadedModel) -> None:
            if options.recover and is_on_disk(loaded.model):
                raise OptionError(
                    "--recover needs the weights in memory, and --max-memory keeps them on disk; "
                    "omit one of them"
                )
            if path is not None and self.ranks.first:
                needed = weight_bytes(loaded.model, loaded.stored_dtype)
                check_output(path, overwrite=options.overwrite, needed_bytes=needed)

        with timed(Stage.LOAD):
            return opened(
                self.model,
                options,
                request.seed,
                room,
                says=self.ranks.first,
                device=request.device,
                max_memory=limit_of(self.model, options, request),
            )

    def _trains_on(self, loaded: LoadedModel, data: CalibrationData) -> CalibrationData:
        """Return what the smaller model is recovered on: the calibration data, or other text."""
        if self.recovery is None:
            return data
        text = self.options.recover_text
        if text is not None:
            if not isinstance(data, CalibrationSet):
                raise OptionError(
                    f"{loaded.source} reads no text, which --recover-text is for; omit it, "
                    "or recover what was pruned with `osscar recover`, on images or inputs"
                )
            windows, seed = samples_for(self.recovery, windows=True), self.recovery.seed
            data = loaded.training(text=text, windows=windows, seqlen=data.seqlen, seed=seed)
            if self.ranks.first:
                tell_data(loaded, data)
        check_enough(loaded.model, data, self.recovery)
        return data

    def run(self, path: Path, words: dict[str, str], given: Mapping[str, Any]) -> None:
        """Prune into a directory.

        The log keeps `words`, by which the run was asked for; `given` are the options that are not
        as by default.
        """
        options, ranks = self.options, self.ranks
        assert options.out is not None
        where, logs = options.out, _Logs(path, recovers=options.recover)
        anew = options.overwrite or options.restart
        if ranks.broadcast(
            "whether it is saved already",
            lambda: (
                not anew
                and finished(path, where, logs.pruning, words, self._completed, logs.remove)
            ),
        ):
            return
        if ranks.first:
            read = (self.model, options.calibration, options.weights, options.recover_text)
            used = (*read, options.json, options.report)
            check_output(path, overwrite=options.overwrite, inputs=used)
        with logs.held() if ranks.first else nullcontext(), quiet():
            if options.restart and ranks.first:
                logs.remove()
            with way_back(lambda: logs.kept, restarts=options.restart):
                loaded, data = self.load(path)
                trains_on = self._trains_on(loaded, data)
                score = tell_dense(loaded, data) if ranks.first else None
                result, recovery = self._made(loaded.model, data, trains_on, logs)
                if not ranks.first:
                    return  # the first alone writes and prints
                content = result.document(
                    loaded.model, data, source=loaded.source, classes=loaded.classes, score=score,
                    recovery=recovery, measure=False,
                )  # fmt: skip
                logs.pruning.note(words, content)
                tokenizer, companion = loaded.tokenizer, loaded.companion
                fits = not is_on_disk(loaded.model)
                with timed(Stage.SAVE):
                    saved = result.save(
                        path, tokenizer=companion, report=content, overwrite=options.overwrite
                    )
                content = self._measured(content, saved, loaded, lambda: result.model, data)
            logs.remove()
        _tell(content, saved, where)
        if result.form == "exported" and tokenizer is not None:
            return  # a program cannot generate, which is part of what text is scored with
        if score is not None and score.reason:
            return  # what keeps the dense model from being scored would keep the smaller one
        if options.dense is not None:
            given = {"weights": "FILE", **given}  # of the dense model, of which this run reads none
        dense = options.dense or self.model
        say_next(to_evaluate(where, data, given, dense if fits else None))

    def _made(
        self, model: nn.Module, data: CalibrationData, trains_on: CalibrationData, logs: _Logs
    ) -> tuple[PruningResult, Recovery | None]:
        """Prune a model, and recover the smaller one if that is asked for."""
        ranks = self.ranks
        log = logs.pruning if ranks.first else None
        tell = say if ranks.first else (lambda line: None)
        result = prune_as_asked(model, data, self.request, log, ranks, tell)
        if self.recovery is None:
            return result, None
        training = logs.recovery if ranks.first else None
        recovery = recover_as_asked(result, model, trains_on, self.recovery, training, ranks, tell)
        return dataclasses.replace(result, model=recovery.model), recovery

    def _completed(self, content: Mapping[str, Any], saved: SavedCheckpoint) -> None:
        """Measure and write what a run has not that was ended after its save."""
        if "forward" in content:
            self._write_copies(content, saved)
            return
        with quiet():
            loaded, data = self.load(None)
            dense = loaded.model
            dtype, device = number_format(dense), device_of(dense)
            smaller = lambda: load(saved.path, dense=dense, dtype=dtype).to(device)  # noqa: E731
            self._measured(content, saved, loaded, smaller, data)

    def _measured(
        self,
        content: Mapping[str, Any],
        saved: SavedCheckpoint,
        loaded: LoadedModel,
        smaller: Callable[[], nn.Module],
        data: CalibrationData,
    ) -> dict[str, Any]:
        """Measure what a saved model takes, and return the document of its run with that."""
        with timed(Stage.REPORT):
            whole = {**content, **measured(loaded.model, smaller, data)}
            renew_report(saved, whole, prune_page(whole, saved.path.name))
            self._write_copies(whole, saved)
        return whole

    def _write_copies(self, content: Mapping[str, Any], saved: SavedCheckpoint) -> None:
        """Write what a run is asked to write beside its output."""
        where = {**dataclasses.asdict(saved), "path": str(saved.path)}
        write_json(self.options.json, {**content, "saved": where})
        if self.options.report is not None:
            write_text(self.options.report, prune_page(content, saved.path.name))


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
