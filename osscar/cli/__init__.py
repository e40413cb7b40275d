"""The command line: its commands, of which each is a module, and the frame around them all."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from osscar.base.errors import RanksError
from osscar.base.process import ends_at_once, handling, launched
from osscar.cli import commands
from osscar.cli.common import err, guard, out

_TOGETHER = ("prune", "recover")
"""The commands that several processes can share."""


def main() -> None:
    """Run the command line; errors that a user can cause end in one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # better an escape than no output at all
            stream.reconfigure(errors="backslashreplace")
    with handling(ends_at_once), guard():
        arguments = sys.argv[1:]
        _check_launch(arguments)
        commands.app(arguments)
    sys.exit(0)


def _check_launch(arguments: Sequence[str]) -> None:
    """Refuse to run a command in several processes that runs in one, and let one of them speak."""
    rank, size = launched()
    out.quiet = err.quiet = rank > 0  # one speaks for all
    command = arguments[0] if arguments else ""
    if size > 1 and command not in _TOGETHER:
        raise RanksError(
            f"osscar {command} runs in one process, and {size} were launched; run it without "
            "torchrun, which `osscar prune` and `osscar recover` can be launched with"
        )
