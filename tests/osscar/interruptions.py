"""Runs of a command in a child of this process, to which something happens at a chosen moment.

A moment is an event: a file is opened for writing, a directory made, something renamed or put on
the disk; a batch goes on, a group is solved or committed, a step trained, outputs are compared.  An
audit hook of the interpreter sees the first kind in whatever library it is; what is written in Rust
or by a system call is counted by the name of its caller.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from osscar.base.files import LOCK_FILE
from osscar.cli import main
from tests.osscar.forked import forked

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Plan:
    """The process is killed at the n-th event, or the disk is full from the n-th write on."""

    at: int
    full: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended, and how many events there were and how many of them write."""

    status: int
    err: str
    events: int = 0
    writes: int = 0


def run(root: Path, arguments: list[str], plan: Plan | None = None) -> Ended:
    """Run a command of osscar in a child; events that write are those in a directory."""
    counts = root.parent / f"{root.name}.events"

    def command() -> None:
        sys.argv = ["osscar", *arguments]
        events = _watched(root, plan)
        try:
            main()
        finally:
            counts.write_text(json.dumps([len(events), sum(events)]))

    child = forked(command, root.parent)
    status = child.wait()
    events, writes = json.loads(counts.read_text()) if counts.exists() else (0, 0)
    counts.unlink(missing_ok=True)
    return Ended(status, child.stderr, events, writes)


def _watched(root: Path, plan: Plan | None) -> list[bool]:
    """Watch for events in this process, and let happen what is planned; return which ones write."""
    events: list[bool] = []

    def event(writes: bool) -> None:
        events.append(writes)
        if plan is None:
            return
        if not plan.full and len(events) == plan.at:
            os.kill(os.getpid(), signal.SIGKILL)
        elif plan.full and writes and sum(events) >= plan.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("open", "os.mkdir", "os.rename"):
            path = arguments[1 if name == "os.rename" else 0]
            if name == "open" and not (arguments[2] or 0) & _WRITES:
                return
            named = isinstance(path, str | bytes | os.PathLike)
            if named and Path(os.fsdecode(path)).is_relative_to(root):
                event(True)

    def counted(function: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            event(writes)
            return function(*arguments, **options)

        return call

    for owner, name, writes in _callers():
        setattr(owner, name, counted(getattr(owner, name), writes))
    sys.addaudithook(hook)
    return events


def _callers() -> Iterator[tuple[Any, str, bool]]:
    """Yield what writes unseen by the interpreter, and the steps of a run that write nothing."""
    import transformers

    import solvers
    from osscar.checkpoint import directory
    from osscar.recovery.training import Training
    from osscar.run import chain
    from osscar.study import jobs
    from osscar.walk.coroutines import Coroutine
    from osscar.walk.layer_step import LayerStep

    yield os, "fsync", True
    yield safetensors.torch, "serialize_file", True
    yield transformers.PreTrainedTokenizerFast, "_save_pretrained", True
    yield solvers, "solve", False
    yield Coroutine, "advance", False
    yield LayerStep, "commit", False
    yield Training, "step", False
    yield chain, "shrink", False
    yield directory, "read_back", False
    yield jobs, "_answered", False


# ---- what matters of results ---------------------------------------------------------------

TIMES = ("seconds", "solve_seconds", "measure_seconds", "seconds_between", "stages")
"""Fields of JSON documents, and columns of tables, that tell how long something took."""


def content(directory: Path) -> dict[str, Any]:
    """Return the bytes of all files in a directory, but for what tells how long things took."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    files = [path for path in files if path.name != LOCK_FILE]
    return {str(path.relative_to(directory)): _timeless(path) for path in files}


def _timeless(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".json":
        parsed = json.loads(
            data, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in TIMES}
        )
        return data if parsed == json.loads(data) else parsed
    if path.name == "report.html":
        return "a page of what lies beside it, which shows its times"
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(path)) as database:
            rows = database.execute("SELECT * FROM entries ORDER BY kind, key").fetchall()
        entries = [(kind, key, json.loads(text)) for kind, key, text in rows]
        return [(*at, {k: v for k, v in e.items() if k not in TIMES}) for *at, e in entries]
    if path.name == "README.md":
        return [line for line in data.decode().splitlines() if "milliseconds on" not in line]
    return data


def hidden(root: Path, shown: tuple[str, ...]) -> list[str]:
    """Return what lies in a directory beyond what it should hold, and all that was half-written."""
    beside = [path.name for path in root.iterdir() if path.name not in shown]
    return beside + [str(path) for path in root.rglob("*partial*")]
