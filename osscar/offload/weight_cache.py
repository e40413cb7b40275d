"""Values that were read from disk, kept on a device as long as its memory has room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from osscar.base.errors import ModelError
from osscar.base.memory import FOR_WEIGHTS, in_words, memory_for, memory_of, numbered
from osscar.offload.places import Place, Scratch, StoredTensor, as_bytes

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
        with memory_for(what, FOR_WEIGHTS):
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
