"""Attacks, each in a forked process with a limit on time and memory, and what came of them."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

SECONDS = 60
"""Of a processor, after which an attack hangs. No honest call here takes a tenth of that."""

WALL_SECONDS = 300
"""After which it hangs without computing, however busy the machine is."""

MEMORY = 8 * 2**30
"""Bytes that an attack may take beyond what its parent has."""

FOREIGN = ("a file", "model.safetensors", "config.json")
"""Files of somebody else's, beside the directory of each attack."""

Act = Callable[[Path, random.Random], str | None]
"""Attack with files in an empty directory; return what is silently wrong of what was accepted."""


class End(Enum):
    """How an attack ended."""

    CLEAR = "clear error"
    RIGHT = "accepted, and right"
    TRACEBACK = "traceback"
    HANG = "hang"
    CRASH = "crash"
    WRONG = "silently wrong"
    LOST = "lost data"


@dataclass(frozen=True)
class Attack:
    """One attack.

    Parameters
    ----------
    label
        What it is, so that it can be found again.
    seed
        Of its random choices.
    act
        What it does.
    """

    label: str
    seed: int
    act: Act


@dataclass(frozen=True)
class Outcome:
    """What came of an attack, and the words that say so."""

    attack: Attack
    end: End
    words: str


CANARY = "OSSCAR_CANARY"
"""Environment variable: the file that an attacker's code would write."""


def fight(attacks: Iterable[Attack], workers: int = 2) -> Iterator[Outcome]:
    """Run attacks, a few at once; yield what came of them, in any order."""
    running: dict[int, _Child] = {}
    with tempfile.TemporaryDirectory(prefix="hostile-") as work:
        waiting = iter(enumerate(attacks))
        while True:
            while len(running) < workers and (following := next(waiting, None)) is not None:
                number, attack = following
                child = _Child(attack, Path(work) / str(number))
                running[child.pipe] = child
            if not running:
                return
            ready, _, _ = select.select(list(running), [], [], 0.5)
            late = [pipe for pipe, child in running.items() if time.monotonic() > child.deadline]
            for pipe in {*ready, *late}:
                outcome = running[pipe].ended(late=pipe not in ready)
                if outcome is not None:
                    del running[pipe]
                    yield outcome


class _Child:
    """A forked process that attacks."""

    def __init__(self, attack: Attack, directory: Path) -> None:
        self.attack, self.directory = attack, directory
        self.deadline = time.monotonic() + WALL_SECONDS
        self.said = b""
        directory.mkdir()
        self.foreign = directory / "foreign"
        self.foreign.mkdir()
        for name in FOREIGN:
            (self.foreign / name).write_text(f"of somebody else's: {name}")
        self.before = _digest(self.foreign)
        sys.stdout.flush()
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            _attack(attack, directory, end)
        os.close(end)

    def ended(self, *, late: bool) -> Outcome | None:
        """Return what came of it; None while it still has something to say."""
        if not late:
            part = os.read(self.pipe, 1 << 16)
            self.said += part
            if part:
                return None
        os.close(self.pipe)
        if late:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        end, _, words = self.said.decode(errors="replace").partition("\n")
        found = End[end] if end else End.HANG if late else End.CRASH
        if _digest(self.foreign) != self.before:
            found = End.LOST
        if found is End.CRASH:
            found = End.HANG if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else found
            words = f"status {status}"
        shutil.rmtree(self.directory, ignore_errors=True)
        return Outcome(self.attack, found, words)


def _digest(directory: Path) -> str:
    found = hashlib.sha256()
    for name in FOREIGN:
        file = directory / name
        found.update(name.encode() + (file.read_bytes() if file.is_file() else b"/"))
    return found.hexdigest()


def _attack(attack: Attack, directory: Path, end: int) -> None:
    """Attack, say what came of it, and end this process, whatever happens."""
    try:
        devnull = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(devnull, stream)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))
        work = directory / "work"
        work.mkdir()
        os.chdir(work)
        os.environ["HOME"] = str(directory)
        os.environ[CANARY] = str(directory / "canary")
        os.write(end, _outcome(attack, work).encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def _outcome(attack: Attack, work: Path) -> str:
    from graph.errors import GraphError
    from osscar.base.errors import OsscarError
    from solvers.errors import SolverError

    try:
        try:
            wrong = attack.act(work, random.Random(attack.seed))
        finally:
            ran = Path(os.environ[CANARY]).exists()
        if ran:
            wrong = "foreign code ran"
    except (OsscarError, SolverError, GraphError) as error:
        text = str(error)
        if not text.strip() or len(text) > 8000:
            return f"TRACEBACK\n{len(text)} characters of an error: {text[:200]}"
        return f"CLEAR\n{type(error).__name__}: {text[:300]}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "osscar" in f.filename]
        last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        return f"TRACEBACK\n{type(error).__name__}: {str(error)[:200]} [{' '.join(ours)} {last}]"
    return "RIGHT\n" if wrong is None else f"WRONG\n{wrong}"
