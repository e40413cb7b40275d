"""What suspended passes hold, kept in files while others run.

A pass that is suspended holds its hidden states, and what the consumer reads, as variables of the
functions that are running in it.  Their memory can be taken away without touching these: a tensor
stays, and its storage is empty until its pass goes on.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.devices import is_host
from osscar.base.memory import FOR_BATCHES, in_words, memory_for
from osscar.offload.on_disk import OnDisk
from osscar.offload.sources import Scratch, as_bytes

_SMALLEST = 1 << 12
"""Bytes of a tensor that is worth a place in a file."""


class Away:
    """The file in which one pass keeps what it holds.

    Parameters
    ----------
    model
        Whose parameters, buffers and attributes stay in memory, as all passes share them.
    batch
        What the pass reads; tensors that have a row for each of its samples or tokens are kept.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self._samples, *rest = next(iter(batch.values())).shape
        self._tokens = rest[0] if rest else 1
        self._shared = set(_storages_of(model))
        self._scratch = Scratch()
        self._gone: list[tuple[torch.UntypedStorage, int, int]] = []

    @property
    def written_bytes(self) -> int:
        """How much lies in the file."""
        return sum(size for _, size, _ in self._gone)

    def put(self, frame: FrameType | None, *others: Tensor | tuple[Tensor, ...] | None) -> None:
        """Write what the functions of a suspended pass hold to the file.

        Parameters
        ----------
        frame
            The innermost of them.
        *others
            What else the pass holds.

        Raises
        ------
        OutputError
            If the disk refuses.
        """
        self._scratch.end = 0
        for tensor in (*_held(frame), *_in(others)):
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            own = self._is_own(tensor) and storage._cdata not in self._shared
            if own and size >= _SMALLEST and storage.resizable():
                written = _bytes(storage) if is_host(storage.device) else _copy(storage)
                self._gone.append((storage, size, self._scratch.append(written)))
                storage.resize_(0)

    def fetch(self) -> None:
        """Read it back, to the device where it was.

        Raises
        ------
        NoMemoryError
            If there is no memory for it any more.
        """
        what = f"the hidden states of a batch that goes on, {in_words(self.written_bytes)}"
        with memory_for(what, FOR_BATCHES):
            for storage, size, offset in self._gone:
                storage.resize_(size)
                if is_host(storage.device):
                    self._scratch.read_into(_bytes(storage), offset)
                else:
                    read = torch.empty(size, dtype=torch.uint8)
                    self._scratch.read_into(as_bytes(read), offset)
                    _whole(storage).copy_(read)
        self._gone.clear()

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
            and not tensor.is_meta
            and not tensor.is_inference()
            and (of_samples or first == self._samples * self._tokens)
        )


def _whole(storage: torch.UntypedStorage) -> Tensor:
    """Return a storage as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _copy(storage: torch.UntypedStorage) -> memoryview:
    """Return the bytes of a storage that cannot be read where it is."""
    return as_bytes(_whole(storage).cpu())


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    """Return a storage's memory on the CPU, without an array of NumPy, which would fix its size."""
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return memoryview(memory).cast("B")


def _held(frame: FrameType | None) -> Iterator[Tensor]:
    """Yield the tensors that are variables of functions, from the innermost one out."""
    while frame is not None:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # else it is no function
            names: Any = frame.f_locals
            found = [tensor for value in list(names.values()) for tensor in _in(value)]
            if type(names) is dict:  # a snapshot, before Python 3.13: it would keep all alive
                names.clear()
            yield from found
        frame = frame.f_back


def _in(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a value, or in a container that is one."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    for member in value if isinstance(value, tuple | list) else (value,):
        plain = isinstance(member, Tensor) and not isinstance(member, OnDisk | nn.Parameter)
        if plain and member.layout is torch.strided and not member.is_nested:
            yield member


def _storages_of(model: nn.Module) -> Iterator[int]:
    """Yield what modules keep values in: parameters, buffers, and tensors that are attributes."""
    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for value in table.values():
                for tensor in _in(value):
                    yield tensor.untyped_storage()._cdata
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(parameter, OnDisk):
                yield parameter.untyped_storage()._cdata
