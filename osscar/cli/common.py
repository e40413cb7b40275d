"""What the commands share: the screen, errors, and what ``--json`` writes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from osscar.base.files import resolved
from osscar.base.inputs import check_regular
from osscar.base.printable import capitalized, printable
from osscar.report.sections import Section
from osscar.report.terminal import print_section

_PIPE_WIDTH = 140
"""Columns where the output is not a terminal, which has no width of its own."""


class _PlainConsole(Console):
    """A console that takes text as it is: what is in a name neither marks up nor moves anything.

    What goes to a file is cut nowhere, and a sentence stays in its line.
    """

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
    """Turn the errors that a user can cause into one line on standard error and status 2.

    An interrupt has the status that shells know it by.
    """
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
    return {
        "schema": f"osscar.{kind}/{version}",
        "osscar_version": __version__,
        **content,
    }


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a document whole or not at all; nothing if `path` is None."""
    if path is not None:
        files.write_json(path, content)


def check_json_path(
    path: Path | None,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
    written: Sequence[Path | None] = (),
    option: str = "--json",
) -> None:
    """Refuse a file that could not or must not be written, before any work is done.

    Its directory has to exist; it must neither be nor lie in what the command reads or writes, nor
    replace a file of another sort.  Names in `inputs` that are no paths do no harm.
    """
    if path is None:
        return
    try:
        place = resolved(path)
        for used, verb in [
            *((name, "reads") for name in inputs),
            *((name, "writes") for name in written),
        ]:
            if used is not None and _covers(Path(used), place):
                raise OutputError(
                    f"{option} {path} would write to {used}, which the command {verb}; give "
                    "another file"
                )
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise OutputError(f"cannot write {path}: give a file in a directory that exists")
        if path.is_file() and path.open("rb").read(1) not in (b"", b"{", b"<", b"\x89", b"%"):
            raise OutputError(
                f"{path} exists, and is no JSON or drawing of OSSCAR; give another file"
            )
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from error


_READ = ("config", "dense", "weights", "calibration", "text", "images", "inputs", "recover_text")
_ENDINGS = (".npz", ".safetensors", ".txt", ".pt", ".pth")
"""Of names that stand for nothing but files."""

_WRITTEN = ("json", "svg")
"""Options of commands that name what is read, and single files that are written."""


def named_files(options: object) -> list[str | Path]:
    """Return what options name to be read."""
    return [found for name in _READ if (found := getattr(options, name, None)) is not None]


def check_files(options: object, *read: str | os.PathLike[str], out: Path | None = None) -> None:
    """Refuse files of options that must not be written, as `check_json_path` does.

    `read` is what the command reads beside what its options name, and `out` where its output goes,
    if that is no option of that name.  A file of data or weights that is missing is refused here,
    as a model is loaded before they are.
    """
    for name in named_files(options):
        if Path(name).suffix in _ENDINGS and not os.path.exists(os.path.expanduser(name)):
            raise OptionError(f"there is no file {str(name)!r}; check the path")
    written = [getattr(options, "out", None) if out is None else out]
    for name in _WRITTEN:
        path = getattr(options, name, None)
        check_json_path(path, (*read, *named_files(options)), written, f"--{name}")
        written.append(path)


def check_input(file: Path) -> None:
    """Refuse a pipe or a device, reading which may never end.

    Whoever reads the file will say what else is wrong.
    """
    try:
        check_regular(file)
    except OSError as error:
        raise OptionError(
            f"cannot read {str(file)!r}: {error.strerror}; copy it to a file first"
        ) from error


def _covers(used: Path, place: Path) -> bool:
    """Return whether `place` is `used`, under whatever name, or lies in it."""
    with suppress(OSError, RuntimeError):
        resolved = used.resolve()
        if resolved == place or resolved in place.parents:
            return True
        return used.exists() and place.exists() and used.samefile(place)
    return False


@contextmanager
def way_back(kept: Callable[[], str], *, restarts: bool = False) -> Iterator[None]:
    """Say how to go on where someone interrupts the block, or where it cannot write.

    What is kept by then, and where, is for `kept` to say; if that says nothing, nothing is.  A
    command that `restarts` goes on without the option that says so.
    """

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
