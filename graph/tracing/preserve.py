"""Leave a model as it was found, whatever tracing it does to its attributes, and to its code.

A trace calls the code with tensors that have no values and sizes that are symbols.  Code that keeps
what it has computed, in a dictionary of its file, an attribute of a class or `functools.lru_cache`,
would hand these to the next caller.
"""

from __future__ import annotations

import gc
import operator
import sys
import sysconfig
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import _lru_cache_wrapper, cached_property, lru_cache
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Container: TypeAlias = dict[Any, Any] | list[Any] | set[Any] | deque[Any]


@contextmanager
def preserved(model: torch.nn.Module, *, on_error: bool = False) -> Iterator[None]:
    """Put back, on leaving or only `on_error`, what every module of a model is and holds.

    A `forward` may assign attributes and append to lists; while it is traced, what it leaves
    there are fake tensors.  `torch.export` itself puts copies in place of lists and dicts.  So
    attributes are restored by identity, and the contents of containers in them, however nested.
    Tensors are not copied: what is written to them stays.
    """
    contents, failed = Contents.of(model), True
    try:
        yield
        failed = False
    finally:
        if failed or not on_error:
            contents.restore()


@dataclass(frozen=True)
class Contents:
    """What the modules of a model are, and what containers in them hold, when this is made."""

    _kinds: tuple[tuple[torch.nn.Module, type[torch.nn.Module]], ...]
    _held: tuple[tuple[Container, tuple[Any, ...]], ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Contents:
        """Look at the attributes of all modules, and at the containers in them, each once."""
        found: dict[int, tuple[Container, tuple[Any, ...]]] = {}
        queue: list[Any] = [model]
        while queue:
            held = queue.pop()
            if isinstance(held, torch.nn.Module):
                held = vars(held)
            if isinstance(held, tuple):
                queue.extend(held)
            elif isinstance(held, dict | list | set | deque) and id(held) not in found:
                found[id(held)] = held, items_of(held)
                queue.extend(found[id(held)][1])
        return cls(tuple((m, type(m)) for m in model.modules()), tuple(found.values()))

    def restore(self) -> None:
        """Put it back."""
        for module, kind in self._kinds:
            if type(module) is not kind:  # else who listens to assignments would hear of one
                module.__class__ = kind
        for holder, items in self._held:
            if not holds(holder, items):
                refill(holder, items)


def items_of(holder: Container) -> tuple[Any, ...]:
    """Return the items of a container; of a dict the keys, and then the values."""
    return (*holder, *holder.values()) if isinstance(holder, dict) else tuple(holder)


def holds(holder: Container, items: tuple[Any, ...]) -> bool:
    """Whether a container holds these very items."""
    now = items_of(holder)
    return len(now) == len(items) and all(map(operator.is_, now, items))


def refill(holder: Container, items: tuple[Any, ...]) -> None:
    """Give a container the items that `items_of` returned."""
    holder.clear()
    if isinstance(holder, dict):
        half = len(items) // 2
        for key, value in zip(items[:half], items[half:], strict=True):
            holder[key] = value  # `update` of a `Counter` would count them
    elif isinstance(holder, set):
        holder.update(items)
    else:
        holder.extend(items)


def forget_derived(model: torch.nn.Module) -> list[str]:
    """Let modules drop what they have computed of their tensors, and say which refuse.

    A module that keeps such values, as position biases of attention by device, drops them when it
    is moved or converted, which it learns of by its `_apply`.
    """
    forget_cached(model)
    refusals = []
    for name, module in model.named_modules():
        if type(module)._apply is torch.nn.Module._apply or not _keeps_tensors(module):
            continue
        before = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
        try:
            module._apply(lambda tensor: tensor)
        except Exception as error:  # the module may be anyone's code
            refusals.append(
                f"module {name or 'the model'!r} ({type(module).__name__}) keeps what it has "
                f"computed of its parameters, as its _apply fails: {error}"
            )
        for tensor, data in before:  # of a module that converts, whatever it is asked
            if (tensor.dtype, tensor.shape) != (data.dtype, data.shape):
                tensor.data = data
    return refusals


def forget_cached(model: torch.nn.Module) -> None:
    """Let modules drop each `functools.cached_property`, which they compute when next asked."""
    for module in model.modules():
        for kind in type(module).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    vars(module).pop(name, None)


def _keeps_tensors(module: torch.nn.Module) -> bool:
    """Whether a module has tensors beside its parameters and buffers, in attributes."""
    owned = ("_parameters", "_buffers", "_modules")
    held = [value for name, value in vars(module).items() if name not in owned]
    for value in held:
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            return True
        if isinstance(value, Mapping):
            held.extend(value.values())
        elif isinstance(value, list | tuple | set):
            held.extend(value)
    return False


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Turn key-value caches of all modules off: no size of theirs is known to a graph."""
    before = []
    try:
        for config in {id(config): config for config in caching(model).values()}.values():
            kept = config.use_cache
            with suppress(AttributeError, TypeError):  # of a frozen one
                config.use_cache = False
                before.append((config, kept))
        yield
    finally:
        for config, kept in before:
            config.use_cache = kept


def caching(model: torch.nn.Module) -> dict[str, Any]:
    """Return the configs that say whether keys and values are kept, by the names of modules."""
    configs = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    return {n: c for n, c in configs.items() if getattr(c, "use_cache", None) is not None}


def cache_as(pruned: torch.nn.Module, model: torch.nn.Module) -> None:
    """Turn caches on in a model that was made while they were off, where `model` uses them."""
    theirs = caching(model)
    for name, mine in caching(pruned).items():
        if name in theirs and mine.use_cache != theirs[name].use_cache:
            mine.use_cache = theirs[name].use_cache


def asked_of_to(
    *args: Any, **options: Any
) -> tuple[torch.device | None, torch.dtype | None, torch.memory_format | None]:
    """Return what a call of ``to``, of a module or tensor, asks for; None for what it leaves."""
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    layout: torch.memory_format | None = None
    for given in (*args, *options.values()):
        if isinstance(given, torch.Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, torch.memory_format):
            layout = given
        elif isinstance(given, str | torch.device | int) and not isinstance(given, bool):
            device = torch.device(given)
    return device, dtype, layout


# ---- what code keeps outside of modules ---------------------------------------------------


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
