"""What commands share that save a model: how they run, and what is said of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from osscar.base.files import resolved
from osscar.base.ranks import Ranks
from osscar.checkpoint.atomic_directory import finish_killed
from osscar.checkpoint.directory import SavedCheckpoint, read_saved
from osscar.checkpoint.manifest import REPORT_FILE
from osscar.cli.common import say, way_back, write_json
from osscar.cli.opening import quiet
from osscar.cli.options import PruneOptions, RecoverOptions
from osscar.recovery.training import RecoveryLog
from osscar.run.run_log import RunLog

_OF_THIS_TIME = {"out", "overwrite", "restart", "json", "config"}
"""Options that change nothing of what is saved."""


def run_and_report(
    options: PruneOptions | RecoverOptions,
    where: Path,
    logs: Sequence[RunLog | RecoveryLog],
    ranks: Ranks,
    *,
    words: Mapping[str, str],
    anew: bool,
    check: Callable[[], None],
    work: Callable[[], Callable[[], None]],
    complete: Callable[[Mapping[str, Any], SavedCheckpoint], None],
) -> None:
    """Run a command that saves a model, from its logs on if there are any, and tell of the result.

    Parameters
    ----------
    options, where, ranks
        What is asked for, the output as people know it, and which of the processes this is.
    logs
        What is done so far, in directories beside the output; the first is the last to go.
    words
        By which the command was asked for.
    anew
        Whether what is saved already is to be made once more.
    check
        Refuses an output that must not be written to.
    work
        Makes the model, saves it on the first rank, and returns what tells of it.
    complete
        Does what a run has not done that was ended after its save.
    """

    def kept() -> str:
        return ", and ".join(filter(None, (log.kept for log in logs)))

    def remove() -> None:
        for log in reversed(logs):
            log.remove()

    def finished() -> bool:
        report = resolved(where) / REPORT_FILE
        if anew or logs[0].saved(words, report) is None:
            return False
        with _locked(logs):
            content = logs[0].saved(words, report)
            if content is None:
                return False
            finish_killed(resolved(where))
            with quiet():
                complete(content, read_saved(resolved(where)))
            remove()
        say(f"saved: {where}, before this run began, by one that was ended just then")
        return True

    if ranks.broadcast("whether it is saved already", finished):
        return
    if ranks.first:
        check()
    with ExitStack() as stack:
        with way_back(kept, restarts=options.restart):
            stack.enter_context(_locked(logs if ranks.first else ()))
            stack.enter_context(quiet())
            if options.restart and ranks.first:
                remove()
            tell = work()
        if ranks.first:
            remove()
    if ranks.first:
        tell()


@contextmanager
def _locked(logs: Sequence[RunLog | RecoveryLog]) -> Iterator[None]:
    """Keep all other processes away while the block runs."""
    with ExitStack() as stack:
        for log in logs:
            stack.enter_context(log.locked())
        yield


def words_of(options: Any, *but: str, **more: Any) -> dict[str, str]:
    """Return by what words a command is asked for, but for those that change nothing saved."""
    words = {**more, **vars(options)}
    return {n: str(value) for n, value in words.items() if n not in {*_OF_THIS_TIME, *but}}


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
