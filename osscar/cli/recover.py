"""``osscar recover``: a pruned model, trained towards its dense one, on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from osscar.base.errors import CheckpointError, ModelError, OutputError
from osscar.base.files import resolved, write_text
from osscar.base.json_files import MEGABYTE, read_json
from osscar.base.printable import pluralize, published
from osscar.base.ranks import Ranks, together
from osscar.checkpoint.atomic_directory import check_output
from osscar.checkpoint.builders import builder_of
from osscar.checkpoint.card import PICTURE_FILE
from osscar.checkpoint.directory import SavedCheckpoint, save, weight_bytes
from osscar.checkpoint.manifest import PAGE_FILE, REPORT_FILE, is_checkpoint
from osscar.cli.common import (
    check_json_path,
    document,
    out,
    say,
    say_next,
    show,
    way_back,
    write_json,
)
from osscar.cli.opening import chat_template_unused, quiet, say_preprocessing, stated_preprocessing
from osscar.cli.options import RecoverOptions, asked_with, given
from osscar.cli.saving import finished, saved_line, to_evaluate
from osscar.data.batches import CalibrationData
from osscar.data.text import CalibrationSet
from osscar.models.load import load_model
from osscar.models.loaded import LoadedModel
from osscar.models.names import ModelKind, kind_of
from osscar.network.modules import count_parameters
from osscar.proof.lineage import Computed, weights_digest
from osscar.recovery.page import recover_page, recovery_facts, recovery_table
from osscar.recovery.recover import Recovery, recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import samples_for
from osscar.recovery.training import RecoveryLog
from osscar.report.sections import facts

LOG = "recover"
"""Ends the name of the directory that holds the log of a recovery."""

_OF_THIS_TIME = ("out", "overwrite", "restart", "json", "report")
"""Options that change nothing of what is saved."""

_LONGEST_REPORT = 64 * MEGABYTE


def run(directory: Path, dense: str, options: RecoverOptions, asked: Any) -> None:
    """Recover a pruned model."""
    with together() as ranks:
        request = asked_with(asked)
        place = resolved(directory)
        if not is_checkpoint(place):
            raise CheckpointError(
                f"{str(directory)!r} is no directory that holds a checkpoint; give one that "
                "`osscar prune` wrote"
            )
        where = options.out
        if where is None:
            named = directory if directory.name not in ("", "..") else place
            where = named.with_name(f"{named.name}-recovered")
        read = (directory, dense, options.text, options.images, options.inputs, options.weights)
        check_json_path(options.json, inputs=read, written=(where,))
        check_json_path(
            options.report, inputs=read, written=(where, options.json), option="--report"
        )
        words = {"directory": directory, "dense": dense, **vars(options), **vars(asked)}
        kept = {name: str(value) for name, value in words.items() if name not in _OF_THIS_TIME}
        job = _Job(place, str(directory), dense, where, options, request, ranks)
        job.run(resolved(where), kept, {**given(options), **given(asked)})


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run of one rank: what is asked for.

    `place` is the directory of the pruned model, and `name` that as it was given; `where` is where
    the recovered one goes, as people know it.
    """

    place: Path
    name: str
    dense: str
    where: Path
    options: RecoverOptions
    request: RecoveryRequest
    ranks: Ranks

    def run(self, path: Path, words: dict[str, str], given: Mapping[str, Any]) -> None:
        """Recover into a directory, as `osscar.cli.prune` prunes into one."""
        options, ranks = self.options, self.ranks
        log = RecoveryLog(path.with_name(f"{path.name}.{LOG}"))
        if ranks.broadcast(
            "whether it is saved already",
            lambda: (
                not options.restart
                and finished(path, self.where, log, words, self._write_copies, log.remove)
            ),
        ):
            return
        if ranks.first:
            self._check_output(path)
        before = self._report()
        with log.held() if ranks.first else nullcontext(), quiet():
            if options.restart and ranks.first:
                log.remove()
            with way_back(lambda: log.kept, restarts=options.restart):
                smaller, dense, data = self._load()
                if ranks.first:
                    needed = weight_bytes(smaller.model, smaller.stored_dtype)
                    check_output(path, overwrite=options.overwrite, needed_bytes=needed)
                    tell_data(smaller, data)
                own_log = log if ranks.first else None
                recovery = recover_as_asked(
                    smaller.model, dense.model, data, self.request, own_log, ranks, say
                )
                if not ranks.first:
                    return  # the first alone writes and prints
                content = self._document(recovery, dense.source, before)
                log.note(words, content)
                saved = save(
                    recovery.model,
                    path,
                    tokenizer=smaller.companion,
                    report=content,
                    page=recover_page(content, path.name),
                    picture=self._picture(),
                    overwrite=options.overwrite,
                )
                self._write_copies(content, saved)
            log.remove()
        tell_recovery(content["recovery"])
        out.print(saved_line(saved, self.where))
        say(f"report: {self.where / PAGE_FILE}")
        say_next(to_evaluate(self.where, data, given, self.dense))

    def _check_output(self, path: Path) -> None:
        """Refuse what must not be written to; the pruned model may be, where it is asked for."""
        options = self.options
        if self.place in path.parents:
            raise OutputError(
                f"{self.where} lies in {self.name}, which stays as it is; give another directory"
            )
        used = [self.dense, options.text, options.images, options.inputs, options.weights]
        used += [options.json, options.report]
        if path != self.place:
            used.append(self.place)
        check_output(path, overwrite=options.overwrite, inputs=used)

    def _report(self) -> dict[str, Any] | None:
        """Return the report that lies beside the pruned model, whatever is in it."""
        file = self.place / REPORT_FILE
        return read_json(file, dict[str, Any], limit=_LONGEST_REPORT) if file.is_file() else None

    def _picture(self) -> bytes | None:
        """Return the picture of what the groups keep, which recovery does not change."""
        file = self.place / PICTURE_FILE
        return file.read_bytes() if file.is_file() else None

    def _load(self) -> tuple[LoadedModel, LoadedModel, CalibrationData]:
        """Open both models, and draw what trains the smaller one."""
        options, request = self.options, self.request
        how: dict[str, Any] = {
            "device": request.device,
            "dtype": options.dtype,
            "trust_remote_code": options.trust_remote_code,
        }
        own_code = kind_of(str(self.place)) is ModelKind.CODE_DIRECTORY
        smaller = load_model(
            str(self.place),
            dense=self.dense if own_code else None,
            preprocessing=stated_preprocessing(options),
            **how,
        )
        dense = load_model(self.dense, weights=options.weights, **how)
        if (smaller.tokenizer is None) != (dense.tokenizer is None):
            raise ModelError(
                f"one of {self.name} and {self.dense} reads text, and the other does not; give the "
                "dense model that the first was pruned from"
            )
        one, other = smaller.model, dense.model
        as_large = count_parameters(one) == count_parameters(other)
        if as_large and weights_digest(one) == weights_digest(other) != "":
            raise ModelError(
                f"{self.name} holds the same weights as {self.dense}, so that there is nothing to "
                "recover; give a directory that `osscar prune` wrote"
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
        if isinstance(data, CalibrationSet):
            self._check_same_tokens(data, dense)
        return smaller, dense, data

    def _check_same_tokens(self, data: CalibrationSet, dense: LoadedModel) -> None:
        """Refuse a dense model that reads other tokens."""
        theirs = dense.training(
            text=self.options.text,
            windows=data.samples,
            seqlen=data.seqlen,
            seed=self.request.seed,
        )
        if not (isinstance(theirs, CalibrationSet) and torch.equal(data.tokens, theirs.tokens)):
            raise ModelError(
                f"{self.name} and {self.dense} have other tokenizers, so that they read other "
                "tokens in the same text; give the dense model that the first was pruned from"
            )

    def _document(
        self, recovery: Recovery, source: str, before: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return what is known of the recovery, as ``docs/json.md`` describes it."""
        content = {
            "model": published(self.name),
            "dense": published(source),
            "computed": dataclasses.asdict(Computed.of(recovery.model)),
            "parameters": count_parameters(recovery.model),
            "own_code": builder_of(recovery.model) is None,
            "recovery": recovery.document(),
            "before": before,
        }
        return document("recover", 1, content)

    def _write_copies(self, content: Mapping[str, Any], saved: SavedCheckpoint) -> None:
        """Write what a run is asked to write beside its output."""
        where = {**dataclasses.asdict(saved), "path": str(saved.path)}
        write_json(self.options.json, {**content, "saved": where})
        if self.options.report is not None:
            write_text(self.options.report, recover_page(content, saved.path.name))


def tell_data(loaded: LoadedModel, data: CalibrationData) -> None:
    """Print what trains a model."""
    say_preprocessing(data)
    if isinstance(data, CalibrationSet):
        what = f"{data.sentence()}{chat_template_unused(loaded.tokenizer)}"
    else:
        what = f"{pluralize(len(data), data.sample_name)} of {data.source}"
    say(f"recovery: {what}; {Computed.of(loaded.model).sentence()}")


def tell_recovery(recovery: Mapping[str, Any]) -> None:
    """Print what a recovery came to."""
    show(recovery_table(recovery), facts("", recovery_facts(recovery)))
