"""The structure of a network, found once for each architecture in a session.

To trace a small network takes longer than to prune it, and what the trace finds depends on neither
weights nor numbers in inputs.  `once` lets `graph.trace` answer from memory where the same was
asked of the same architecture: the same classes, attributes, shapes and formats.  So it does with
the trial of whether the code around groups works without units, or in training, and with the order
in which a pass calls modules, which is learned on tensors without numbers.  All tests of
``tests/osscar`` run so but those about just that (``tests/osscar/conftest.py`` lists them), and in
tests of anything else ``with once():`` does it.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graph
from osscar.offload.on_disk import OnDisk
from osscar.proof.structural import DensePrograms, dense_programs
from osscar.shrinking import slice as slicing
from osscar.shrinking.shrink import rehearse
from osscar.walk.schedule import _called_on_shapes

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_CAPTURES = "transformers.utils.output_capturing"
"""Whose hooks note outputs in passing; a model of transformers has them from its first pass on."""
_FEW = 64

_known: dict[Hashable, Any] = {}
_alive: list[object] = []
"""What keys name by its `id`."""


class _Unknown(Exception):
    """Something cannot be told from another."""


def _told(value: Any, around: tuple[int, ...] = ()) -> Hashable:
    """Return what tells a value from others that a network may behave differently with."""
    if isinstance(value, int | float | str | bytes | torch.device | None):
        return type(value), str(value)
    if isinstance(value, OnDisk):  # whose tests count what is read
        raise _Unknown
    if isinstance(value, Tensor):
        few = value.numel() <= _FEW and not (value.is_meta or isinstance(value, nn.Parameter))
        numbers = tuple(value.flatten().tolist()) if few and not value.is_floating_point() else ()
        return tuple(value.shape), value.dtype, value.device.type, value.requires_grad, numbers
    if isinstance(value, Mapping):
        return type(value), tuple((k, _told(v, around)) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(_told(member, around) for member in value)
    if isinstance(value, MethodType):
        raise _Unknown
    known = (type, FunctionType, BuiltinFunctionType, ModuleType, torch.dtype, DensePrograms)
    if isinstance(value, known):
        _alive.append(value)
        return id(value)
    if id(value) in around or len(around) > _FEW or not hasattr(value, "__dict__"):
        raise _Unknown
    held = _attributes(value) if isinstance(value, nn.Module) else vars(value)
    return type(value), _told(held, (*around, id(value)))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds but hooks that change nothing; others are unknown."""
    hooks = (hook for table in _HOOKS for hook in getattr(module, table).values())
    if any(getattr(hook, "__module__", "") != _CAPTURES for hook in hooks):
        raise _Unknown
    return {name: value for name, value in vars(module).items() if name not in _HOOKS}


def _architecture(model: nn.Module) -> Hashable:
    """Return what tells a network from those of other structure; weights do not."""
    tensors = [*model.named_parameters(remove_duplicate=False)]
    tensors += [*model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    modules: dict[int, str] = {}
    told: list[Hashable] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if modules.setdefault(id(module), name) != name:
            told.append((name, modules[id(module)]))
            continue
        held = {k: v for k, v in _attributes(module).items() if k not in _TABLES}
        own = {k: modules.get(id(v), v) for k, v in held.items()}  # which may be a module
        told.append((name, type(module), type(module).forward, _told(own)))
    return (
        tuple(told),
        tuple((name, first.setdefault(id(t), name), _told(t)) for name, t in tensors),
        tuple(slicing._ADAPTERS.items()),
    )


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a model that answers the same question once."""

    def answered(model: Any, *given: Any, **options: Any) -> Any:
        try:
            key = (function, _architecture(model), _told(given), _told(options))
            hash(key)
        except (_Unknown, AttributeError, TypeError, RuntimeError):
            return function(model, *given, **options)
        if key not in _known:
            with warnings.catch_warnings(record=True) as said:
                found = function(model, *given, **options)
            for one in said:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            if said:
                return found
            _known[key] = found
        return _known[key]

    return answered


@contextmanager
def once() -> Iterator[None]:
    """Find the structure of each architecture once, while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in _places(len(sys.modules)):
            patch.setattr(module, name, _ANSWERED[name])
        yield


_ASKED = {
    function.__name__: function
    for function in (
        graph.trace,
        rehearse,
        dense_programs,
        _called_on_shapes,
    )
}
_ANSWERED = {name: _remembered(function) for name, function in _ASKED.items()}


@functools.lru_cache(1)
def _places(_: int) -> list[tuple[ModuleType, str]]:
    """Return where the functions are named; looked up again as more modules are imported."""
    ours = [m for path, m in sys.modules.items() if path.partition(".")[0] in ("graph", "osscar")]
    return [
        (module, name)
        for module in ours
        for name, function in _ASKED.items()
        if vars(module).get(name) in (function, _ANSWERED[name])
    ]
