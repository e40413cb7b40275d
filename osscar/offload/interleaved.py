"""Interleaved passes through a model, so that weights on disk are read once for all.

A model whose weights lie on disk reads all of them in every pass.  Several passes that stop at each
block, and go on in turn, find what the first of them has read.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from osscar.offload.on_disk import is_on_disk

T = TypeVar("T")


def run_interleaved(model: nn.Module, passes: Sequence[Callable[[], T]]) -> list[T]:
    """Run passes through a model without gradients, and return what each returns, in their order.

    They run one after the other unless its weights lie on disk.  None leaves anything on it that
    another would read.
    """
    if len(passes) < 2 or not is_on_disk(model):
        return [run() for run in passes]
    found: dict[int, T] = {}
    going = {index: greenlet(run) for index, run in enumerate(passes)}
    for one in going.values():
        one.gr_context = contextvars.copy_context()
    # Each pass would otherwise switch gradients on again where it ends, and others go on.
    with torch.no_grad(), _pausing(model, set(going.values())):
        try:
            while len(found) < len(going):
                for index, one in going.items():
                    if index not in found:
                        value: Any = one.switch()
                        if one.dead:
                            found[index] = value
        finally:
            for one in going.values():
                if one and not one.dead:
                    with suppress(GreenletExit):
                        one.throw(GreenletExit)
    return [found[index] for index in going]


@contextmanager
def _pausing(model: nn.Module, passes: set[greenlet]) -> Iterator[None]:
    """Let passes stop before each block, for the others to come as far."""

    def pause(*_: Any) -> None:
        own = getcurrent()
        if own in passes and own.parent is not None:
            own.parent.switch()

    handles = [block.register_forward_pre_hook(pause) for block in _blocks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of lists of modules that are in no such member themselves."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
