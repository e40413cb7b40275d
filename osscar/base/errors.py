"""Everything that OSSCAR refuses, as one tree of exceptions, and how its messages are worded.

A message names what was wrong, the offending value, and what to do about it. Catching
:class:`OsscarError` is enough to catch every error that a user can cause.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OsscarError(Exception):
    """Base of every error that OSSCAR raises on purpose."""

    def __str__(self) -> str:
        return for_reader(super().__str__())


class ModelError(OsscarError):
    """A model is not found or cannot be used: a typo, unreadable, unsafe, or not supported."""


class NoMemoryError(OsscarError):
    """A device has no memory left; the message says for what, and which option helps."""


class MissingDependency(OsscarError):
    """An optional package is needed; the message names it and the command that installs it."""


class DataError(OsscarError):
    """Data for calibration or evaluation are missing, damaged, too few, or do not fit a model."""


class RequestError(OsscarError):
    """What to keep makes no sense, or names what cannot be pruned; the message says why."""


class OptionError(OsscarError):
    """An option of a run is out of range, does not go with another, or does not exist here."""


class NonFiniteError(OsscarError):
    """NaN or infinity in weights, activations or logits: what is not finite, and a remedy."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what = what


class EquivalenceError(OsscarError):
    """The shrunk model does not compute what the masked model computes; nothing was written."""


class AdapterError(EquivalenceError):
    """A module cannot work without the units; the message names it and the line that failed."""


class JournalError(OsscarError):
    """A directory holds no run, sweep or study, or another one than what was asked for."""


class CheckpointError(OsscarError):
    """A directory does not hold a checkpoint that OSSCAR can read."""


class RanksError(OsscarError):
    """Another rank has failed or was killed, or ranks do not run alike; the message says which."""


class FileError(OsscarError):
    """A file from outside is unreadable, or does not hold what it should, for a reason in words."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{os.fspath(self.path)}: {for_reader(self.reason)}"


class OutputError(OsscarError):
    """The output cannot be written, or must not be: something else is there, or in use."""


class BusyError(OutputError):
    """Another process is writing there."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without a full stop, or else its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")


# ---- messages in the words of their reader ----------------------------------------------------
#
# They name an option as the command line has it, ``--max-memory 8GB``, and where Python's keyword
# is another one, that behind it, ``--inputs FILE (example_inputs= in Python)``. Outside of a
# command they are shown with keywords, ``max_memory=8GB``. What is in backquotes stays as it is.

_on_command_line = False

_COMMAND_ALONE = ("restart", "json", "report")
"""Options for which Python has no keyword."""

_NAME = r"(?<![\w-])--[a-z][a-z0-9-]*[a-z]"
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


_gathered: dict[str, dict[str, None]] | None = None
"""What warnings of a kind are of, by their message, while they are gathered."""


def warn_of(message: str, *names: str) -> None:
    """Warn of some things of many, such as layers, which a message names where it has ``{}``."""
    if _gathered is None:
        from osscar.base.printable import listed

        warn(message.replace("{}", listed(names, 8, "; ")))
    else:
        _gathered.setdefault(message, {}).update(dict.fromkeys(names))


@contextmanager
def gathered_warnings() -> Iterator[None]:
    """Have `warn_of` warn once of each kind, of all that there is, when the block ends."""
    global _gathered
    if _gathered is not None:  # inside of another such block
        yield
        return
    _gathered = {}
    try:
        yield
    finally:
        kinds, _gathered = _gathered, None
        for message, names in kinds.items():
            warn_of(message, *names)


# ---- optional packages -------------------------------------------------------------------------


def optional(module: str, extra: str, work: str, instead: str = "") -> Any:
    """Import a module of an optional package, or say which extra installs what `work` needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"{work} needs the package {module.partition('.')[0]!r}; install it with "
            f"`python3 -m pip install 'osscar[{extra}]'`{instead}"
        ) from error


def import_torchvision(module: str) -> Any:
    """Import a module of torchvision; MissingDependency if it is not installed."""
    return optional(f"torchvision.{module}", "vision", "a model or transform of torchvision")


def import_timm(module: str = "timm") -> Any:
    """Import timm, or a module of it; MissingDependency if it is not installed."""
    return optional(module, "timm", "a model of timm")
