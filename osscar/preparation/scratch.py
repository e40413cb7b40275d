"""What modules write on themselves while they run: counters, caches, lists of what they saw."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graph.tracing.patches import assignments_told

_MISSING = object()

_CONTAINERS = (dict, list, set)
_OWN = frozenset(vars(nn.Module()))
"""What every module has, such as its tables of parameters and hooks."""


@dataclass(frozen=True, eq=False)
class Scratch:
    """What a forward pass writes on modules; each pass has its own values of it.

    Parameters
    ----------
    attributes
        The module and the name of each that is assigned.
    containers
        Dictionaries, lists and sets that are attributes of modules, whose members may change.
    buffers
        Tensors that are written to in place.
    """

    attributes: Sequence[tuple[nn.Module, str]] = ()
    containers: Sequence[Any] = ()
    buffers: Sequence[Tensor] = ()
    _initial: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._initial.extend(self._read())

    @classmethod
    def of(cls, model: nn.Module, written: Writes) -> Scratch:
        """Take what was written, and all containers that might have been for a moment."""
        containers = [
            value
            for module in model.modules()
            for name, value in vars(module).items()
            if name not in _OWN and isinstance(value, _CONTAINERS)
        ]
        buffers = [
            tensor
            for tensor, version in written.versions
            if not tensor.is_inference() and tensor._version != version
        ]
        return cls(tuple(written.attributes), tuple(containers), tuple(buffers))

    def take(self) -> list[Any]:
        """Return what the running pass has written, and write what was there before it."""
        written = self._read()
        self.put(self._initial)
        return written

    def reset(self) -> None:
        """Write what was there before any pass."""
        self.put(self._initial)

    def put(self, values: Sequence[Any]) -> None:
        """Write values, as `take` returned them."""
        rest = iter(values)
        for module, name in self.attributes:
            store, value = _store(module, name), next(rest)
            if value is _MISSING:
                store.pop(name, None)
            else:
                store[name] = value
        for container in self.containers:
            _refill(container, next(rest))
        for buffer in self.buffers:
            value = next(rest)
            buffer.resize_(value.shape).copy_(value)

    def _read(self) -> list[Any]:
        return [
            *(_store(module, name).get(name, _MISSING) for module, name in self.attributes),
            *(copy.copy(container) for container in self.containers),
            *(buffer.clone() for buffer in self.buffers),
        ]


def _refill(container: Any, members: Any) -> None:
    """Give a dictionary, list or set other members."""
    container.clear()
    if isinstance(container, list):
        container.extend(members)
    else:
        container.update(members)


def _store(module: nn.Module, name: str) -> dict[str, Any]:
    """Return which of a module's tables holds an attribute."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    return next((table for table in tables if name in table), vars(module))


class Untouched:
    """What modules hold before a model runs for the first time, to be put back in the end.

    Known by the names of modules, so that it serves copies of the model as well.

    Parameters
    ----------
    model
        The model; it has not run yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = {
            name: {
                key: (value, _copied(value))
                for key, value in {**vars(module), **module._buffers}.items()
                if key not in _OWN
            }
            for name, module in model.named_modules()
        }
        self._written: set[tuple[str, str]] = set()

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Learn what passes write from those that run in this block.

        The first pass of a model is to be among them: some things are written once.
        """
        names = {module: name for name, module in model.named_modules()}
        before = {
            (name, key): _copied(value)
            for name, held in self._held.items()
            for key, (value, _) in held.items()
            if isinstance(value, _CONTAINERS)
        }
        with recorded_writes(model) as written:
            yield
        self._written |= {(names[module], key) for module, key in written.attributes}
        self._written |= {
            place
            for place, members in before.items()
            if not _same(self._held[place[0]][place[1]][0], members)
        }
        versions = {id(tensor): version for tensor, version in written.versions}
        self._written |= {
            (name, key)
            for module, name in names.items()
            for key, tensor in module._buffers.items()
            if tensor is not None
            and not tensor.is_inference()
            and tensor._version != versions.get(id(tensor), tensor._version)
        }

    def put_back(self, model: nn.Module, kept: Collection[tuple[str, str]] = ()) -> None:
        """Write what was there before, so that nothing tells of the passes since.

        Parameters
        ----------
        model
            The model, or a copy of it, which may have been pruned.
        kept
            Modules and attributes that have other values now for a reason.
        """
        modules = dict(model.named_modules())
        for name, key in sorted(self._written - set(kept)):
            module = modules.get(name)
            if module is None or key in {*module._parameters, *module._modules}:
                continue
            store = _store(module, key)
            if key not in self._held.get(name, {}):
                store.pop(key, None)
                continue
            _, first = self._held[name][key]
            now = store.get(key)
            if isinstance(now, Tensor) and isinstance(first, Tensor) and now.shape == first.shape:
                with torch.no_grad():
                    now.copy_(first)
            elif isinstance(now, _CONTAINERS) and type(now) is type(first):
                _refill(now, first)  # others may hold the same one
            else:
                store[key] = _copied(first)


def _copied(value: Any) -> Any:
    """Return what a value is now, should something be written to it."""
    if isinstance(value, Tensor):
        return value if value.is_inference() else value.detach().clone()
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


def _same(container: Any, members: Any) -> bool:
    """Whether two containers hold the very same things; values may be tensors."""
    if isinstance(container, set):
        return bool(container == members)
    if isinstance(container, dict):
        return list(container) == list(members) and all(
            container[key] is members[key] for key in members
        )
    return len(container) == len(members) and all(map(operator.is_, container, members))


@dataclass(eq=False)
class Writes:
    """What was written while a model ran.

    Parameters
    ----------
    attributes
        Each module and attribute that was assigned.
    versions
        Each buffer with how often it had been written to before.
    before
        What each of the attributes was.
    """

    attributes: set[tuple[nn.Module, str]] = field(default_factory=set)
    versions: Sequence[tuple[Tensor, int]] = ()
    before: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)

    def undo(self) -> None:
        """Assign again what attributes were before."""
        for (module, name), value in self.before.items():
            store = _store(module, name)
            if value is _MISSING:
                store.pop(name, None)
            else:
                store[name] = value


@contextmanager
def recorded_writes(model: nn.Module) -> Iterator[Writes]:
    """Yield what modules write on themselves while the block runs."""
    versions = [(t, 0 if t.is_inference() else t._version) for t in model.buffers()]
    written = Writes(versions=versions)
    own = set(model.modules())

    def note(module: nn.Module, name: str) -> None:
        if module in own and name != "training" and (module, name) not in written.attributes:
            written.attributes.add((module, name))
            written.before[module, name] = _store(module, name).get(name, _MISSING)

    with assignments_told(note):
        yield written
