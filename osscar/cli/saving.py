"""What commands share that save a model: how they run, and what is said of the result."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osscar.base.files import resolved
from osscar.base.ranks import Ranks
from osscar.checkpoint.atomic_directory import check_output
from osscar.checkpoint.directory import SavedCheckpoint, weight_bytes
from osscar.cli.common import named_files, way_back, write_json
from osscar.cli.opening import quiet
from osscar.cli.options import PruneOptions, RecoverOptions
from osscar.models.loaded import LoadedModel
from osscar.recovery.training import RecoveryLog
from osscar.run.run_log import RunLog


@dataclass
class SavingJob(ABC):
    """What one rank of a command does that saves a model; `where` is the output, as it was given.

    The `logs` have what is done so far, beside the output; the first is the last to go.
    """

    options: Any
    where: Path
    used: Sequence[str | Path]
    """What must not be replaced."""
    request: Any
    ranks: Ranks

    def __post_init__(self) -> None:
        self.path = resolved(self.where)
        # What is there where a run was ended is what it has saved, or was asked to replace.
        goes_on = self.logs[0].exists and not self.options.restart
        self.overwrite = self.options.overwrite or goes_on

    @property
    @abstractmethod
    def logs(self) -> Sequence[RunLog | RecoveryLog]:
        """The logs that are kept."""

    @abstractmethod
    def work(self) -> Callable[[], None]:
        """Make the model, save it on the first rank, and return what tells of it."""

    def beside(self, name: str) -> Path:
        """Return a directory beside the output, called like it."""
        return self.path.with_name(f"{self.path.name}.{name}")

    def check_room(self, loaded: LoadedModel) -> None:
        """Refuse an output that has no room for a model's weights."""
        if self.ranks.first:
            needed = weight_bytes(loaded.model, loaded.stored_dtype)
            check_output(self.path, overwrite=self.overwrite, needed_bytes=needed)

    def run(self) -> None:
        """Run the command, from its logs on if there are any, and tell of the result."""
        first, restart = self.ranks.first, self.options.restart

        def kept() -> str:
            return ", and ".join(filter(None, (log.kept for log in self.logs)))

        def remove() -> None:
            for log in reversed(self.logs):
                log.remove()

        if first:
            inputs = [*self.used, *named_files(self.options), self.options.json]
            check_output(self.path, overwrite=self.overwrite, inputs=inputs)
        with ExitStack() as stack:
            with way_back(kept, restarts=restart):
                if first:
                    for log in self.logs:
                        stack.enter_context(log.locked())
                stack.enter_context(quiet())
                if restart and first:
                    remove()
                tell = self.work()
            if first:
                remove()
        if first:
            tell()


def write_copy(
    options: PruneOptions | RecoverOptions, content: Mapping[str, Any], saved: SavedCheckpoint
) -> None:
    """Write the report where ``--json`` wants it, too."""
    where = {**dataclasses.asdict(saved), "path": str(saved.path)}
    write_json(options.json, {**content, "saved": where})


def saved_line(saved: SavedCheckpoint, where: Path) -> str:
    """Say where a model was saved, as it was asked for, and who reads it."""
    reader = "osscar.load reads it"
    if saved.stock:
        reader = "from_pretrained of transformers reads it"
    elif saved.with_code:
        reader += ", and so does from_pretrained(..., trust_remote_code=True)"
    here = "" if saved.fresh else "; read back in this process alone"
    return f"saved: {where} ({saved.bytes / 1e6:.1f} MB of weights; {reader}{here})"
