"""Runs of a command in a child of this process, to which something happens at a chosen moment.

A moment is an event: a file is opened for writing, a directory made, something renamed or put on
the disk; a batch goes on, a group is solved or committed, a step trained, outputs
are compared.  An audit hook of
the interpreter sees the first kind in whatever library it is; what is written in Rust or by a
system call is counted by the name of its caller.
"""

from __future__ import annotations

import contextlib
import csv
import enum
import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import solvers
from osscar.base.files import LOCK_FILE

_COUNTER, PLAN, _RUN = "OSSCAR_TEST_COUNTER", "OSSCAR_TESTPLAN", "OSSCAR_TEST_RUN"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_WORKER = Path(__file__).with_name("interrupted_worker.py")
_FAILED = 70
_WRITE, _STEP = b"w", b"s"


class Victim(enum.StrEnum):
    """Who is hit by a signal."""

    COMMAND = "command"
    WORKER = "worker"
    """One process of the command's pool, as soon as there is one."""
    GROUP = "group"
    """All of them, as by Ctrl-C in a terminal."""


class Refusal(enum.StrEnum):
    """How the disk is full."""

    ONCE = "once"
    """What the event begins fails with ENOSPC, and nothing else does."""
    FROM_NOW_ON = "from now on"
    """So does all that comes after."""
    SHORT = "short"
    """From this event on the system lets no file grow beyond a few bytes, whoever writes it."""


@dataclass(frozen=True)
class Kill:
    """Send a signal at the n-th event."""

    at: int
    number: int = signal.SIGKILL
    victim: Victim = Victim.COMMAND


