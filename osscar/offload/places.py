"""Where values lie in files, how they come to a device, and what is done to them there."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from osscar.base.devices import is_host
from osscar.base.errors import FileError, NonFiniteError
from osscar.offload.sources import PIECE, Source, Stamp, as_bytes

# ---- where values are, and what becomes of them ------------------------------------------


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
        return values.index_select(self.dim, self.index.to(values.device))


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
        return values.index_fill_(self.dim, self.index.to(values.device), 0.0)


Step: TypeAlias = Cast | Selected | Filled
"""What is done to values after they are read; they may be written to."""


class StagingBuffers:
    """Memory of the host that the pieces of a file pass through on their way to a device.

    Of those to a card, one is read while the last is still being copied: two are enough, and no
    more are held, however much the card has to do before it copies them.

    Parameters
    ----------
    numbers
        The most of a piece.
    dtype
        Their number format.
    device
        Where they go.
    """

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device, self._turn, pinned = device, 0, device.type == "cuda"
        self._buffers = [
            torch.empty(numbers, dtype=dtype, pin_memory=pinned) for _ in range(1 + pinned)
        ]
        self._copied = [torch.cuda.Event() for _ in range(2 * pinned)]  # type: ignore[no-untyped-call]

    def next(self, count: int) -> Tensor:
        """Return where the next piece, of so many numbers, is to be read to."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._copied:
            self._copied[self._turn].synchronize()
        return self._buffers[self._turn][:count]

    def sent(self, piece: Tensor) -> Tensor:
        """Return a piece that was read, on the device, where its copy comes before all else."""
        there = piece.to(self._device, non_blocking=True)
        if self._copied:
            self._copied[self._turn].record(torch.cuda.current_stream(self._device))
        return there


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
    largest: float = field(default=0.0, repr=False)
    """Of all magnitudes, once the digest is known."""
    _digest: bytes | None = field(default=None, repr=False)
    _stamp: Stamp | None = field(default=None, repr=False)

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

    def read(self, casts: Sequence[Cast], device: torch.device) -> Tensor:
        """Return the values after some casts, on a device, to which they go piece by piece.

        Parameters
        ----------
        casts
            What is done to each piece, there.
        device
            Where to.

        Raises
        ------
        FileError
            If the file is cut off, or holds other bytes than when they were first read.
        NonFiniteError
            If a value is NaN or infinite.
        """
        dtype = casts[-1].dtype if casts else self.stored
        values = torch.empty(self.shape, dtype=dtype, device=device)
        into = values.view(-1)
        if is_host(device) and not casts:
            self._pass(lambda begin, count: into[begin : begin + count], lambda *_: None)
            return values
        buffers = StagingBuffers(self._step, self.stored, device)

        def store(begin: int, piece: Tensor) -> None:
            count = len(piece)
            piece = buffers.sent(piece)
            for cast in casts:
                piece = cast.apply(piece)
            into[begin : begin + count] = piece

        self._pass(lambda _, count: buffers.next(count), store)
        return values

    def read_rows(self, rows: Tensor, casts: Sequence[Cast], device: torch.device) -> Tensor | None:
        """Return some rows after some casts; None where the whole has to be digested first.

        Parameters
        ----------
        rows
            Which, (r,) int64.
        casts
            What is done to them.
        device
            Where to.
        """
        before = self.source.stamp()
        if self._digest is None or before is None or before != self._stamp:
            return None
        values = torch.empty(len(rows), *self.shape[1:], dtype=self.stored)
        width = self.nbytes // max(self.shape[0], 1)
        for place, row in zip(values, rows.tolist(), strict=True):
            self.source.read_into(as_bytes(place), self.offset + row * width)
        if self.source.stamp() != before:
            return None
        values = values.to(device)
        for cast in casts:
            values = cast.apply(values)
        return values

    @property
    def _step(self) -> int:
        return min(PIECE // self.stored.itemsize, math.prod(self.shape))

    def _pass(self, room: Callable[[int, int], Tensor], use: Callable[[int, Tensor], None]) -> None:
        """Read all bytes, piece by piece, and hold them to what they were.

        They are what they were if nobody has written to the file since; where that is not known,
        they are digested again.

        Parameters
        ----------
        room
            Returns where so many values, from one on, are to be read to.
        use
            Is given them.
        """
        before = self.source.stamp()
        if self._digest is not None and before is not None and before == self._stamp:
            self._read(room, use)
            if self.source.stamp() == before:
                return
        found = hashlib.sha256()
        self._read(room, use, found.update)
        if self._digest not in (None, found.digest()):
            raise FileError(
                self.source.path,
                f"the values of {self.name!r} were others when they were read before; let nothing "
                "write to the checkpoint meanwhile, and begin anew",
            )
        self._digest, self._stamp = found.digest(), before

    def _read(
        self,
        room: Callable[[int, int], Tensor],
        use: Callable[[int, Tensor], None],
        digest: Callable[[memoryview], None] = lambda _: None,
    ) -> None:
        total = math.prod(self.shape)
        for begin in range(0, total, max(self._step, 1)):
            piece = room(begin, min(self._step, total - begin))
            place = as_bytes(piece)
            self.source.read_into(place, self.offset + begin * self.stored.itemsize)
            digest(place)
            self._check_finite(piece)
            use(begin, piece)

    def _check_finite(self, piece: Tensor) -> None:
        if self._digest is not None or not piece.is_floating_point():
            return
        low, high = piece.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise NonFiniteError(
                f"values of {self.name!r} are NaN or infinite; the checkpoint is damaged, get it "
                "anew"
            )
        self.largest = max(self.largest, -float(low), float(high))


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
        """Memory that is needed while they are read, on the device that they come to."""
        first = self._leading_casts()
        read = math.prod(self.slice.shape) * (first[-1].dtype if first else self.dtype).itemsize
        return read + 2 * PIECE + (self.nbytes if len(first) < len(self.steps) else 0)

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

    def read(self, device: torch.device) -> Tensor:
        """Return the values, read anew, on a device."""
        first = self._leading_casts()
        values = self.slice.read(first, device)
        for step in self.steps[len(first) :]:
            values = step.apply(values)
        return values

    def read_rows(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return some rows of the values, (r,) int64; None where they cannot be read alone."""
        casts = self._leading_casts()
        return self.slice.read_rows(rows, casts, device) if len(casts) == len(self.steps) else None

    def _leading_casts(self) -> list[Cast]:
        first: list[Cast] = []
        for step in self.steps:
            if not isinstance(step, Cast):
                break
            first.append(step)
        return first
