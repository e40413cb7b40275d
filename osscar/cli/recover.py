"""``osscar recover``: a pruned model, trained towards its dense one, on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from osscar.base.files import resolved
from osscar.base.json_files import read_json
from osscar.base.printable import published
from osscar.base.ranks import together
from osscar.checkpoint.builders import builder_of
from osscar.checkpoint.directory import save
from osscar.checkpoint.files import PAGE_FILE, REPORT_FILE, checkpoint_directory
from osscar.cli.common import check_files, document, out, say, show
from osscar.cli.opening import SavingJob, saved_line, stated_preprocessing, tell_data, write_copy
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
        _Job(options, where, used, request, ranks, place, str(directory)).run()


@dataclass
class _Job(SavingJob):
    """What one rank does to the pruned model in `place`, whose `name` is as it was given."""

    place: Path
    name: str

    @cached_property
    def log(self) -> RecoveryLog:
        """The log of the recovery."""
        return RecoveryLog(self.beside(LOG))

    @property
    def logs(self) -> Sequence[RecoveryLog]:
        """The log alone."""
        return (self.log,)

    def work(self) -> Callable[[], None]:
        """Recover into a directory, and return what tells of it."""
        options, ranks, path = self.options, self.ranks, self.path
        report = self.place / REPORT_FILE
        before = None
        if report.is_file():  # whatever is in it
            before = read_json(report, dict[str, Any])
        smaller, dense, data = self._load()
        self.check_room(smaller)
        if ranks.first:
            tell_data("recovery", smaller, data, always=True)
        log = self.log if ranks.first else None
        recovery = recover_as_asked(smaller.model, dense.model, data, self.request, log, ranks, say)
        if not ranks.first:
            return lambda: None
        content = self._document(recovery, dense.source, before)
        saved = save(
            recovery.model,
            path,
            tokenizer=smaller.companion,
            report=content,
            page=recover_page(content, path.name),
            overwrite=self.overwrite,
        )
        write_copy(options, content, saved)

        def tell() -> None:
            tell_recovery(content["recovery"])
            out.print(saved_line(saved, self.where))
            say(f"report: {self.where / PAGE_FILE}")

        return tell

    def _load(self) -> tuple[LoadedModel, LoadedModel, CalibrationData]:
        """Open both models, and draw what trains the smaller one."""
        options, request = self.options, self.request
        trust = options.trust_remote_code
        how = {"device": request.device, "dtype": options.dtype, "trust_remote_code": trust}
        kind = kind_of(self.place)
        smaller = load_model(
            str(self.place),
            dense=options.dense if kind is ModelKind.CODE_DIRECTORY else None,
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
        return smaller, load_model(options.dense, weights=options.weights, **how), data

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


def tell_recovery(recovery: Mapping[str, Any]) -> None:
    """Print what a recovery came to."""
    show(recovery_table(recovery), facts("", recovery_facts(recovery)))
