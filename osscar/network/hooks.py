"""Forward passes that are watched, replaced or run in another way while a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

try:
    from transformers.utils import output_capturing
except ImportError:  # the first of transformers 5 keep what layers return in another way
    output_capturing = None

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
    with ExitStack() as undo:
        for module, forward in forwards:
            held = vars(module)  # whoever watches what passes write on modules must not see this
            if "forward" in held:
                undo.callback(held.__setitem__, "forward", held["forward"])
            else:
                undo.callback(held.pop, "forward")
            held["forward"] = forward
        yield


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


_COARSER = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


class InDouble(TorchFunctionMode):
    """Gives code that asks for a coarser number format double precision while the block runs.

    Routers and normalizations round to float32 inside, whatever their weights are, and hide what is
    smaller than that.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, options = pytree.tree_map_only(
            torch.dtype,
            lambda kind: torch.float64 if kind in _COARSER else kind,
            (args, dict(kwargs or {})),
        )
        return _CASTS.get(func, func)(*args, **options)


def followed_mixtures(model: nn.Module) -> AbstractContextManager[None]:
    """Let mixtures of transformers run while the block does by the kernel that can be traced."""
    return _by_kernels(model, {"eager": "grouped_mm", "batched_mm": "grouped_mm"})


def computable_mixtures(model: nn.Module) -> AbstractContextManager[None]:
    """Let mixtures of transformers run while the block does by the kernel whose shapes torch tells.

    Those of ``grouped_mm`` it tells in bfloat16 alone, and ``eager`` looks at where tokens are
    sent.
    """
    return _by_kernels(model, {"eager": "batched_mm", "grouped_mm": "batched_mm"})


@contextmanager
def _by_kernels(model: nn.Module, instead: Mapping[str, str]) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    with ExitStack() as undo:
        for config in configs.values():
            kernel = str(getattr(config, "_experts_implementation", None))
            if kernel in instead:
                undo.callback(setattr, config, "_experts_implementation", kernel)
                setattr(config, "_experts_implementation", instead[kernel])  # noqa: B010
        yield


def record_layers(model: nn.Module) -> None:
    """Let transformers add the hooks by which models read layers of others, as of images."""
    installed = "_output_capturing_hooks_installed"
    if output_capturing is None or any(getattr(one, installed, False) for one in model.modules()):
        return
    if isinstance(model, PreTrainedModel):
        output_capturing.maybe_install_capturing_hooks(model)
