"""New processes, forked from this one as it was before any test had run.

To start Python and import torch and transformers takes seconds, and the tests save many models:
`forked` stands in for `read_back.new_python`, but for the tests that are about new processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from osscar.checkpoint import read_back


class _Template:
    """A child that runs nothing, and forks whenever a checkpoint is to be read."""

    def __init__(self) -> None:
        asked, answered = os.pipe(), os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(asked[1])
            try:
                _serve(asked[0], answered[1])
            finally:
                os._exit(0)
        os.close(asked[0]), os.close(answered[1])
        self._tasks, self._statuses = os.fdopen(asked[1], "w"), os.fdopen(answered[0])

    def run(self, folder: Path) -> int:
        # Code of models that has been imported here it imports once, and not in each fork.
        known = [m for m in sys.modules if m.startswith("transformers.") and ".modeling_" in m]
        print(json.dumps([str(folder), *known]), file=self._tasks, flush=True)
        return int(self._statuses.readline())

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._tasks.close(), self._statuses.close()


def _serve(asked: int, answered: int) -> None:
    """Read lines of a folder and of modules to import; fork, work there, and write its status."""
    with os.fdopen(asked) as tasks, os.fdopen(answered, "w") as statuses:
        for line in tasks:
            folder, *modules = json.loads(line)
            for module in modules:
                import_module(module)
            child = os.fork()
            if not child:
                _work(folder)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=statuses, flush=True)


def _work(folder: str) -> None:
    status = 1
    try:
        import transformers.dynamic_module_utils as code

        code.HF_MODULES_CACHE = f"{folder}/modules"
        said = os.open(f"{folder}/said", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)
        read_back.work(folder)
        status = 0
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
    finally:
        os._exit(status)


def here(folder: Path) -> int:
    """Start no new process at all, for a card that this one alone pretends to have."""
    read_back.work(str(folder))
    return 0


@contextmanager
def forked() -> Iterator[None]:
    """Fork the processes that read checkpoints back, while the block runs."""
    template = _Template()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_back, "new_python", template.run)
        yield
    template.end()
