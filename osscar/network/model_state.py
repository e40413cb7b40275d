"""What a run changes on a model, and how it is put back.

Three things change: the mode of modules; what forward passes write on them (counters, caches,
buffers); and what code of OSSCAR does to them, such as removing units.  `model_state` is for the
first two, `graph.tracing.preserve.preserved` for all that modules hold.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from graph.tracing.patches import assignments_told
from graph.tracing.preserve import holds, items_of, refill
from osscar.network.modules import evaluating, graphics_cards

Attribute: TypeAlias = tuple[str, str]
"""The name of a module, and of one of its attributes or buffers."""

_MISSING = object()
CONTAINERS = (dict, list, set)
_OWN = frozenset(vars(nn.Module()))
"""What every module has, such as its tables of parameters and hooks."""


class ModelState:
    """What the modules of a model, known by names, hold now, and what of it passes write."""

    def __init__(self, model: nn.Module, written: Collection[Attribute] = ()) -> None:
        self._modules = dict(model.named_modules())
        self._held = {what: (value, _copied(value)) for what, value in self._attributes()}
        self.written = set(written)

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        found: nn.Module = self._modules[""]
        return found

    def _attributes(self) -> Iterator[tuple[Attribute, Any]]:
        """Yield what modules hold now, but for parameters and modules."""
        for name, module in self._modules.items():
            for key, value in attributes_of(module).items():
                yield (name, key), value

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Learn what passes write from those that run in this block.

        The first pass of a model is to be among them: some things are written once.
        """
        names = {module: name for name, module in self._modules.items()}
        containers = [
            (attribute, value, items_of(value))
            for attribute, (value, _) in self._held.items()
            if isinstance(value, CONTAINERS)
        ]
        values = dict(self._attributes())
        buffers = (buffer for module in names for buffer in module.buffers(recurse=False))
        versions = {id(buffer): version_of(buffer) for buffer in buffers}

        def note(module: nn.Module, key: str) -> None:
            if module in names and key != "training":
                self.written.add((names[module], key))

        with assignments_told(note):
            yield
        self.written |= {what for what, value, items in containers if not holds(value, items)}
        # What is no assignment: `functools.cached_property`, and `register_buffer`.
        self.written |= {
            w for w, value in self._attributes() if values.get(w, _MISSING) is not value
        }
        self.written |= {
            (name, key)
            for module, name in names.items()
            for key, buffer in module._buffers.items()
            if buffer is not None
            and version_of(buffer) != versions.get(id(buffer), version_of(buffer))
        }

    def put_back(self, model: nn.Module | None = None, kept: Collection[Attribute] = ()) -> None:
        """Write what was there before, but for what is `kept`, so that nothing tells of the passes.

        That may be in a copy of the model, or in a program of it, and any may have been pruned.
        """
        modules = self._modules if model is None else dict(model.named_modules())
        for name, key in sorted(self.written - set(kept)):
            module = modules.get(name)
            if module is None or key in {*module._parameters.keys(), *module._modules.keys()}:
                continue
            if isinstance(model, GraphModule) and key not in module._buffers:
                continue  # a program has no other attributes that passes write
            store = store_of(module, key)
            if (name, key) not in self._held:
                store.pop(key, None)
                continue
            _, first = self._held[name, key]
            now = store.get(key)
            if isinstance(now, Tensor) and isinstance(first, Tensor) and now.shape == first.shape:
                with torch.no_grad():
                    now.copy_(first)
            elif isinstance(now, CONTAINERS) and type(now) is type(first):
                refill(now, items_of(first))  # others may hold the same one
            else:
                store[key] = _copied(first)

    def passing(self) -> PassState:
        """Return what lets passes that take turns each have values of their own."""
        return PassState(self._modules, self.written)


class PassState:
    """What a forward pass writes on modules; each of several passes has its own values of it.

    All dictionaries, lists and sets of modules count, whose members may change for a moment.  Each
    pass finds modules as they are when this is made.
    """

    def __init__(self, modules: Mapping[str, nn.Module], written: Collection[Attribute]) -> None:
        attributes = [(modules[name], key) for name, key in written if name in modules]
        self._buffers = [
            buffer
            for module, key in attributes
            if isinstance(buffer := module._buffers.get(key), Tensor) and not buffer.is_inference()
        ]
        self._attributes = attributes
        self._containers = [
            value
            for module in modules.values()
            for key, value in vars(module).items()
            if key not in _OWN and isinstance(value, CONTAINERS)
        ]
        self._initial = self._read()

    def take(self) -> list[Any]:
        """Return what the running pass has written, and write what was there before it."""
        written = self._read()
        self.put(self._initial)
        return written

    def put(self, values: list[Any]) -> None:
        """Write values, as `take` returned them."""
        rest = iter(values)
        for module, key in self._attributes:
            store, value = store_of(module, key), next(rest)
            store[key] = value
            if value is _MISSING:
                del store[key]
        for container in self._containers:
            refill(container, next(rest))
        for buffer in self._buffers:
            value = next(rest)
            buffer.resize_(value.shape).copy_(value)

    def _read(self) -> list[Any]:
        return [
            *(store_of(module, key).get(key, _MISSING) for module, key in self._attributes),
            *(items_of(container) for container in self._containers),
            *(buffer.clone() for buffer in self._buffers),
        ]


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds, but for parameters and modules."""
    held = {**vars(module), **module._buffers}
    return {key: value for key, value in held.items() if key not in _OWN}


def store_of(module: nn.Module, key: str) -> dict[str, Any]:
    """Return which of a module's tables holds an attribute."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    return next((table for table in tables if key in table), vars(module))


def _copied(value: Any) -> Any:
    """Return what a value is now, should something be written to it."""
    if isinstance(value, Tensor):
        return value if value.is_inference() else value.detach().clone()
    return copy.copy(value) if isinstance(value, CONTAINERS) else value


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to; nobody counts that of tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


# ---- around a block ----------------------------------------------------------------------


@contextmanager
def model_state(model: nn.Module) -> Iterator[ModelState]:
    """Run a model in evaluation mode; put back modes, what passes write, and random numbers."""
    with torch.random.fork_rng(graphics_cards(model)), evaluating(model):
        state = ModelState(model)
        try:
            with state.watching():
                yield state
        finally:
            state.put_back()
