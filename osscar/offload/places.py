"""Values in files: where they lie, what becomes of them on a device, and which are kept there.

Files of others are read, not mapped into memory: a mapped file that is cut off ends the process.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from osscar.base.errors import FileError, ModelError, NonFiniteError, OutputError
from osscar.base.memory import in_words, memory_for, memory_of, numbered

PIECE = 16 << 20
"""Bytes that are read at once."""

DAMAGED = "the checkpoint is damaged, download it again"
"""What is said of weights that were read and are not finite."""


class Source:
    """A file that stays open, so that nobody takes it away between two reads.

    Whoever writes to it meanwhile changes its size or time, which are looked at after each read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = path.open("rb", buffering=0)
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
                "meanwhile, and start over",
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
                raise FileError(self.path, "it is cut off; download the checkpoint again")
            done += got
        self._check_unwritten()


class Chain(Source):
    """Stretches of files, one after the other, as if they were one file."""

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
        with self._room():
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self.end = 0

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Say where there is no room for what the block writes, and what helps."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write to a file in {self.path}: {error.strerror}; let the environment "
                "variable TMPDIR name a directory with room for the model"
            ) from error

    def _check_unwritten(self) -> None:
        """Do nothing: nobody else can write to a file without a name."""

    def append(self, rest: memoryview) -> int:
        """Write bytes at the end; return where that was."""
        begin = self.end
        with self._room():
            while rest:
                self._file.seek(self.end)
                written = self._file.write(rest[:PIECE])
                self.end, rest = self.end + written, rest[written:]
        return begin


