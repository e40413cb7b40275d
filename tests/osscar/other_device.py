"""A device that there is none of here: tensors are told apart by how they came to be.

All of them lie on the CPU.  Those of the model, whatever is computed of them, and whatever is made
with a device or moved to one count as on the card; what is made without one counts as on the host.
Where an operator meets both, a real card would refuse, and so does this one, with the exceptions
that CUDA makes: numbers without dimensions, and indices.  A parameter on disk says that it is on
the card; what is read from its file is on the host until it is moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from osscar.offload.on_disk import OnDisk

HOST, CARD = "host", "card"

_BETWEEN = {"copy_", "_to_copy"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_MAKERS = {torch.tensor, torch.as_tensor}


class WrongDevice(BaseException):
    """Tensors of two devices have met, or one is where it cannot be; no code is to get over it."""


class _Generator(torch.Generator):
    """A generator that knows on which device it was asked for."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = None) -> None:
        self.place = HOST if device is None else CARD


class Card:
    """Where tensors are."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[StorageWeakRef, str]] = {}
        """By address, which no other storage has as long as there is a reference."""
        self.watching = True
        self.asked = HOST
        """Where the function that is running makes new tensors."""

    def put(self, tensors: Iterable[Tensor], place: str = CARD) -> None:
        """Note where tensors are."""
        for tensor in tensors:
            if _has_storage(tensor):
                storage = tensor.untyped_storage()
                self._places[storage._cdata] = (StorageWeakRef(storage), place)

    def place(self, tensor: Tensor) -> str:
        """Return where a tensor is; what nobody has put anywhere is on the host."""
        if isinstance(tensor, OnDisk):
            return CARD
        if not _has_storage(tensor):
            return HOST
        _, place = self._places.get(tensor.untyped_storage()._cdata, (None, HOST))
        return place

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Refuse what a real card would refuse."""
        original = torch.Generator
        torch.Generator = _Generator  # type: ignore[misc]
        try:
            with _Operators(self), _Functions(self):
                yield
        finally:
            torch.Generator = original  # type: ignore[misc]

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Refuse nothing, where no values are computed, such as in tracing."""
        before, self.watching = self.watching, False
        try:
            yield
        finally:
            self.watching = before


def _has_storage(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.layout is torch.strided and not tensor.is_meta


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Operators(TorchDispatchMode):
    """Follows tensors from operator to operator."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = _tensors((args, options))
        places = {self.card.place(x) for x in given}
        meeting = _tensors((args[0], args[2:])) if name in _INDEXED else given
        held = {self.card.place(x) for x in meeting if x.ndim}
        real = all(map(_has_storage, given))  # without values there is nothing to refuse
        if len(held) > 1 and name not in _BETWEEN and self.card.watching and real:
            shapes = [(tuple(x.shape), self.card.place(x)) for x in given]
            raise WrongDevice(f"{func} of {shapes}")
        place = CARD if CARD in places or (not given and self.card.asked == CARD) else HOST
        found = func(*args, **options)
        if name == "copy_":
            place = self.card.place(args[0])
        self.card.put(_tensors(found), place)
        return found


class _Functions(TorchFunctionMode):
    """Sees what no operator tells: moves between devices that are one here."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        given = _tensors((args, options))
        if any(isinstance(x, OnDisk) for x in given) and torch._C._is_torch_function_enabled():
            with self:  # what it does to be read is watched as all else is
                return OnDisk.__torch_function__(func, types, args, options)
        named = options.get("device") is not None
        place = CARD if named or any(self.card.place(x) == CARD for x in given) else HOST
        generator = options.get("generator")
        if isinstance(generator, _Generator) and generator.place != place:
            raise WrongDevice(f"{func} on the {place} with a generator on the {generator.place}")
        before, self.card.asked = self.card.asked, place
        try:
            return self._called(func, args, options, None if given else place)
        finally:
            self.card.asked = before

    def _called(self, func: Any, args: Any, options: Any, made: str | None) -> Any:
        if func is Tensor.new_tensor:
            asked = options.get("device") is not None
            return self._moved(func(*args, **options), CARD if asked else self.card.place(args[0]))
        if func in _MAKERS:
            found = func(*args, **options)
            return self._moved(found, CARD if options.get("device") is not None else HOST)
        if func in (Tensor.numpy, Tensor.__array__) and self.card.place(args[0]) == CARD:
            raise WrongDevice(f"{func.__name__} of a tensor on the card")
        if func is Tensor.cpu:
            return self._moved(args[0].clone(), HOST)
        if func is Tensor.to:
            place = self._destination(args[1:], options)
            if place is not None and place != self.card.place(args[0]):
                return self._moved(func(args[0].clone(), *args[1:], **options), place)
        found = func(*args, **options)
        if made is not None:
            self.card.put(_tensors(found), made)
        return found

    def _destination(self, args: Any, options: Any) -> str | None:
        if args and isinstance(args[0], Tensor):
            return self.card.place(args[0])
        named = options.get("device") is not None
        return CARD if named or any(isinstance(x, torch.device | str) for x in args) else None

    def _moved(self, tensor: Tensor, place: str) -> Tensor:
        self.card.put([tensor], place)
        return tensor
