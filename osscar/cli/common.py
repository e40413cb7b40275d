"""What the commands share: the screen, errors, and what ``--json`` writes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from cyclopts import CycloptsError
from cyclopts.exceptions import RepeatArgumentError, UnusedCliTokensError
from rich.console import Console
from rich.text import Text

from osscar import __version__
from osscar.base import files
from osscar.base.errors import BusyError, OptionError, OsscarError, OutputError, RanksError
from osscar.base.files import file_target, resolved
from osscar.base.inputs import named_from
from osscar.base.printable import capitalized, printable
from osscar.report.sections import Section
from osscar.report.shown import print_section

_PIPE_WIDTH = 140
"""Columns where the output is not a terminal, which has no width of its own."""


class _PlainConsole(Console):
    """A console that shows names as they are, and cuts nothing where the output is a file."""

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.is_terminal:
            texts = all(isinstance(one, str) for one in objects)
            options = {"crop": False, **({"soft_wrap": True} if texts else {}), **options}
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        plain = {"markup": False, "emoji": False}
        return super().render_str(printable(text, keep="\n"), **{**options, **plain})


out = _PlainConsole(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = _PlainConsole(stderr=True)


@contextmanager
def guard() -> Iterator[None]:
    """Turn errors that a user can cause into one line on standard error and status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
    except KeyboardInterrupt as error:
        said = getattr(error, "__notes__", ["nothing was left half-written"])
        say_aside("interrupted", said[-1], "yellow")
        sys.exit(128 + (error.args or (signal.SIGINT,))[0])
    except (OsscarError, CycloptsError) as error:
        _refuse(error)
    except Exception as error:
        # Errors of the other packages can only come once these are loaded.
        trees = (("solvers.errors", "SolverError"), ("graph.errors", "GraphError"))
        if not any(isinstance(error, getattr(sys.modules.get(m), n, ())) for m, n in trees):
            raise
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    if isinstance(error, CycloptsError):
        error.verbose = False  # which shows code
    message = str(error)
    if isinstance(error, RepeatArgumentError):
        message = f"{error.token.keyword} is given more than once; give it once"
    if isinstance(error, UnusedCliTokensError):
        tokens = " ".join(map(repr, error.unused_tokens or ()))
        message = f"unexpected argument {tokens}; --help lists what the command takes"
    say_aside("error", message, "bold red")
    sys.exit(2)


def say(text: str) -> None:
    """Print one line to standard output."""
    out.print(printable(text), highlight=False)


def show(*sections: Section) -> None:
    """Print what a result shows."""
    for section in sections:
        print_section(out, section)


def say_verdict(lost: str) -> None:
    """Print in a sentence how much was lost, if much was."""
    if lost:
        out.print(f"verdict: {lost}", style="bold yellow", highlight=False)


def say_aside(label: str, message: str, style: str) -> None:
    """Print one message to standard error, in one line that terminals wrap."""
    message = re.sub(r"\s*[\r\n]\s*", " ", message.strip())
    err.print(f"{label}:", style=style, end=" ")
    err.print(message, highlight=False, soft_wrap=True)


def document(kind: str, version: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with its schema, as ``docs/json.md`` describes it."""
    return {"schema": f"osscar.{kind}/{version}", "osscar_version": __version__, **content}


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a document whole or not at all; nothing if `path` is None."""
    if path is not None:
        known = named_from(content, path.parent) if "settings" in content else content
        files.write_json(path, known)


def check_json_path(
    path: Path | None, used: Iterable[str | Path] = (), option: str = "--json"
) -> None:
    """Refuse a file that cannot be written, or is or lies in what is `used`, before any work."""
    if path is None:
        return
    for one in used:
        if _covers(one, resolved(path)):
            raise OutputError(
                f"{option} {path} would write to {one}, which the command reads or writes; "
                "give another file"
            )
    file_target(path)


def _covers(used: str | Path, place: Path) -> bool:
    """Return whether `place` is `used`, under whatever name, or lies in it."""
    with suppress(OSError, RuntimeError, ValueError):
        found = Path(used).resolve()
        return place.is_relative_to(found) or place.samefile(found)
    return False


def check_files(options: object, *more: str | Path) -> None:
    """Refuse options that name missing files, or outputs that lie in what they or `more` name."""
    for file in named_files(options):
        if Path(file).suffix in _ENDINGS and not os.path.exists(os.path.expanduser(file)):
            raise OptionError(f"there is no file {str(file)!r}; check the path")
    used = [*more, *named_files(options)]
    written = {name: getattr(options, name, None) for name in ("out", "json", "svg")}
    for name, path in written.items():
        if path is not None:
            if name != "out":
                check_json_path(path, used, f"--{name}")
            used.append(path)


_READ = ("config", "dense", "weights", "calibration", "text", "images", "inputs")
"""Options of commands that name what is read."""

_ENDINGS = (".npz", ".safetensors", ".txt", ".pt", ".pth")
"""Of names that stand for nothing but files."""


def named_files(options: object) -> list[str | Path]:
    """Return what options name to be read."""
    return [found for name in _READ if (found := getattr(options, name, None)) is not None]


@contextmanager
def way_back(kept: Callable[[], str], *, restarts: bool = False) -> Iterator[None]:
    """Say what is `kept` and how to go on, if someone interrupts the block or it cannot write."""

    def told() -> str:
        if found := kept():
            without = " without --restart" if restarts else ""
            return f"{found}; run the same command again{without} to continue"
        return "no finished work was kept; run the same command again to start over"

    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(told())
        raise
    except BusyError:
        raise
    except (OutputError, RanksError) as error:
        raise type(error)(f"{error}. {capitalized(told())}") from error