@dataclass(frozen=True)
class Full:
    """Let the disk be full at the n-th event that writes."""

    at: int
    refusal: Refusal


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Parameters
    ----------
    status
        As the shell has it, and -n where signal n ended it.
    err
        Its standard error.
    events, writes
        How many there were, and how many of them write.
    run
        What marks the environment of its processes.
    """

    status: int
    err: str
    events: int
    writes: int
    run: str


def run(root: Path, arguments: list[str], plan: Kill | Full | None = None) -> Ended:
    """Run a command of osscar in a child, and let something happen to it.

    Parameters
    ----------
    root
        Events are those in this directory.
    arguments
        As in the shell.
    plan
        What happens.
    """
    counter = root.parent / f"{root.name}.events"
    counter.write_bytes(b"")
    mark = f"{root}-{time.monotonic_ns()}"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _be_the_command(root, arguments, plan, counter, mark, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        err = pipe.read() if plan is None or not _outlives(plan) else ""
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    events = counter.read_bytes()
    for path in root.parent.glob(f"{root.name}.events*"):
        path.unlink()
    return Ended(status, err, len(events), events.count(_WRITE), mark)


def _outlives(plan: Kill | Full) -> bool:
    """Whether the pipe may stay open when the command is gone: its workers hold it, too."""
    if not isinstance(plan, Kill):
        return False
    return plan.number == signal.SIGKILL and plan.victim != Victim.WORKER


def _be_the_command(
    root: Path, arguments: list[str], plan: Kill | Full | None, counter: Path, mark: str, err: int
) -> None:
    status = _FAILED
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
        sys.argv = ["osscar", *arguments]
        happening = None if plan is None else [type(plan).__name__, *vars(plan).values()]
        os.environ |= {_COUNTER: str(counter), _RUN: mark}
        os.environ[PLAN] = json.dumps([str(root), os.getpid(), happening])
        # What the workers of a pool run first: without it, they would begin as this process did.
        main: Any = types.ModuleType("__main__")
        main.__file__, main.__spec__ = str(_WORKER), None
        sys.modules["__main__"] = main
        arm()
        from osscar.cli import main as command

        command()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = _FAILED
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)


def orphans(ended: Ended) -> list[int]:
    """Return the processes of a command that are still there a while after it has ended."""
    found: list[int] = []
    for _ in range(300):
        found = [pid for pid in _processes() if _is_of(pid, ended.run)]
        if not found:
            return []
        time.sleep(0.1)
    return found


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _is_of(pid: int, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return f"{_RUN}={mark}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return False


# ---- in the child, and in its workers ------------------------------------------------------


def arm() -> None:
    """Count events in this process, and let happen what was planned."""
    root, command, happening = json.loads(os.environ[PLAN])
    counter = os.open(os.environ[_COUNTER], os.O_WRONLY | os.O_APPEND)
    plan: Kill | Full | None = None
    if happening is not None:
        plan = {"Kill": Kill, "Full": Full}[happening[0]](*happening[1:])

    def event(kind: bytes = _WRITE) -> None:
        with contextlib.suppress(OSError):  # where no file may grow
            os.write(counter, kind)
        if plan is not None:
            _happen(plan, os.lseek(counter, 0, os.SEEK_CUR), command)

    writing = [False]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("open", "os.mkdir", "os.rename") and not writing[0]:
            path = arguments[1 if name == "os.rename" else 0]
            if name == "open" and not (arguments[2] or 0) & _WRITES:
                return
            if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(root):
                writing[0] = True  # what the event itself opens is none
                try:
                    event()
                finally:
                    writing[0] = False

    def counted(owner: Any, name: str, steps: bool) -> None:
        if isinstance(plan, Full) and steps:
            return
        function = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            event(_STEP if steps else _WRITE)
            return function(*arguments, **options)

        setattr(owner, name, call)

    for owner, name, steps in _callers():
        counted(owner, name, steps)
    sys.addaudithook(hook)


def _callers() -> Iterator[tuple[Any, str, bool]]:
    """Yield what writes unseen by the interpreter, and the steps of a run that write nothing."""
    yield os, "fsync", False
    yield safetensors.torch, "serialize_file", False
    yield solvers, "solve", True
    if multiprocessing.parent_process() is not None:
        return  # workers do no more
    import transformers

    from osscar.checkpoint import directory
    from osscar.recovery.training import Training
    from osscar.run import shrunk
    from osscar.study import jobs
    from osscar.walk.coroutines import Coroutine
    from osscar.walk.layer_step import LayerStep

    yield transformers.PreTrainedTokenizerFast, "_save_pretrained", False
    yield Coroutine, "advance", True
    yield LayerStep, "commit", True
    yield Training, "step", True
    yield shrunk, "shrink", True
    yield directory, "prove_equal", True
    yield jobs, "answered", True


def _happen(plan: Kill | Full, number: int, command: int) -> None:
    if isinstance(plan, Full):
        _be_full(plan, number)
        return
    if plan.victim == Victim.WORKER:
        if number >= plan.at and os.getpid() != command and _first():
            os.kill(os.getpid(), plan.number)
    elif number == plan.at:
        hit: Callable[[int, int], None] = os.killpg if plan.victim == Victim.GROUP else os.kill
        hit(command, plan.number)


def _first() -> bool:
    """Whether no process has asked before."""
    try:
        os.close(os.open(f"{os.environ[_COUNTER]}.hit", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


_SHORT_BYTES = 100


def _be_full(plan: Full, number: int) -> None:
    if plan.refusal == Refusal.SHORT:
        if number == plan.at:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (_SHORT_BYTES, hard))
    elif number == plan.at or (plan.refusal == Refusal.FROM_NOW_ON and number > plan.at):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
        parsed = json.loads(data, object_pairs_hook=_without_times)
        return data if parsed == json.loads(data) else parsed
    if path.name == "results.csv":
        return _without_columns(data.decode())
    if path.name in ("report.html", "profiles.svg"):
        return "a page of what lies beside it, and a figure, which show its times"
    if path.name == "README.md":
        return [line for line in data.decode().splitlines() if "milliseconds on" not in line]
    return data


def _without_times(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if key not in TIMES}


def _without_columns(text: str) -> list[list[str]]:
    lines = list(csv.reader(text.splitlines()))
    kept = [index for index, name in enumerate(lines[0]) if name not in TIMES]
    return [[line[index] for index in kept] for line in lines]


def hidden(root: Path, shown: tuple[str, ...]) -> list[str]:
    """Return what lies in a directory beyond what it should hold, and all that was half-written."""
    beside = [path.name for path in root.iterdir() if path.name not in shown]
    partial = [str(path) for path in root.rglob("*partial*")]
    return beside + partial
