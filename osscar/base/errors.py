"""Everything that OSSCAR refuses, as one tree of exceptions, and how its messages are worded.

A message names what was wrong, the offending value, and what to do about it. Where it advises, it
names a field as Python has it, and in backquotes the option of the command line. Catching
:class:`OsscarError` is enough to catch every error that a user can cause.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OsscarError(Exception):
    """Base of every error that OSSCAR raises on purpose."""


class ModelError(OsscarError):
    """A model is not found or cannot be used: a typo, unreadable, unsafe, or not supported."""


class NoMemoryError(OsscarError):
    """A device has no memory left; the message says for what, and which option helps."""


class MissingDependency(OsscarError):
    """An optional package is needed; the message names it and the command that installs it."""


class DataError(OsscarError):
    """Data for calibration or evaluation are missing, damaged, too few, or do not fit a model."""


@contextmanager
def of_part(part: str) -> Iterator[None]:
    """Say in a DataError of the block of which part of the data it is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{part}: {error}") from error


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
        return f"{os.fspath(self.path)}: {self.reason}"


class OutputError(OsscarError):
    """The output cannot be written, or must not be: something else is there, or in use."""


class BusyError(OutputError):
    """Another process is writing there."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without a full stop, or else its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")


def warn(message: str) -> None:
    """Warn at the line outside of the library that led to it."""
    from solvers.errors import warn as warn_outside  # loads torch, which help does without

    warn_outside(message)


_gathered: dict[str, dict[str, None]] | None = None
"""What warnings of a kind are of, by their message, while they are gathered."""


def warn_of(message: str, *names: str) -> None:
    """Warn of some things of many, such as layers, which a message names where it has ``{}``."""
    if _gathered is None:
        from osscar.base.printable import listed

        warn(message.replace("{}", listed(names, 3, "; ")))
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
        raise _missing(module, extra, work, instead) from error


def _missing(module: str, extra: str, work: str, instead: str = "") -> MissingDependency:
    return MissingDependency(
        f"{work} needs the package {module.partition('.')[0]!r}; install it with "
        f"`python3 -m pip install 'osscar[{extra}]'`{instead}"
    )


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx(work: str) -> None:
    """Raise a MissingDependency if a package is not there that ONNX takes; none is loaded."""
    for name in ONNX_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise _missing(name, "onnx", work)


def import_torchvision(module: str) -> Any:
    """Import a module of torchvision; MissingDependency if it is not installed."""
    return optional(f"torchvision.{module}", "vision", "a model or transform of torchvision")


def import_timm(module: str = "timm") -> Any:
    """Import timm, or a module of it; MissingDependency if it is not installed."""
    return optional(module, "timm", "a model of timm")
