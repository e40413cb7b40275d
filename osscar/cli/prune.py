"""``osscar prune``: from a model to a smaller one on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from osscar.base.errors import OptionError
from osscar.base.files import resolved, write_text
from osscar.base.printable import command_line
from osscar.base.ranks import Ranks, together
from osscar.base.timing import Profile, Stage, timed
from osscar.checkpoint.directory import SavedCheckpoint, describe, weight_bytes
from osscar.checkpoint.manifest import PAGE_FILE, REPORT_FILE
from osscar.checkpoint.place import cannot_move, check_output, finish_killed, prefix
from osscar.cli.common import check_json_path, out, say, say_next, way_back, write_json
from osscar.cli.estimates import dry_run
from osscar.cli.opening import limit_of, opened, quiet, tell_dense
from osscar.cli.options import PruneOptions, asked_with, given
from osscar.data.batches import CalibrationData
from osscar.data.images import ImageSet
from osscar.data.tensors import TensorSet
from osscar.models.loaded import LoadedModel
from osscar.offload.on_disk import is_on_disk
from osscar.pruning.prune import prune_as_asked
from osscar.pruning.run_log import RunLog
from osscar.report.prune_page import prune_page, run_lines
from osscar.report.run_tables import layers_table, skipped_table
from osscar.request import PruningRequest

_OF_THIS_TIME = {
    *("out", "max_memory", "overwrite", "restart", "json", "report", "dry_run"),
}
"""Options that change nothing of what is saved."""

_AS_OPENED = ("weights", "seqlen", "device", "dtype", "trust_remote_code")
"""Options of `osscar prune` without which `osscar eval` would open or score another model."""


def run(model: str, options: PruneOptions, asked: Any, spent: Profile) -> None:
    """Prune, or tell what that will take."""
    with together() as ranks:
        if options.dry_run and not ranks.alone:
            raise OptionError("--dry-run tells what one process will take; leave torchrun away")
        if options.out is None and not options.dry_run:
            raise OptionError("give --out, the directory that the smaller model goes to")
        read = (model, options.calibration, options.weights)
        check_json_path(options.json, inputs=read, written=(options.out,))
        written = (options.out, options.json)
        check_json_path(options.report, inputs=read, written=written, option="--report")
        job = _Job(model, options, asked_with(asked), ranks, spent)
        if options.out is None or options.dry_run:
            with quiet():
                dry_run(*job.load(None), job.request, spent.seconds, options.json)
            return
        words = {"model": model, **vars(options), **vars(asked)}
        kept = {name: str(value) for name, value in words.items() if name not in _OF_THIS_TIME}
        job.run(resolved(options.out), kept, {**given(options), **given(asked)})


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run of one rank: what is asked for, and what it has spent since its command began."""

    model: str
    options: PruneOptions
    request: PruningRequest
    ranks: Ranks
    spent: Profile

    def load(self, path: Path | None) -> tuple[LoadedModel, CalibrationData]:
        """Open the model, whose smaller one is to go to a path, and draw its data."""
        options, request = self.options, self.request

        def room(loaded: LoadedModel) -> None:
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
                dense=options.against,
                device=request.device,
                dtype=options.dtype,
                max_memory=limit_of(self.model, options, request),
            )

    def run(self, path: Path, words: dict[str, str], given: Mapping[str, Any]) -> None:
        """Prune into a directory.

        The log keeps `words`, by which the run was asked for; `given` are the options that are not
        as by default.
        """
        options, request, ranks = self.options, self.request, self.ranks
        assert options.out is not None
        log = RunLog(_beside(path))
        anew = options.overwrite or options.restart
        if ranks.broadcast(
            "whether it is saved already",
            lambda: not anew and self._is_saved(path, log, words),
        ):
            return
        if ranks.first:
            read = (self.model, options.calibration, options.weights)
            used = (*read, options.json, options.report)
            check_output(path, overwrite=options.overwrite, inputs=used)
        with way_back(lambda: log.kept), log.held() if ranks.first else nullcontext(), quiet():
            if options.restart and ranks.first:
                log.remove()
            loaded, data = self.load(path)
            score = tell_dense(loaded, data) if ranks.first else None
            own_log = log if ranks.first else None
            result = prune_as_asked(loaded.model, data, request, own_log, ranks)
            if not ranks.first:
                return  # the first alone writes and prints
            with timed(Stage.REPORT):
                content = result.document(
                    loaded.model, data, source=loaded.source, classes=loaded.classes, score=score
                )
            log.note(words, content)
            tokenizer = loaded.tokenizer
            fits = not is_on_disk(loaded.model)
            del loaded  # saving holds the smaller model twice, and needs no dense one beside
            with timed(Stage.SAVE):
                saved = result.save(
                    path, tokenizer=tokenizer, report=content, overwrite=options.overwrite
                )
            self._write_copies(content, saved)
            log.remove()
        out.print(layers_table(content["layers"]))
        if result.skipped:
            out.print(skipped_table(content["skipped"]))
        for line in (*run_lines(content), saved_line(saved, options.out)):
            out.print(line)
        say(f"report: {options.out / PAGE_FILE}")
        if result.form == "exported" and tokenizer is not None:
            return  # a program cannot generate, which is part of what text is scored with
        if score is not None and score.reason:
            return  # what keeps the dense model from being scored would keep the smaller one
        say_next(self._to_evaluate(data, given, fits))

    def _to_evaluate(self, data: CalibrationData, given: Mapping[str, Any], fits: bool) -> str:
        """Return the command that compares what was written with the dense model, if that fits."""
        options: dict[str, Any] = {"text": "FILE"}
        if isinstance(data, TensorSet):
            options = {"inputs": "FILE"}
        elif isinstance(data, ImageSet):
            options = {"images": "PATH"}
        if fits:
            options["against"] = self.options.against or self.model
        if self.options.against is not None:
            options["weights"] = "FILE"  # of the dense model, of which this run has read none
        options |= {name: given[name] for name in _AS_OPENED if name in given}
        return command_line("osscar", "eval", self.options.out, options=options)

    def _write_copies(self, content: Mapping[str, Any], saved: SavedCheckpoint) -> None:
        """Write what a run is asked to write beside its output."""
        where = {**dataclasses.asdict(saved), "path": str(saved.path)}
        write_json(self.options.json, {**content, "saved": where})
        if self.options.report is not None:
            write_text(self.options.report, prune_page(content))

    def _is_saved(self, path: Path, log: RunLog, words: dict[str, str]) -> bool:
        """Finish a run that was ended after its save, while it removed its log; whether it was."""
        if log.saved(words, path / REPORT_FILE) is None:
            return False
        with log.held():
            content = log.saved(words, path / REPORT_FILE)
            if content is None:
                return False
            finish_killed(path)
            saved = describe(path)
            self._write_copies(content, saved)
            log.remove()
        say(f"saved: {self.options.out}, before this run began, by one that was ended just then")
        return True


def saved_line(saved: SavedCheckpoint, where: Path) -> str:
    """Say where a model was saved, as it was asked for, and who reads it."""
    reader = "osscar.load reads it"
    if saved.stock:
        reader = "from_pretrained of transformers reads it"
    elif saved.with_code:
        reader += ", and so does from_pretrained(..., trust_remote_code=True)"
    return f"saved: {where} ({saved.bytes / 1e6:.1f} MB of weights; {reader})"


def _beside(path: Path) -> Path:
    """Return where the log of a run lies: beside its output, or in it if nothing can be there."""
    return path / f"{prefix(path)}log" if cannot_move(path) else path.with_name(f"{path.name}.run")
