"""What benchmarks share: rows in files, what a process takes, and tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Asked:
    """What a row is asked for: the base of dataclasses, which names the file that has the row."""

    @property
    def key(self) -> str:
        words = repr(dataclasses.astuple(self))  # type: ignore[call-overload]
        return hashlib.sha256(words.encode()).hexdigest()[:16] + ".json"


def read(file: Path) -> dict[str, Any]:
    """Return the row in a file."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def rows_in(directory: Path) -> list[dict[str, Any]]:
    """Return all rows of a directory."""
    return [read(file) for file in sorted(directory.glob("*.json"))]


def markdown(rows: Sequence[Sequence[object]], words: int = 1) -> list[str]:
    """Return a table whose first row is its head, and whose first columns hold words."""
    rule = ["---"] * words + ["---:"] * (len(rows[0]) - words)
    return [f"| {' | '.join(map(str, row))} |" for row in (rows[0], rule, *rows[1:])]


@dataclass(frozen=True)
class Measured:
    """What one command took: its greatest resident size in bytes, and seconds of the processor."""

    peak: int
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
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
output = child.stdout.read()
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps({
    "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "status": os.waitstatus_to_exitcode(status),
    "output": output,
}))
"""
