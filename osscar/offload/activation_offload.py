"""Activations of suspended passes, kept in files while others run.

A pass that is suspended holds its hidden states, and what the consumer reads, as variables of the
functions that are running in it.  These tensors stay, and their values move: to a file that is
mapped into memory, from which the system reads whatever the pass touches when it goes on.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from osscar.base.devices import is_host
from osscar.base.memory import FOR_BATCHES, in_words, memory_for
from osscar.offload.on_disk import OnDisk
from osscar.offload.sources import Scratch, as_bytes

_SMALLEST = 1 << 12
"""Bytes of a tensor that is worth a place in a file."""

_ALIGNED = 64
"""Bytes of which each place in a file is a multiple, as of torch's own memory."""


class ActivationOffload(TorchFunctionMode):
    """Notes what one pass computes while it is entered, and keeps that in a file on demand.

    Kept are tensors that have a row for each sample or token of the batch that the pass reads.
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._samples, *rest = next(iter(batch.values())).shape
        self._tokens = rest[0] if rest else 1
        self._computed: dict[int, weakref.ref[Tensor]] = {}
        self._elsewhere: list[tuple[torch.device, list[Tensor]]] = []
        """What was on a card, and on which."""
        self.written_bytes = 0
        """How much was written to the last file."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._computed[id(value)] = weakref.ref(value)
        return out

    def put(self) -> None:
        """Move what the suspended pass holds to a file."""
        held = [tensor for ref in self._computed.values() if (tensor := ref()) is not None]
        self._computed = {id(tensor): weakref.ref(tensor) for tensor in held}
        storages: dict[int, list[Tensor]] = defaultdict(list)
        for tensor in filter(_is_plain, held):
            storages[tensor.untyped_storage().data_ptr()].append(tensor)
        waiting = [alike for alike in storages.values() if any(map(self._is_own, alike))]
        if not waiting:
            return
        file = Scratch()
        places = []
        for alike in waiting:
            places.append(file.append(as_bytes(_whole(alike[0].untyped_storage()).cpu())))
            file.end += -file.end % _ALIGNED
        self.written_bytes, memory = file.end, file.mapped()
        for place, alike in zip(places, waiting, strict=True):
            device, size = alike[0].device, alike[0].untyped_storage().nbytes()
            _move(alike, torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=place))
            if not is_host(device):
                self._elsewhere.append((device, alike))

    def fetch(self) -> None:
        """Move it back to the card where it was; on the CPU it is read where it is touched."""
        what = f"the hidden states of a batch that goes on, {in_words(self.written_bytes)}"
        with memory_for(what, FOR_BATCHES):
            for device, alike in self._elsewhere:
                _move(alike, _whole(alike[0].untyped_storage()).to(device))
        self._elsewhere.clear()

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether a tensor has hidden states in it, which no other pass can have.

        Masks may be shared: they are square.
        """
        first, *rest = tensor.shape or (0,)
        of_samples = (
            first == self._samples and self._tokens in rest[:2] and rest[-1:] != [self._tokens]
        )
        return (
            tensor.is_floating_point()
            and tensor.untyped_storage().nbytes() >= _SMALLEST
            and (of_samples or first == self._samples * self._tokens)
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own in memory, which may move."""
    return not (
        isinstance(tensor, OnDisk | nn.Parameter)
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or tensor.is_meta
        or tensor.is_inference()
    )


def _whole(storage: torch.UntypedStorage) -> Tensor:
    """Return a storage as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _move(tensors: Sequence[Tensor], place: Tensor) -> None:
    """Give tensors that share their memory the same values in another place."""
    storage = place.untyped_storage()
    for tensor in tensors:
        there = torch.empty(0, dtype=tensor.dtype, device=place.device)
        there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        tensor.data = there
