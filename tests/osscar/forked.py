"""Children of this process, each of which runs something as a process of its own.

A new process takes seconds to import what this one has imported; a child has it from the start.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

PATIENCE = 900
"""Seconds that nothing takes, however busy the machine is."""


@dataclass
class Forked:
    """A child by its number, and its status once it has ended: as the shell has it, or -signal."""

    pid: int
    _streams: tuple[IO[str], IO[str]]
    status: int | None = field(default=None, init=False)

    def kill(self) -> None:
        """End it at once."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Return its status once it has ended."""
        end = time.monotonic() + PATIENCE
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} has not ended in {PATIENCE} seconds")
            else:
                time.sleep(0.01)
        return self.status

    @property
    def stdout(self) -> str:
        """What it has said on standard output."""
        self._streams[0].seek(0)
        return self._streams[0].read()

    @property
    def stderr(self) -> str:
        """What it has said on standard error."""
        self._streams[1].seek(0)
        return self._streams[1].read()


def forked(
    run: Callable[[], object], place: Path, environment: Mapping[str, str] | None = None
) -> Forked:
    """Start a child that runs something in a directory, with more variables of the environment.

    What it raises ends it as it ends an interpreter.
    """
    out, err = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115
    child = os.fork()
    if child:
        return Forked(child, (out, err))
    status = 1
    try:
        for number, stream in enumerate((out, err), 1):
            os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
        os.chdir(place)
        os.environ |= environment or {}
        torch.set_num_threads(1)
        run()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
