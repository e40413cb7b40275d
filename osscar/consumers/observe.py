"""Observing what consumers read: modules where they are called, products where they are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from osscar.consumers.layers import layer_of
from osscar.consumers.products import Taken, is_station, watched_products
from osscar.network.hooks import hooks
from osscar.network.modules import HALVES
from osscar.routing.routed import Routed


def argument(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a module reads: `Routed`, or its argument, the first beside states."""
    if len(args) + len(kwargs) > 1:
        routed = Routed.of(module, args, kwargs)
        if routed is not None:
            return routed
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values())))


def _ignore(*_: Any) -> None:
    pass


@contextmanager
def reads(
    model: nn.Module,
    names: Collection[str],
    before: Callable[[str, Any], Any] = _ignore,
    after: Callable[[str, Any, Any], Any] = _ignore,
) -> Iterator[None]:
    """Show what some modules and products read while the block runs.

    That of a module is what `argument` has, that of a product what is `Taken`.  `before` is told
    the name and what is read, and may return what is `Routed`, which is read instead; `after` is
    told also what is returned, and what it gives back, if anything, goes on instead.
    """
    products = {name for name in names if is_station(name)}

    def reading(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        instead = before(name, argument(module, args, kwargs))
        return None if instead is None else (instead.tensors, {})

    def read(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        return after(name, argument(module, args, kwargs), y)

    modules = [name for name in names if name not in products]
    with hooks(model, modules, reading, read), watched_products(model, products, before, after):
        yield


def output_of(module: nn.Module, x: Any) -> Any:
    """Return what a module returns on its `argument`, without its hooks."""
    if isinstance(x, Routed | Taken):
        return x.output(module)
    layer = layer_of(module)
    if layer is None or layer.output is None:
        return module.forward(x)
    return layer.output(module, x)


def exact_output(module: nn.Module, x: Any, y: Any = None) -> Any:
    """Return `output_of`, in float32 where a module or a product computes in half precision.

    Outputs of two streams differ by little, which half precision would round away.  Mixtures keep
    their format: all their experts in float32 would be a copy at every batch; and so does what runs
    under autocast, which would round what is finer.  `y` is what was returned already, if known.
    """
    read = x.multiplied if isinstance(x, Taken) else x
    half = isinstance(read, Tensor) and read.dtype in HALVES
    if not half or torch.is_autocast_enabled(read.device.type):
        layer = layer_of(module)
        put_out = layer is None or layer.output is None
        return y if y is not None and put_out else output_of(module, x)
    if isinstance(x, Taken):
        return x.finer().output()
    before = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.float()
        return output_of(module, x.float())
    finally:
        for parameter, data in before:
            parameter.data = data


def afresh(x: Any) -> Any:
    """Return an `argument` as it came: what is read of it lives as long as what is returned."""
    return dataclasses.replace(x, read={}) if isinstance(x, Routed) else x
