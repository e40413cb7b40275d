"""What a run takes: seconds by phase from inside, and its memory from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Clock:
    """Seconds spent in phases; what a phase within another takes is not counted in that.

    Parameters
    ----------
    phases
        Processor seconds, wall seconds and calls of each.
    bytes
        What functions that were given a size for it have moved, by the phase that called them.
    """

    phases: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    _running: list[str] = dataclasses.field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done within."""
        self._charge()
        self._running.append(name)
        self.phases.setdefault(name, [0.0, 0.0, 0])[2] += 1
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = time.process_time(), time.perf_counter()
        if self._running:
            spent = self.phases[self._running[-1]]
            spent[0] += now[0] - self._since[0]
            spent[1] += now[1] - self._since[1]
        self._since = now

    def watch(
        self, module: str, path: str, name: str, size: Callable[..., int] | None = None
    ) -> None:
        """Count the calls of a function of a module, or of a class in it, as a phase.

        Parameters
        ----------
        module, path
            Where it is found, under the name that its callers use.
        name
            The phase.
        size
            Says of the arguments of a call how many bytes it moves.
        """
        owner: Any = importlib.import_module(module)
        *outer, last = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original = vars(owner)[last]
        function = original.__func__ if isinstance(original, classmethod) else original

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if size is not None:
                caller = next((p for p in reversed(self._running) if p != name), "rest")
                self.bytes[caller] = self.bytes.get(caller, 0) + size(*args, **kwargs)
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, last, classmethod(timed) if isinstance(original, classmethod) else timed)


@dataclass(frozen=True)
class Measured:
    """What one command took.

    Parameters
    ----------
    peak
        Greatest resident size, in bytes.
    seconds, cpu_seconds
        Wall time, and that of the processor.
    status
        With which it ended.
    output
        What it has printed.
    """

    peak: int
    seconds: float
    cpu_seconds: float
    status: int
    output: str


def measured(command: Sequence[str]) -> Measured:
    """Run a command in a process of its own, and say what it took.

    A child begins with the greatest size of the process that starts it, so that a small one does.
    """
    starter = [sys.executable, "-I", "-S", "-c", _STARTER, *command]
    started = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(started.stdout))


_STARTER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
output = child.stdout.read()
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps({
    "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    "seconds": time.perf_counter() - began,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "status": os.waitstatus_to_exitcode(status),
    "output": output,
}))
"""
