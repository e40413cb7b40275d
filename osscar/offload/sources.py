"""Files that values are read from, or written to while the process runs.

Files of others are read, not mapped into memory: a mapped file that is cut off ends the process.
"""

from __future__ import annotations

import bisect
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osscar.base.errors import FileError, OutputError

PIECE = 16 << 20
"""Bytes that are read at once."""


class Source:
    """A file that stays open, so that nobody takes it away between two reads.

    Whoever writes to it meanwhile changes its size or time, which are looked at after each read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = path.open("rb", buffering=0)
        except OSError as error:
            raise FileError(path, f"it cannot be read: {error.strerror}") from error
        self._opened = self._stamp()

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _check_unwritten(self) -> None:
        if self._stamp() != self._opened:
            raise FileError(
                self.path,
                "it was written to since it was opened; let nothing write to the checkpoint "
                "meanwhile, and begin anew",
            )

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on."""
        done = 0
        while done < len(buffer):
            try:
                self._file.seek(offset + done)
                got = self._file.readinto(buffer[done:])
            except OSError as error:
                raise FileError(self.path, f"it cannot be read: {error.strerror}") from error
            if not got:
                raise FileError(self.path, "it is cut off; get the checkpoint anew")
            done += got
        self._check_unwritten()


class Chain(Source):
    """Stretches of files, one after the other, as if they were one file.

    Each is a file, where it begins there, and how many bytes it has.
    """

    def __init__(self, stretches: Sequence[tuple[Source, int, int]]) -> None:
        self.path = stretches[0][0].path
        self._stretches = stretches
        self._ends = list(itertools.accumulate(nbytes for *_, nbytes in stretches))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on."""
        done, at = 0, bisect.bisect_right(self._ends, offset)
        while done < len(buffer):
            source, begin, nbytes = self._stretches[at]
            skipped = offset + done - (self._ends[at] - nbytes)
            count = min(nbytes - skipped, len(buffer) - done)
            source.read_into(buffer[done : done + count], begin + skipped)
            done, at = done + count, at + 1


class Scratch(Source):
    """A file without a name, for values that are written while the process runs."""

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._no_room(error) from error
        self.end = 0

    def _no_room(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write to a file in {self.path}: {error.strerror}; let the environment "
            "variable TMPDIR name a directory with room for the model"
        )

    def _check_unwritten(self) -> None:
        """Do nothing: nobody else can write to a file without a name."""

    def append(self, rest: memoryview) -> int:
        """Write bytes at the end; return where that was."""
        begin = self.end
        while rest:
            try:
                self._file.seek(self.end)
                written = self._file.write(rest[:PIECE])
            except OSError as error:
                raise self._no_room(error) from error
            self.end, rest = self.end + written, rest[written:]
        return begin


def as_bytes(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return values.reshape(-1).view(torch.uint8).numpy().data
