"""Forward passes that are watched, replaced or run in another way while a block lasts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from osscar.network.model_state import version_of
from osscar.network.modules import fresh, identity_of, tensors_in

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


@contextmanager
def followed_mixtures(model: nn.Module, kernel: str = "grouped_mm") -> Iterator[None]:
    """Let mixtures of transformers run while the block does by a kernel that can be traced."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    with ExitStack() as undo:
        for config in configs.values():
            before = str(getattr(config, "_experts_implementation", None))
            if before in _KERNELS:
                undo.callback(setattr, config, "_experts_implementation", before)
                setattr(config, "_experts_implementation", kernel)  # noqa: B010
        yield


_KERNELS = {"eager", "batched_mm", "grouped_mm"}

computable_mixtures = partial(followed_mixtures, kernel="batched_mm")
"""The same by the kernel whose shapes torch tells in every number format.

Those of ``grouped_mm`` it tells in bfloat16 alone, and ``eager`` looks at where tokens are sent."""


def record_layers(model: nn.Module) -> None:
    """Let transformers add the hooks by which models read layers of others, as of images."""
    installed = "_output_capturing_hooks_installed"
    if output_capturing is None or any(getattr(one, installed, False) for one in model.modules()):
        return
    if isinstance(model, PreTrainedModel):
        output_capturing.maybe_install_capturing_hooks(model)


# ---- passes that are resumed -------------------------------------------------------------


HELD_BYTES = 128 << 20
"""Most memory of what modules have returned; what does not fit is computed again."""

_PLAIN = (Tensor, int, float, str, type(None))


class Recording(TorchFunctionMode):
    """When modules end and parameters are first read in a pass, and what modules return.

    With a few weights changed, modules that end before the first that is read are not run again,
    nor what code does between them.  Results are those of the whole pass, bit by bit; a model whose
    passes write anything on its modules is not resumed.
    """

    def __init__(self, model: nn.Module, most_bytes: int = HELD_BYTES) -> None:
        super().__init__()
        self._model, self._most = model, most_bytes
        self._ended: list[str] = []
        self._first_read: dict[Any, int] = {}
        """How many modules have ended by then."""
        self._returned: dict[str, Any] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the pass that runs in this block."""

        def end(name: str, *_: Any) -> None:
            self._ended.append(name)

        with hooks(self._model, after=end), self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for one in pytree.tree_leaves((args, kwargs)):
            if isinstance(one, nn.Parameter):
                self._first_read.setdefault(identity_of(one), len(self._ended))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def resumed(self, changed: Iterable[Tensor]) -> Iterator[None]:
        """Let the same pass run in this block with changed values of some parameters."""
        first = min(self._first_read.get(identity_of(one), 0) for one in changed)
        calls = Counter(self._ended)
        once = {name for name in self._ended[:first] if calls[name] == 1}
        outer = {name for name in once if once.isdisjoint(_around(name))}
        self._returned = {name: x for name, x in self._returned.items() if name in outer}
        modules = {name: self._model.get_submodule(name) for name in outer}
        with other_forwards((one, self._known(name, one.forward)) for name, one in modules.items()):
            yield

    def _known(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward pass that is the dense one when it is first called."""
        calls = itertools.count()

        def known(*args: Any, **kwargs: Any) -> Any:
            if next(calls):  # which changed values may lead to
                return forward(*args, **kwargs)
            if name in self._returned:
                return fresh(self._returned[name])
            given = tensors_in((args, kwargs))
            before = [version_of(one) for one in given]
            result = forward(*args, **kwargs)
            plain = all(isinstance(one, _PLAIN) for one in pytree.tree_leaves(result))
            size = sum(one.nbytes for one in tensors_in((result, self._returned)))
            unwritten = before == [version_of(one) for one in given]
            if plain and unwritten and size <= self._most:
                self._returned[name] = fresh(result)
            return result

        return known


def _around(name: str) -> Iterator[str]:
    """Yield the names of the modules around one."""
    while name:
        name = name.rpartition(".")[0]
        yield name
