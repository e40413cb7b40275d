"""What commands share that save a model: how they run, and what is said of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from osscar.base.ranks import Ranks
from osscar.checkpoint.directory import SavedCheckpoint
from osscar.cli.common import way_back, write_json
from osscar.cli.opening import quiet
from osscar.cli.options import PruneOptions, RecoverOptions
from osscar.recovery.training import RecoveryLog
from osscar.run.run_log import RunLog


def run_and_report(
    options: PruneOptions | RecoverOptions,
    logs: Sequence[RunLog | RecoveryLog],
    ranks: Ranks,
    *,
    check: Callable[[], None],
    work: Callable[[], Callable[[], None]],
) -> None:
    """Run a command that saves a model, from its logs on if there are any, and tell of the result.

    Parameters
    ----------
    options, ranks
        What is asked for, and which of the processes this is.
    logs
        What is done so far, in directories beside the output; the first is the last to go.
    check
        Refuses an output that must not be written to.
    work
        Makes the model, saves it on the first rank, and returns what tells of it.
    """

    def kept() -> str:
        return ", and ".join(filter(None, (log.kept for log in logs)))

    def remove() -> None:
        for log in reversed(logs):
            log.remove()

    if ranks.first:
        check()
    with ExitStack() as stack:
        with way_back(kept, restarts=options.restart):
            if ranks.first:
                for log in logs:
                    stack.enter_context(log.locked())
            stack.enter_context(quiet())
            if options.restart and ranks.first:
                remove()
            tell = work()
        if ranks.first:
            remove()
    if ranks.first:
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
