"""A copy of the checkout in which one line of the source is wrong, and tests that run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

_TEMPLATE = """
import os, signal, sys
import cyclopts, hypothesis, matplotlib.figure, pydantic, pytest, rich.console, scipy.optimize
import torch._dynamo, torch.distributed, torch.export, torchvision, transformers.models.auto
import transformers.models.llama.modeling_llama, transformers.models.opt.modeling_opt
for line in sys.stdin:
    log, *tests = line.split()
    child = os.fork()
    if not child:
        signal.alarm(600)  # where a fault has processes wait for each other
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.path.insert(0, os.getcwd())
        os._exit(pytest.main(["-qx", "-n0", "-m", "", "-p", "no:cacheprovider", *tests]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks a process for each line, as it takes seconds to import these."""


class Fault(NamedTuple):
    """A change of the source that a test has to find."""

    file: str
    test: str
    """The test that fails then, as pytest calls it."""
    stands: str
    """Once in the file."""
    instead: str

    def planted(self, source: str) -> str:
        """Return the text of the file with the fault."""
        return source.replace(self.stands, self.instead)


def read_faults(text: str) -> list[Fault]:
    """Read faults: a line of the file and the test, what stands behind ``-``, what replaces it."""
    found = []
    for block in re.split(r"\n\n+", text):
        first, *lines = block.strip("\n").split("\n")
        if first and not first.startswith("#"):
            old, new = ("\n".join(x[2:] for x in lines if x[0] == sign) for sign in "-+")
            found.append(Fault(*first.split(), old, new))
    return found


class Copy:
    """A copy of the checkout, and the process that runs tests in it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        skipped = shutil.ignore_patterns(".*", "dist", "build", "site")
        shutil.copytree(ROOT, self.root, ignore=skipped)
        self._log = directory / "log"
        self._times = count(1)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TEMPLATE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env={**_plain(os.environ), "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"},
        )

    def run(self, *tests: str) -> tuple[int, str]:
        """Return the status of pytest, and what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(self._log, *tests, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline()), self._log.read_text(errors="replace")

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """Let the fault stand in the copy while the block runs."""
        path = self.root / fault.file
        before, stamp = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
        path.write_text(fault.planted(before), encoding="utf-8")
        at = 10**18 + next(self._times) * 10**9  # by which Python knows it from what it compiled
        os.utime(path, ns=(at, at))
        try:
            yield
        finally:
            path.write_text(before, encoding="utf-8")
            os.utime(path, ns=(stamp, stamp))

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _plain(environment: os._Environ[str]) -> dict[str, str]:
    """Return an environment in which nobody is a worker of pytest."""
    return {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
