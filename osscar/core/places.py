"""Where values lie in files, and what is done to them once they are read.

Files are read, not mapped into memory: a mapped file that is cut off ends the process.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from osscar.core.errors import FileError, NonFiniteError, OutputError

_PIECE = 16 << 20
"""Bytes that are read at once."""


# ---- files -------------------------------------------------------------------------------


class Source:
    """A file that stays open, so that nobody takes it away between two reads.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileError
        If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = path.open("rb", buffering=0)
        except OSError as error:
            raise FileError(path, f"it cannot be read: {error.strerror}") from error

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on.

        Raises
        ------
        FileError
            If the file ends before, or the disk refuses.
        """
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

    def append(self, rest: memoryview) -> int:
        """Write bytes at the end; return where that was."""
        begin = self.end
        while rest:
            try:
                self._file.seek(self.end)
                written = self._file.write(rest[:_PIECE])
            except OSError as error:
                raise self._no_room(error) from error
            self.end, rest = self.end + written, rest[written:]
        return begin


def as_bytes(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return values.reshape(-1).view(torch.uint8).numpy().data


# ---- where values are, and what becomes of them ------------------------------------------


class Step(Protocol):
    """Something that is done to values after they are read."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is made of values of a shape."""

    def apply(self, values: Tensor) -> Tensor:
        """Return what is made of values, which may be written to."""


@dataclass(frozen=True)
class Cast:
    """Values in another number format."""

    dtype: torch.dtype

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the same shape."""
        return shape

    def apply(self, values: Tensor) -> Tensor:
        """Return them in that format."""
        return values.to(self.dtype)


@dataclass(frozen=True, eq=False)
class Selected:
    """A part of the indices of a dimension."""

    dim: int
    index: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, smaller in that dimension."""
        dim = self.dim % len(shape)
        return (*shape[:dim], len(self.index), *shape[dim + 1 :])

    def apply(self, values: Tensor) -> Tensor:
        """Return these indices."""
        return values.index_select(self.dim, self.index)


@dataclass(frozen=True, eq=False)
class Filled:
    """Zero at some indices of a dimension."""

    dim: int
    index: Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the same shape."""
        return shape

    def apply(self, values: Tensor) -> Tensor:
        """Return the values, zero there."""
        return values.index_fill_(self.dim, self.index, 0.0)


@dataclass(eq=False)
class Slice:
    """The bytes of one tensor in a file.

    Parameters
    ----------
    source, offset
        The file, and where in it they begin.
    shape, stored
        Of the tensor: shape, and number format in the file.
    name
        What messages call it.
    """

    source: Source
    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype
    name: str
    _digest: bytes | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return math.prod(self.shape) * self.stored.itemsize

    @property
    def digest(self) -> bytes:
        """SHA-256 of the bytes."""
        if self._digest is None:
            buffer = torch.empty(self._step, dtype=self.stored)
            self._pass(lambda begin, count: buffer[:count], lambda begin, piece: None)
        assert self._digest is not None
        return self._digest

    def read(self, casts: Sequence[Cast]) -> Tensor:
        """Return the values after some casts, which are done piece by piece.

        Raises
        ------
        FileError
            If the file is cut off, or holds other bytes than when they were first read.
        NonFiniteError
            If a value is NaN or infinite.
        """
        values = torch.empty(self.shape, dtype=casts[-1].dtype if casts else self.stored)
        into = values.view(-1)
        if not casts:
            self._pass(lambda begin, count: into[begin : begin + count], lambda *_: None)
            return values
        buffer = torch.empty(self._step, dtype=self.stored)

        def store(begin: int, piece: Tensor) -> None:
            count = len(piece)
            for cast in casts:
                piece = cast.apply(piece)
            into[begin : begin + count] = piece

        self._pass(lambda _, count: buffer[:count], store)
        return values

    @property
    def _step(self) -> int:
        return min(_PIECE // self.stored.itemsize, math.prod(self.shape))

    def _pass(self, room: Callable[[int, int], Tensor], use: Callable[[int, Tensor], None]) -> None:
        """Read all bytes, piece by piece, and hold them to what they were.

        Parameters
        ----------
        room
            Returns where so many values, from one on, are to be read to.
        use
            Is given them.
        """
        found, total = hashlib.sha256(), math.prod(self.shape)
        for begin in range(0, total, max(self._step, 1)):
            piece = room(begin, min(self._step, total - begin))
            place = as_bytes(piece)
            self.source.read_into(place, self.offset + begin * self.stored.itemsize)
            found.update(place)
            self._check_finite(piece)
            use(begin, piece)
        if self._digest not in (None, found.digest()):
            raise FileError(
                self.source.path,
                f"the values of {self.name!r} were others when they were read before; let nothing "
                "write to the checkpoint meanwhile, and begin anew",
            )
        self._digest = found.digest()

    def _check_finite(self, piece: Tensor) -> None:
        if self._digest is not None or not piece.is_floating_point():
            return
        low, high = piece.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise NonFiniteError(
                f"values of {self.name!r} are NaN or infinite; the checkpoint is damaged, get it "
                "anew"
            )


@dataclass(frozen=True)
class Place:
    """Where the values of a parameter are, and what is done to them once they are read."""

    slice: Slice
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values in the end."""
        shape = self.slice.shape
        for step in self.steps:
            shape = step.shape(shape)
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the values in the end."""
        casts = [step for step in self.steps if isinstance(step, Cast)]
        return casts[-1].dtype if casts else self.slice.stored

    @property
    def nbytes(self) -> int:
        """Memory that the values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def passing_bytes(self) -> int:
        """Memory that is needed while they are read."""
        first = self._leading_casts()
        read = math.prod(self.slice.shape) * (first[-1].dtype if first else self.dtype).itemsize
        return read + 2 * _PIECE + (self.nbytes if len(first) < len(self.steps) else 0)

    def then(self, step: Step) -> Place:
        """Return the place with one more step."""
        return replace(self, steps=(*self.steps, step))

    def cast(self, dtype: torch.dtype) -> Place:
        """Return the place of the same values in another number format.

        A format that held them all, and back, is no step.
        """
        if dtype is self.dtype:
            return self
        casts = [at for at, step in enumerate(self.steps) if isinstance(step, Cast)]
        if casts:
            at = casts[-1]
            before = replace(self, steps=self.steps[:at])
            if torch.promote_types(before.dtype, self.dtype) is self.dtype:
                # Selecting and filling are the same in either format.
                return replace(self, steps=self.steps[:at] + self.steps[at + 1 :]).cast(dtype)
        return self.then(Cast(dtype))

    def read(self) -> Tensor:
        """Return the values, read anew."""
        first = self._leading_casts()
        values = self.slice.read(first)
        for step in self.steps[len(first) :]:
            values = step.apply(values)
        return values

    def _leading_casts(self) -> list[Cast]:
        first: list[Cast] = []
        for step in self.steps:
            if not isinstance(step, Cast):
                break
            first.append(step)
        return first
