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


_NOTHING: Mapping[str, str] = {}


@dataclass
class Forked:
    """A child, and what it has said when it has ended.

    Parameters
    ----------
    pid
        Its number.
    status
        How it ended, as the shell has it, and -n where signal n ended it; None until then.
    """

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
        return self._said(0)

    @property
    def stderr(self) -> str:
        """What it has said on standard error."""
        return self._said(1)

    def _said(self, number: int) -> str:
        self._streams[number].seek(0)
        return self._streams[number].read()


def forked(
    run: Callable[[], object], place: Path, environment: Mapping[str, str] = _NOTHING
) -> Forked:
    """Start a child.

    Parameters
    ----------
    run
        What it does; what it raises ends it as it ends an interpreter.
    place
        Its working directory.
    environment
        What is added to this process's variables.
    """
    out, err = _stream(), _stream()
    child = os.fork()
    if not child:
        _be(run, place, environment, out, err)
    return Forked(child, (out, err))


def _stream() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


def _be(
    run: Callable[[], object],
    place: Path,
    environment: Mapping[str, str],
    out: IO[str],
    err: IO[str],
) -> None:
    status = 1
    try:
        for number, stream in enumerate((out, err), 1):
            os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
        os.chdir(place)
        os.environ |= environment
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
