"""The command line: one module a command, and the frame around them all."""

from __future__ import annotations

import importlib
import io
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from osscar import __version__
from osscar.base.errors import OptionError, RanksError
from osscar.base.files import is_text
from osscar.base.launch import launched
from osscar.cli.common import err, guard, out

_COMMANDS = ("demo", "prune", "sweep", "eval", "inspect", "export", "gap", "solve", "backends")

_HELP = """Prune a network in one shot, and know how good the result is.

Start with `osscar demo`; then `osscar prune MODEL --sparsity 0.3 --out DIR`.
"""

_TOGETHER = ("prune",)
"""The commands that several processes can share."""


def build() -> typer.Typer:
    """Assemble the application from the modules of the commands."""
    app = typer.Typer(
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_check_launch)
    for name in _COMMANDS:
        module = importlib.import_module(f"osscar.cli.{name}")
        app.command(name)(module.command)
    return app


def _told_version(wanted: bool) -> None:
    """Say which versions run, and end."""
    if wanted:
        typer.echo(f"osscar {__version__} (torch {metadata.version('torch')})")
        raise typer.Exit


def _check_launch(
    context: typer.Context,
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which version this is.", callback=_told_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Refuse to run a command in several processes that runs in one, and let one of them speak."""
    rank, size = launched()
    out.quiet = err.quiet = rank > 0  # one speaks for all
    if size > 1 and context.invoked_subcommand not in _TOGETHER:
        raise RanksError(
            f"osscar {context.invoked_subcommand} runs in one process, and {size} were launched; "
            "run it without torchrun, which `osscar prune` can be launched with"
        )


def main() -> None:
    """Run the command line; errors that a user can cause end in one line and status 2."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # better an escape than no output at all
            stream.reconfigure(errors="backslashreplace")
    with guard():
        _check_arguments(sys.argv[1:])
        build()()


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse names that no report could hold, before any work is done."""
    for argument in arguments:
        if not is_text(argument):
            raise OptionError(
                f"the argument {argument[:300]!a} is not UTF-8; rename the file or directory"
            )


def _terminated(number: int, _: object) -> NoReturn:
    """End as on any other error, so that nothing half-written stays behind."""
    sys.exit(128 + number)