def as_bytes(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return values.reshape(-1).view(torch.uint8).numpy().data


@dataclass(eq=False)
class StoredTensor:
    """The bytes of one tensor in a file; messages call it by its name."""

    source: Source
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.elements * self.dtype.itemsize

    def digest(self) -> bytes:
        """Return the SHA-256 of the bytes, which are read for it."""
        found = hashlib.sha256()
        for _, piece in self._pieces():
            found.update(as_bytes(piece))
        return found.digest()

    def largest(self) -> float:
        """Return the largest of all magnitudes; a NonFiniteError if one is NaN or infinite."""
        largest = 0.0
        for _, piece in self._pieces() if self.dtype.is_floating_point else ():
            low, high = piece.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise NonFiniteError(f"values of {self.name!r} are NaN or infinite", DAMAGED)
            largest = max(largest, -float(low), float(high))
        return largest

    def read(self, casts: Sequence[torch.dtype], device: torch.device) -> Tensor:
        """Return the values after some casts, on a device, to which they go piece by piece."""
        values = torch.empty(self.shape, dtype=casts[-1] if casts else self.dtype, device=device)
        into = values.view(-1)
        if device.type == "cpu" and not casts:
            for _ in self._pieces(into):
                pass
            return values
        for begin, piece in self._pieces(pinned=device.type == "cuda"):
            into[begin : begin + len(piece)] = _cast(piece.to(device), casts)
        return values

    def read_rows(self, rows: Tensor, casts: Sequence[torch.dtype], device: torch.device) -> Tensor:
        """Return some rows, (r,) int64, as `read`."""
        values = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        width = self.nbytes // max(self.shape[0], 1)
        for place, row in zip(values, rows.tolist(), strict=True):
            self.source.read_into(as_bytes(place), self.offset + row * width)
        return _cast(values.to(device), casts)

    def _pieces(
        self, into: Tensor | None = None, *, pinned: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Read all values piece by piece, to `into` or a buffer that is used again."""
        step = max(1, min(PIECE // self.dtype.itemsize, self.elements))
        if into is None:
            buffer = torch.empty(step, dtype=self.dtype, pin_memory=pinned)
        for begin in range(0, self.elements, step):
            count = min(step, self.elements - begin)
            piece = buffer[:count] if into is None else into[begin : begin + count]
            self.source.read_into(as_bytes(piece), self.offset + begin * self.dtype.itemsize)
            yield begin, piece


# ---- what becomes of values --------------------------------------------------------------

Step: TypeAlias = torch.dtype | Callable[[Tensor], Tensor]
"""What is done to values after they are read, which it may write to; a number format is a cast."""


def _is_cast(step: Step) -> TypeGuard[torch.dtype]:
    return isinstance(step, torch.dtype)


def _cast(values: Tensor, casts: Sequence[torch.dtype]) -> Tensor:
    for dtype in casts:
        values = values.to(dtype)
    return values


@dataclass(frozen=True)
class Place:
    """Where the values of a parameter are, their shape in the end, and how they come to it."""

    stored: StoredTensor
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the values in the end."""
        return next(filter(_is_cast, reversed(self.steps)), self.stored.dtype)

    @property
    def nbytes(self) -> int:
        """Memory that the values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def passing_bytes(self) -> int:
        """Memory that is needed while they are read, on the device that they come to."""
        first = self._leading_casts()
        read = self.stored.elements * (first[-1] if first else self.dtype).itemsize
        return read + 2 * PIECE + (self.nbytes if len(first) < len(self.steps) else 0)

    def selected(self, dim: int, index: Tensor) -> Place:
        """Return the place of some indices of a dimension."""
        dim = dim % len(self.shape)
        shape = (*self.shape[:dim], len(index), *self.shape[dim + 1 :])
        return self._then(lambda values: values.index_select(dim, index.to(values.device)), shape)

    def zeroed(self, dim: int, index: Tensor) -> Place:
        """Return the place of the values with zeros at some indices of a dimension."""
        return self._then(lambda values: values.index_fill_(dim, index.to(values.device), 0.0))

    def cast(self, dtype: torch.dtype) -> Place:
        """Return the place of the same values in another number format."""
        if dtype is self.dtype:
            return self
        casts = [at for at, step in enumerate(self.steps) if _is_cast(step)]
        if casts:
            at = casts[-1]
            before = replace(self, steps=self.steps[:at])
            if torch.promote_types(before.dtype, self.dtype) is self.dtype:
                # Selecting and filling are the same in either format.
                return replace(self, steps=self.steps[:at] + self.steps[at + 1 :]).cast(dtype)
        return self._then(dtype)

    def _then(self, step: Step, shape: tuple[int, ...] | None = None) -> Place:
        shape = self.shape if shape is None else shape
        return Place(self.stored, shape, (*self.steps, step))

    def read(self, device: torch.device) -> Tensor:
        """Return the values, read anew, on a device."""
        first = self._leading_casts()
        values = self.stored.read(first, device)
        for step in self.steps[len(first) :]:
            values = values.to(step) if _is_cast(step) else step(values)  # type: ignore[operator]
        return values

    def read_rows(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return some rows of the values, (r,) int64; None where they cannot be read alone."""
        casts = self._leading_casts()
        return self.stored.read_rows(rows, casts, device) if len(casts) == len(self.steps) else None

    def _leading_casts(self) -> list[torch.dtype]:
        return list(takewhile(_is_cast, self.steps))  # type: ignore[arg-type]


# ---- values that are kept ----------------------------------------------------------------


_CPU = torch.device("cpu")

_SPARE = 64 << 20
"""Bytes that are always left below the ceiling, for all that is small."""


class WeightCache:
    """Values that were read, kept for the next reader while there is room; the oldest go first."""

    def __init__(self, ceiling: int, device: torch.device = _CPU) -> None:
        self.ceiling = ceiling
        self.device = numbered(device)
        self.memory = memory_of(self.device)
        self.memory.give_back_at_once()
        self.read_bytes = 0
        """How much has been read from files."""
        self.left_free = _SPARE
        """Bytes below the ceiling that are for other things."""
        self._resident: OrderedDict[Place, tuple[Tensor, int]] = OrderedDict()
        self._scratch: Scratch | None = None
        self._elsewhere: dict[torch.device, WeightCache] = {self.device: self}

    def on(self, device: torch.device) -> WeightCache:
        """Return the cache of the same ceiling on a device, always the same one."""
        if device.type == "cuda" and device not in self._elsewhere:
            torch.empty(0, device=device)
        device = numbered(device)
        if device not in self._elsewhere:
            other = WeightCache(self.ceiling, device)
            self._elsewhere[device], other._elsewhere = other, self._elsewhere
        return self._elsewhere[device]

    @property
    def resident_bytes(self) -> int:
        """Memory of the values that are kept."""
        return sum(place.nbytes for place in self._resident)

    def values(self, place: Place) -> Tensor:
        """Return the values at a place; nobody may write to them."""
        if place in self._resident:
            found, version = self._resident.pop(place)
            _check_unwritten(place, found, version)
            self._make_room(0)  # what batches hold grows while nothing has to be read
        else:
            self._make_room(place.passing_bytes)
            with torch.inference_mode(False):  # whose tensors do not count who writes to them
                found = self.read(place)
            self.read_bytes += place.stored.nbytes
        self._resident[place] = (found, found._version)
        return found

    def rows(self, place: Place, rows: Tensor) -> Tensor:
        """Return some rows, (r,) int64, of the values at a place, read alone if possible."""
        few = None if place in self._resident else place.read_rows(rows, self.device)
        if few is None:
            return self.values(place)[rows]
        self.read_bytes += len(rows) * place.stored.nbytes // place.stored.shape[0]
        return few

    def read(self, place: Place) -> Tensor:
        """Return the values at a place, read anew and not kept, so that they may be written to."""
        what = f"{place.stored.name!r} on {self.device} ({in_words(place.nbytes)}, read from disk)"
        advice = (
            "give a smaller max_memory (`--max-memory`), so that fewer weights are cached, smaller "
            "batches (batch_size, `--batch-size`), or device cpu (`--device cpu`) if that has more "
            "memory"
        )
        with memory_for(what, advice):
            return place.read(self.device)

    def put(self, values: Tensor, name: str) -> Place:
        """Write values to disk; return the place from which they are read."""
        if self._scratch is None:
            self._scratch = Scratch()
        values = values.detach().contiguous().cpu()
        offset = self._scratch.append(as_bytes(values))
        shape = tuple(values.shape)
        return Place(StoredTensor(self._scratch, offset, shape, values.dtype, name), shape)

    def leave_free(self, room: int) -> None:
        """Leave so many bytes below the ceiling free for other things from now on."""
        self.left_free = max(self.left_free, room)
        self._make_room(0)

    @contextmanager
    def leaving(self, room: int) -> Iterator[None]:
        """Leave so many bytes below the ceiling free for other things while the block runs."""
        before = self.left_free
        self.leave_free(room)
        try:
            yield
        finally:
            self.left_free = before

    def _make_room(self, needed: int) -> None:
        excess = self.memory.excess(needed + self.left_free, self.ceiling)
        if excess <= 0:
            return
        while self._resident and excess > 0:
            place, (found, version) = self._resident.popitem(last=False)
            _check_unwritten(place, found, version)  # or what was written would be lost unseen
            excess -= place.nbytes
        self.memory.give_back()


def _check_unwritten(place: Place, values: Tensor, version: int) -> None:
    if values._version != version:
        raise ModelError(
            f"code of the model writes to {place.stored.name!r} while it runs, which is "
            "read from disk; omit max_memory (`--max-memory`)"
        )
