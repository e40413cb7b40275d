"""Functions that are told of the calls of modules, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

from torch import nn

Before: TypeAlias = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Told the name of a module, the module, and what it is called with."""

After: TypeAlias = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""Told the same, and what the call returns."""


@contextmanager
def hooks(
    model: nn.Module,
    names: Iterable[str] | None = None,
    before: Before | None = None,
    after: After | None = None,
    *,
    always: bool = False,
) -> Iterator[None]:
    """Call functions before and after modules run while the block does.

    By default all modules are watched, the model included.  Where `after` returns something, that
    is what the call of the module returns; it is called `always`, or only where none fails.
    """
    if names is None:
        names = [name for name, _ in model.named_modules()]
    with ExitStack() as registered:
        for name in names:
            module = model.get_submodule(name)
            if before is not None:
                handle = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                registered.enter_context(handle)
            if after is not None:
                handle = module.register_forward_hook(
                    partial(after, name), with_kwargs=True, always_call=always
                )
                registered.enter_context(handle)
        yield


@contextmanager
def other_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules other forward passes while the block runs, and their own ones back."""
    replaced = []
    try:
        for module, forward in forwards:
            held = vars(module)  # whoever watches what passes write on modules must not see this
            replaced.append((held, held.get("forward")))
            held["forward"] = forward
        yield
    finally:
        for held, own in replaced:
            del held["forward"]
            if own is not None:
                held["forward"] = own


@contextmanager
def running_modules(model: nn.Module) -> Iterator[list[str]]:
    """Keep, while the block runs, a list of the modules that are running, the innermost last."""
    running: list[str] = []

    def enter(name: str, *_: Any) -> None:
        running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    with hooks(model, before=enter, after=leave, always=True):
        yield running
