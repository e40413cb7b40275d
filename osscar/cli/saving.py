"""What commands that save a smaller model share: its log beside it, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from osscar.base.journal import SavingJournal
from osscar.base.printable import command_line
from osscar.checkpoint.atomic_directory import finish_killed
from osscar.checkpoint.directory import SavedCheckpoint, read_saved
from osscar.checkpoint.manifest import REPORT_FILE
from osscar.cli.common import say
from osscar.data.batches import CalibrationData
from osscar.data.images import ImageSet
from osscar.data.samples import TensorSet

_AS_OPENED = ("weights", "seqlen", "device", "dtype", "trust_remote_code")
"""Options without which `osscar eval` would open or score another model."""


def finished(
    path: Path,
    where: Path,
    log: SavingJournal[Any],
    words: Mapping[str, str],
    copies: Callable[[Mapping[str, Any], SavedCheckpoint], None],
    remove: Callable[[], None],
) -> bool:
    """Finish a command that was ended after its save, while it removed its log; whether it was.

    Parameters
    ----------
    path, where
        What was saved, resolved, and as it was asked for.
    log, words
        The log, which keeps by what words the command was asked for.
    copies
        Writes what it was to write beside its output.
    remove
        Removes the log, and whatever else goes with it.
    """
    if log.saved(words, path / REPORT_FILE) is None:
        return False
    with log.held():
        content = log.saved(words, path / REPORT_FILE)
        if content is None:
            return False
        finish_killed(path)
        copies(content, read_saved(path))
        remove()
    say(f"saved: {where}, before this run began, by one that was ended just then")
    return True


def saved_line(saved: SavedCheckpoint, where: Path) -> str:
    """Say where a model was saved, as it was asked for, and who reads it."""
    reader = "osscar.load reads it"
    if saved.stock:
        reader = "from_pretrained of transformers reads it"
    elif saved.with_code:
        reader += ", and so does from_pretrained(..., trust_remote_code=True)"
    return f"saved: {where} ({saved.bytes / 1e6:.1f} MB of weights; {reader})"


def to_evaluate(
    where: Path, data: CalibrationData, given: Mapping[str, Any], dense: str | None
) -> str:
    """Return the command that scores what was written.

    Parameters
    ----------
    where
        What was written.
    data
        Tells of what kind those have to be that it is scored on.
    given
        The options that are not as by default.
    dense
        The dense model, where it can be compared.
    """
    options: dict[str, Any] = {"text": "FILE"}
    if isinstance(data, TensorSet):
        options = {"inputs": "FILE"}
    elif isinstance(data, ImageSet):
        options = {"images": "PATH"}
    if dense is not None:
        options["dense"] = dense
    options |= {name: given[name] for name in _AS_OPENED if name in given}
    return command_line("osscar", "eval", where, options=options)
