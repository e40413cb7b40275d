"""Where values lie in files, how they come to a device, and what is done to them there."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from osscar.base.devices import is_host
from osscar.base.errors import FileError, NonFiniteError
from osscar.offload.sources import PIECE, Source, Stamp, as_bytes


@dataclass(eq=False)
class Slice:
    """The bytes of one tensor in a file."""

    source: Source
    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype
    """Number format in the file."""
    name: str
    """What messages call it."""
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

    def read(self, casts: Sequence[torch.dtype], device: torch.device) -> Tensor:
        """Return the values after some casts, on a device, to which they go piece by piece."""
        values = torch.empty(self.shape, dtype=casts[-1] if casts else self.stored, device=device)
        into = values.view(-1)
        if is_host(device) and not casts:
            self._pass(lambda begin, count: into[begin : begin + count], lambda *_: None)
            return values
        on_card = device.type == "cuda"
        buffer = torch.empty(self._step, dtype=self.stored, pin_memory=on_card)

        def store(begin: int, piece: Tensor) -> None:
            into[begin : begin + len(piece)] = _cast(piece.to(device), casts)

        self._pass(lambda _, count: buffer[:count], store)
        return values

    def read_rows(
        self, rows: Tensor, casts: Sequence[torch.dtype], device: torch.device
    ) -> Tensor | None:
        """Return some rows, (r,) int64, as `read`; None where the whole has to be digested."""
        before = self.source.stamp()
        if self._digest is None or before is None or before != self._stamp:
            return None
        values = torch.empty(len(rows), *self.shape[1:], dtype=self.stored)
        width = self.nbytes // max(self.shape[0], 1)
        for place, row in zip(values, rows.tolist(), strict=True):
            self.source.read_into(as_bytes(place), self.offset + row * width)
        if self.source.stamp() != before:
            return None
        return _cast(values.to(device), casts)

    @property
    def _step(self) -> int:
        return min(PIECE // self.stored.itemsize, math.prod(self.shape))

    def _pass(self, room: Callable[[int, int], Tensor], use: Callable[[int, Tensor], None]) -> None:
        """Read all bytes, piece by piece, and hold them to what they were.

        They are what they were if nobody has written to the file since; where that is not known,
        they are digested again.  `room` returns where so many values, from one on, are to be read
        to, and `use` is given them.
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

    slice: Slice
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, values: Slice) -> Place:
        """Return the place of values as the file has them."""
        return cls(values, values.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the values in the end."""
        return next(filter(_is_cast, reversed(self.steps)), self.slice.stored)

    @property
    def nbytes(self) -> int:
        """Memory that the values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def passing_bytes(self) -> int:
        """Memory that is needed while they are read, on the device that they come to."""
        first = self._leading_casts()
        read = math.prod(self.slice.shape) * (first[-1] if first else self.dtype).itemsize
        return read + 2 * PIECE + (self.nbytes if len(first) < len(self.steps) else 0)

    def selected(self, dim: int, index: Tensor) -> Place:
        """Return the place of some indices of a dimension."""
        dim = dim % len(self.shape)
        shape = (*self.shape[:dim], len(index), *self.shape[dim + 1 :])
        return Place(
            self.slice,
            shape,
            (*self.steps, lambda values: values.index_select(dim, index.to(values.device))),
        )

    def zeroed(self, dim: int, index: Tensor) -> Place:
        """Return the place of the values with zeros at some indices of a dimension."""
        return replace(
            self,
            steps=(
                *self.steps,
                lambda values: values.index_fill_(dim, index.to(values.device), 0.0),
            ),
        )

    def cast(self, dtype: torch.dtype) -> Place:
        """Return the place of the same values in another number format.

        A format that held them all, and back, is no step.
        """
        if dtype is self.dtype:
            return self
        casts = [at for at, step in enumerate(self.steps) if _is_cast(step)]
        if casts:
            at = casts[-1]
            before = replace(self, steps=self.steps[:at])
            if torch.promote_types(before.dtype, self.dtype) is self.dtype:
                # Selecting and filling are the same in either format.
                return replace(self, steps=self.steps[:at] + self.steps[at + 1 :]).cast(dtype)
        return replace(self, steps=(*self.steps, dtype))

    def read(self, device: torch.device) -> Tensor:
        """Return the values, read anew, on a device."""
        first = self._leading_casts()
        values = self.slice.read(first, device)
        for step in self.steps[len(first) :]:
            values = values.to(step) if _is_cast(step) else step(values)  # type: ignore[operator]
        return values

    def read_rows(self, rows: Tensor, device: torch.device) -> Tensor | None:
        """Return some rows of the values, (r,) int64; None where they cannot be read alone."""
        casts = self._leading_casts()
        return self.slice.read_rows(rows, casts, device) if len(casts) == len(self.steps) else None

    def _leading_casts(self) -> list[torch.dtype]:
        return list(takewhile(_is_cast, self.steps))  # type: ignore[arg-type]
