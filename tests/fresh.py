"""New processes, forked from one that has imported torch and transformers and run nothing.

To start Python and import these takes seconds, and the tests save many models: `forked` stands in
for `fresh_process.NewPython`, but for the tests that are about new processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from osscar.checkpoint import fresh_process

_TEMPLATE = """
import os, sys
from osscar.checkpoint.fresh_process import work
import osscar.cli.commands, osscar.walk.expert_walk, pytest, tests.osscar.families, torchvision
for line in sys.stdin:
    folder, modules = line.split()
    child = os.fork()
    if not child:
        status = 1
        try:
            import transformers.dynamic_module_utils as code
            code.HF_MODULES_CACHE = modules
            log = os.open(f"{folder}/said", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, 1), os.dup2(log, 2)
            work(folder)
            status = 0
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class _Template:
    """The process that is forked; started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, folder: Path) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TEMPLATE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(folder, folder / "modules", file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@dataclass
class _Instead:
    """What stands in for a new process: it begins once it is to go to work."""

    folder: Path
    work: Callable[[Path], int | None]

    def run(self) -> int:
        return self.work(self.folder) or 0

    def end(self) -> None:
        """It has ended."""


def here(folder: Path) -> _Instead:
    """Return no new process at all, for a card that this one alone pretends to have."""
    return _Instead(folder, lambda folder: fresh_process.work(str(folder)))


@contextmanager
def forked() -> Iterator[None]:
    """Fork the processes that read checkpoints back, while the block runs."""
    template = _Template()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh_process, "NewPython", lambda folder: _Instead(folder, template.run))
        yield
    template.end()
