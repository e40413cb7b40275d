"""Errors and warnings in the words of who reads them: of the command line, or of Python.

Messages name an option as the command line has it, ``--max-memory 8GB``, and where Python's
keyword is another one, that behind it, ``--inputs FILE (example_inputs= in Python)``. Outside of a
command they are shown with keywords, ``max_memory=8GB``. What is in backquotes stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_on_command_line = False

_COMMAND_ALONE = ("restart", "json", "report", "dry-run")
"""Options for which Python has no keyword."""

_NAME = r"(?<![\w-])--[a-z][a-z-]*[a-z]"
_VALUE = (
    r" (?:'[^']*'|\d[\w./-]*|[A-Z]{2,}\w*|auto|cpu|cuda|b?float\d+|eager|exported|keep|measured"
    r"|uniform)(?![\w:])"
)
_OPTION = re.compile(
    r"(?P<code>`[^`]*`)"
    rf"|(?P<several>{_NAME}(?:{_VALUE})?(?:(?:, | and | or ){_NAME})*)"
    r" \((?P<keyword>[^()]*) in Python\)"
    rf"|(?P<name>{_NAME})(?P<value>{_VALUE})?"
)


@contextmanager
def on_command_line() -> Iterator[None]:
    """Let messages name options as the command line has them while the block runs."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def for_reader(message: str) -> str:
    """Return a message with options as its reader gives them.

    Examples
    --------
    >>> for_reader("raise --damp, or use --dtype float32 and --inputs FILE (samples= in Python)")
    'raise damp=, or use dtype=float32 and samples='
    """
    return _OPTION.sub(_named, message)


def _named(found: re.Match[str]) -> str:
    code, several, keyword, name, value = found.groups(default="")
    if code or _on_command_line or name[2:] in _COMMAND_ALONE:
        return code or several or name + value
    return keyword or f"{name[2:].replace('-', '_')}={value.lstrip()}"


def warn(message: str) -> None:
    """Warn at the line outside of the library that led to it."""
    from solvers.errors import warn as warn_outside  # loads torch, which help does without

    warn_outside(for_reader(message))
