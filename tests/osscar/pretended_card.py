"""A card that there is none of here: tensors say that they lie on ``cuda:0``, and the CPU computes.

``with pretended(): osscar.prune(..., device="cuda")`` runs the code of a card.  What is made on the
card, moved there, or computed of what lies there is on the card; all else is on the host.  Where an
operator meets both, a real card would refuse, and so does this one, with the exceptions that CUDA
makes: numbers without dimensions, and indices.  Where shapes alone are computed, as in tracing,
tensors are where they really are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graph.tracing.patches import computes_shapes_alone
from osscar.checkpoint import read_back
from osscar.offload.on_disk import OnDisk
from tests.fresh import here

CARD, HOST = torch.device("cuda:0"), torch.device("cpu")

_BETWEEN = {"copy_", "_to_copy"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_OF_DEVICES = (torch.device, torch._C._nn._parse_to)


class WrongDevice(BaseException):
    """Tensors of two devices have met, or one is where it cannot be; no code is to get over it."""


class _Places:
    """Which storages are on the card, and where a function that is running makes new tensors."""

    def __init__(self) -> None:
        self._on_card: dict[int, StorageWeakRef] = {}
        """By address, which no other storage has as long as there is a reference."""
        self.makes_on_card = False
        self.tracing = False

    def is_on_card(self, tensor: Any) -> bool:
        if isinstance(tensor, OnDisk):
            return bool(tensor.cache.device.type == "cuda")
        held = self._on_card.get(tensor.untyped_storage()._cdata) if _is_plain(tensor) else None
        return held is not None and not held.expired()

    def any_on_card(self, tree: Any) -> bool:
        return any(map(self.is_on_card, _tensors(tree)))

    def put(self, tree: Any, on_card: bool) -> None:
        for tensor in filter(_is_plain, _tensors(tree)):
            storage = tensor.untyped_storage()
            if on_card:
                self._on_card[storage._cdata] = StorageWeakRef(storage)
            else:
                self._on_card.pop(storage._cdata, None)


def _is_plain(tensor: Any) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.layout is torch.strided and not tensor.is_meta


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _device_in(argument: Any) -> torch.device | None:
    """Return the device that an argument names, if it is that of this card or the host."""
    named = isinstance(argument, torch.device | str)
    if not named or str(argument).partition(":")[0] not in ("cuda", "cpu"):
        return None
    return torch.device(argument)


class _Operators(TorchDispatchMode):
    """Follows tensors from operator to operator."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, name = dict(kwargs or {}), func.overloadpacket.__name__
        given = _tensors((args, options))
        if not all(map(_is_plain, given)):
            return func(*args, **options)
        meeting = _tensors((args[0], args[2:])) if name in _INDEXED else given
        held = {self.places.is_on_card(x) for x in meeting if x.ndim}
        # Places on the host may tell of numbers on the card, but not the other way round.
        if name in _INDEXED and self.places.any_on_card(args[1]):
            held.add(True)
        if len(held) > 1 and name not in _BETWEEN:
            raise WrongDevice(f"{func} of {[(tuple(x.shape), x.device) for x in given]}")
        halves = any(x.dtype in (torch.bfloat16, torch.float16) for x in given)
        if halves and "linalg" in name and self.places.any_on_card(given):
            raise WrongDevice(f"{func} has no kernel for half precision on a card")
        asked = _device_in(options.get("device"))
        if asked is not None:
            options["device"] = HOST
        on_card = self.places.any_on_card(given) or (
            not given and (self.places.makes_on_card or (asked is not None and asked != HOST))
        )
        found = func(*args, **options)
        known = {x.untyped_storage()._cdata for x in given}
        fresh = list(filter(_is_plain, _tensors(found)))
        self.places.put([x for x in fresh if x.untyped_storage()._cdata not in known], on_card)
        return found


class _Functions(TorchFunctionMode):
    """Says where tensors are, and sees what no operator tells: moves between what is one device."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        first = args[0] if args else None
        if func in _OF_DEVICES or self.places.tracing or computes_shapes_alone():
            return func(*args, **options)
        if any(isinstance(x, OnDisk) for x in _tensors((args, options))):
            if torch._C._is_torch_function_enabled():
                with self:  # what it does to be read is watched as all else is
                    return OnDisk.__torch_function__(func, types, args, options)
            return func(*args, **options)
        if self.places.is_on_card(first):
            told = self._told(func)
            if told is not None:
                return told
        devices = [_device_in(x) for x in (*args, options.get("device"))]
        asked = next((x for x in reversed(devices) if x is not None), None)
        args = tuple(HOST if _device_in(x) is not None else x for x in args)
        if _device_in(options.get("device")) is not None:
            options["device"] = HOST
        options.pop("pin_memory", None)
        if func is Tensor.cuda:
            func, args, asked = Tensor.to, (first, HOST), CARD
        if func is Tensor.cpu:
            asked = HOST
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            asked = CARD if self.places.is_on_card(args[1]) else HOST
        on_card = self.places.any_on_card((args, options)) if asked is None else asked != HOST
        generator = options.get("generator")
        if isinstance(generator, _Generator) and (generator.place != HOST) != on_card:
            raise WrongDevice(f"{func} with a generator on the {generator.place}")
        return self._called(func, args, options, asked, on_card)

    def _told(self, func: Any) -> Any:
        """Return what a tensor on the card says of itself, if it is asked for that."""
        name, of = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if func in (Tensor.numpy, Tensor.__array__):
            raise WrongDevice(f"{name} of a tensor on the card")
        if func is Tensor.get_device:
            return 0
        answers = ((Tensor.device, CARD), (Tensor.is_cuda, True), (Tensor.is_cpu, False))
        return next((told for one, told in answers if name == "__get__" and of is one), None)

    def _called(self, func: Any, args: Any, options: Any, asked: Any, on_card: bool) -> Any:
        before, self.places.makes_on_card = self.places.makes_on_card, on_card
        try:
            found = func(*args, **options)
        finally:
            self.places.makes_on_card = before
        if func in (Tensor.to, Tensor.cpu):
            if asked is not None and self.places.is_on_card(args[0]) != on_card:
                found = found.clone() if found is args[0] or _shared(found, args[0]) else found
                self.places.put(found, on_card)
        elif func is Tensor.__deepcopy__:
            self.places.put(found, self.places.is_on_card(args[0]))
        elif not _tensors((args, options)) or func is Tensor.new_tensor:
            self.places.put(found, on_card)
        return found


def _shared(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class _Generator(torch.Generator):
    """A generator that knows on which device it was asked for."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = None) -> None:
        self.place = HOST if device is None else torch.device(device)


_OF_TORCH = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": nullcontext,
    "manual_seed": lambda seed: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
    "get_device_name": lambda device=None: "a pretended card",
    "is_bf16_supported": lambda including_emulation=True: True,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
}


def _traced(places: _Places) -> Any:
    """Return `torch.export.export`, during which tensors are where they are."""
    export = torch.export.export

    def traced(*args: Any, **options: Any) -> Any:
        with mock.patch.object(places, "tracing", True):
            return export(*args, **options)

    return traced


@contextmanager
def pretended() -> Iterator[None]:
    """Let there be a card while the block runs."""
    places = _Places()
    with ExitStack() as stack:
        for name, value in _OF_TORCH.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch.export, "export", _traced(places)))
        stack.enter_context(mock.patch.object(read_back, "new_python", here))
        stack.enter_context(_Operators(places))
        stack.enter_context(_Functions(places))
        yield
