"""Pieces of a file on their way to a device: room to read each into, and its copy there."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Pieces(Protocol):
    """Room of the host that the pieces of a file pass through."""

    def room(self, count: int) -> Tensor:
        """Return where the next piece, of so many numbers, is to be read to."""

    def sent(self, piece: Tensor) -> Tensor:
        """Return a piece that was read, on the device."""


class PlainPieces:
    """Pieces that are read one after the other into the same memory.

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
        self._device = device
        self._buffer = torch.empty(numbers, dtype=dtype)

    def room(self, count: int) -> Tensor:
        """Return where the next piece, of so many numbers, is to be read to."""
        return self._buffer[:count]

    def sent(self, piece: Tensor) -> Tensor:
        """Return a piece that was read, on the device."""
        return piece.to(self._device)


class PinnedPieces:
    """Pieces of which one is read while the last is still being copied to a card.

    Two are enough, and no more are held, however much the card has to do before it copies them.
    """

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(numbers, dtype=dtype, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def room(self, count: int) -> Tensor:
        """Return the memory of the piece before the last, once that has been copied."""
        self._turn = 1 - self._turn
        self._copied[self._turn].synchronize()
        return self._buffers[self._turn][:count]

    def sent(self, piece: Tensor) -> Tensor:
        """Return a piece on the card, where the copy comes before whatever is done to it."""
        there = piece.to(self._device, non_blocking=True)
        self._copied[self._turn].record(torch.cuda.current_stream(self._device))
        return there


def pieces_to(numbers: int, dtype: torch.dtype, device: torch.device) -> Pieces:
    """Return room for pieces that go to a device."""
    kind = PinnedPieces if device.type == "cuda" else PlainPieces
    return kind(numbers, dtype, device)
