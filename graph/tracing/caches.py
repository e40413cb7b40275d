"""What the code of a model keeps outside of its modules, and what a trace leaves there.

A trace calls the code with tensors that have no values and sizes that are symbols.  Code that keeps
what it has computed, in a dictionary of its file, an attribute of a class or `functools.lru_cache`,
would hand these to the next caller.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import _lru_cache_wrapper, lru_cache
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from graph.tracing.preserve import Container, holds, items_of, refill

_MISSING = object()
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict)
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib"))


@contextmanager
def caches_kept(model: nn.Module) -> Iterator[None]:
    """Take out of the caches of a model's code, on leaving, what a trace has put there.

    Looked at are the attributes of its classes, and what their files define: names, containers,
    closures, objects, and functions with a cache; of files of the user's own, also the other such
    files that their functions are in.  Where nothing of the trace was put, all stays.
    """
    found = _Kept(model)
    try:
        yield
    finally:
        found.clean()


class _Kept:
    """What the code of a model keeps, as it is when this is made."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, tuple[Any, dict[str, Any]]] = {}
        """Classes, files, objects and cells, by their `id`, with their attributes."""
        self.containers: dict[int, tuple[Container, tuple[Any, ...]]] = {}
        self.caches: dict[int, Any] = {}
        """Functions with a cache."""
        self._queue: deque[Any] = deque()
        for module in model.modules():
            self._queue.extend(type(module).__mro__)
            self._queue.extend(v for n, v in vars(module).items() if not n.startswith("_"))
        seen: set[int] = set()
        while self._queue:
            value = self._queue.popleft()
            if id(value) not in seen:
                seen.add(id(value))
                self._look(value)

    def _look(self, value: Any) -> None:
        if isinstance(value, _lru_cache_wrapper):
            self.caches[id(value)] = value
            self._queue.append(value.__wrapped__)
        elif isinstance(value, MethodType | classmethod | staticmethod):
            self._queue.append(value.__func__)
        elif isinstance(value, property):
            self._queue.append(value.fget)
        elif isinstance(value, FunctionType):
            self._queue.extend((*(value.__closure__ or ()), value.__defaults__, vars(value)))
            self._queue.append(value.__kwdefaults__)
            if _is_own(value.__module__):
                self._queue.append(sys.modules[value.__module__])
        elif isinstance(value, type | ModuleType | CellType):
            self._note(value)
        elif type(value) is tuple:
            self._queue.extend(value)
        elif type(value) in _CONTAINERS:
            self.containers[id(value)] = value, items_of(value)
            self._queue.extend(items_of(value))
        elif not isinstance(value, Tensor | nn.Module) and _has_own_attributes(value):
            self._note(value)

    def _note(self, owner: Any) -> None:
        """Note the attributes of a class, a file, an object or a cell, and look at them, too."""
        place = _place_of(owner)
        if isinstance(owner, type) and not _is_of_torch(place):
            self._queue.append(sys.modules.get(place))
        attributes = dict(_attributes(owner))
        self.names[id(owner)] = owner, attributes
        for value in attributes.values():
            defined = value.__module__ if isinstance(value, type | FunctionType) else place
            if not isinstance(value, ModuleType) and (defined == place or _is_own(defined)):
                self._queue.append(value)

    def clean(self) -> None:
        """Take out what is of a trace."""
        for cache in self.caches.values():
            if _is_traced(cache):
                cache.cache_clear()
        for owner, before in self.names.values():
            for name, value in list(_attributes(owner).items()):
                if value is not before.get(name, _MISSING) and _is_traced(value):
                    if name in before:
                        setattr(owner, name, before[name])
                    else:
                        delattr(owner, name)
        for container, items in self.containers.values():
            if not holds(container, items) and any(map(_is_traced, items_of(container))):
                refill(container, items)


def _attributes(owner: Any) -> Mapping[str, Any]:
    if not isinstance(owner, CellType):
        return {} if _is_of_torch(_place_of(owner)) else vars(owner)
    try:
        return {"cell_contents": owner.cell_contents}
    except ValueError:  # it is empty
        return {}


def _place_of(owner: Any) -> str:
    """Return the name of the module of Python in which something is defined."""
    if isinstance(owner, CellType):
        return ""
    if isinstance(owner, ModuleType):
        return owner.__name__
    return str((owner if isinstance(owner, type) else type(owner)).__module__)


def _is_of_torch(name: str | None) -> bool:
    return (name or "builtins").partition(".")[0] in ("torch", "builtins", "graph", "osscar")


@lru_cache(None)
def _is_own(name: str | None) -> bool:
    """Whether a file is a user's own, and not that of an installed library."""
    path = getattr(sys.modules.get(name or ""), "__file__", None)
    return not _is_of_torch(name) and path is not None and not path.startswith(_LIBRARIES)


def _has_own_attributes(value: Any) -> bool:
    """Whether something is an object of a class of the user's own."""
    return hasattr(value, "__dict__") and _is_own(type(value).__module__)


def _is_traced(value: Any, depth: int = 4) -> bool:
    """Whether something is of a trace, or holds what is."""
    if isinstance(value, Tensor):
        return isinstance(value, FakeTensor) or value.is_meta
    if isinstance(value, _SYMBOLS):
        return True
    if isinstance(value, nn.Module | type | FunctionType | ModuleType) or not depth:
        return False
    inside: Iterable[Any] = ()
    if isinstance(value, _lru_cache_wrapper):
        inside = gc.get_referents(value)  # arguments and results among them
    elif isinstance(value, tuple):
        inside = value
    elif type(value) in _CONTAINERS:
        inside = items_of(value)
    elif _has_own_attributes(value):
        inside = vars(value).values()
    return any(_is_traced(one, depth - 1) for one in inside)
