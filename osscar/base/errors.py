"""Everything that OSSCAR refuses, as one tree of exceptions.

A message names what was wrong, the offending value, and what to do about it. Catching
:class:`OsscarError` is enough to catch every error that a user can cause.
"""

from __future__ import annotations

import os

from osscar.base.messages import for_reader


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
    """NaN or infinity in weights, activations or logits; the message names the place.

    Parameters
    ----------
    what
        What is not finite.
    remedy
        What to do about it.
    """

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
    """A file from outside is unreadable, or does not hold what it should.

    Parameters
    ----------
    path
        The file.
    reason
        What is wrong with it, in words.
    """

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
    """Return the first line of what an error says, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
