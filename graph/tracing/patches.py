"""All that is replaced for the whole process, and what has only a private name in torch.

Each has its reason here, and a test in ``tests/graph/test_patches.py`` that fails once it is needed
no longer.  Locks see to it that nothing stays replaced, however many threads there are.
"""

from __future__ import annotations

import builtins
import io
import itertools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx import config as fx_config
from torch.fx.experimental import _config as size_config
from torch.fx.experimental import symbolic_shapes
from torch.fx.graph import _PyTreeCodeGen

_EXPORT = threading.RLock()
"""Held during an export: torch replaces functions of Python and of its own meanwhile, too."""

_ASSIGNMENTS = threading.RLock()
"""Held while it changes who is told of assignments."""


@contextmanager
def exporting(lines: bool) -> Iterator[None]:
    """Replace what an export needs, one export at a time; with `lines`, nodes note theirs."""
    with _EXPORT, _stack_traces(lines), symbolic_lengths(), compiled_when_run(), _quiet():
        yield


@contextmanager
def compiled_when_run() -> Iterator[None]:
    """Write the Python code of a graph when it is first run, as few are that an export makes.

    Torch writes and compiles it a dozen times in an export, an eighth of all the time.
    """
    original = GraphModule.recompile

    def recompile(module: GraphModule) -> None:
        codegen = module.graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            module._in_spec = codegen.pytree_info.in_spec
            module._out_spec = codegen.pytree_info.out_spec

        def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
            original(self)
            return self.forward(*args, **kwargs)

        type(module).forward = forward  # each has its own class

    with _EXPORT:
        GraphModule.recompile = recompile  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            GraphModule.recompile = original  # type: ignore[method-assign]


@contextmanager
def symbolic_lengths() -> Iterator[None]:
    """Let `len` of a tensor be a size that may vary.

    Python makes a number of whatever `__len__` returns, and a program that has seen one holds for
    that number of samples alone.
    """
    original = builtins.len

    def length(value: Any, /) -> Any:
        plain = isinstance(value, torch.Tensor) and not value.is_nested and value.dim() > 0
        return value.shape[0] if plain else original(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = original


# ---- what the exporter says --------------------------------------------------------------


@contextmanager
def _stack_traces(noted: bool) -> Iterator[None]:
    """Note which lines of Python call each operator, or do not, which is faster."""
    switch = "do_not_emit_stack_traces"
    before = getattr(fx_config, switch, None)
    if before is None:  # an older torch notes them in any case
        yield
        return
    setattr(fx_config, switch, not noted)
    try:
        yield
    finally:
        setattr(fx_config, switch, before)


def every_size() -> AbstractContextManager[None]:
    """Let an open size be 0 or 1, too, unless the code does something else then.

    An export takes for granted that it is larger, and no guard of its program says so.  It is for
    programs whose guards are read: torch checks those of kernels, too, before it runs one.
    """
    return size_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined, no-any-return]


_MOST_QUESTIONS = 200
"""About open sizes: language models ask 10 to 40, and code that pads to windows or chunks 120; and
shapes that torch looks up ask again."""


@contextmanager
def few_questions() -> Iterator[None]:
    """Give up an export whose code asks too much about open sizes: it would take minutes."""
    name, asked = "_evaluate_expr", itertools.count(1)
    original = getattr(symbolic_shapes.ShapeEnv, name)

    def counted(env: symbolic_shapes.ShapeEnv, *args: Any, **options: Any) -> Any:
        if next(asked) > _MOST_QUESTIONS:
            raise RuntimeError(f"the code compares sizes more than {_MOST_QUESTIONS} times")
        return original(env, *args, **options)

    # A guard notes the innermost frame that is none of its own file.
    counted.__code__ = counted.__code__.replace(co_filename=symbolic_shapes.__file__)
    with _EXPORT:
        setattr(symbolic_shapes.ShapeEnv, name, counted)
        try:
            yield
        finally:
            setattr(symbolic_shapes.ShapeEnv, name, original)


_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch._export",
    "torch.export",
    "torch.fx.experimental.proxy_tensor",
    "torch.fx.experimental.symbolic_shapes",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling of attributes that are put back, and of errors besides."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    written, dump = io.StringIO(), None
    try:
        with warnings.catch_warnings(), redirect_stderr(written):
            warnings.filterwarnings("ignore", "The tensor attribute")
            yield
    except Exception as error:
        dump = getattr(error.__cause__ or error, "partial_fx_graph", None)
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        text = written.getvalue()
        sys.stderr.write(text if dump is None else text.replace(f"{dump}\n", ""))


@contextmanager
def shapes_alone(mode: Any) -> Iterator[Any]:
    """Be in a `FakeTensorMode` whose logger prints no errors meanwhile."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_of_others)
    try:
        with mode as fake:
            yield fake
    finally:
        logger.removeFilter(is_of_others)


def computes_shapes_alone() -> bool:
    """Whether a mode is on in which tensors have shapes and no values."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


# ---- modules -----------------------------------------------------------------------------

_Listener: TypeAlias = Callable[[nn.Module, str], None]

_listeners: list[_Listener] = []
_assign = nn.Module.__setattr__


def _telling(module: nn.Module, name: str, value: Any) -> None:
    for listener in tuple(_listeners):
        listener(module, name)
    _assign(module, name, value)


@contextmanager
def assignments_told(listener: _Listener) -> Iterator[None]:
    """Tell a listener, while the block runs, which attribute of which module will be assigned.

    What a module keeps for a moment, while modules inside it run, is seen in no comparison of
    before and after; Python looks `__setattr__` up in the class, and a class of its own for each
    module would be seen by code that compares classes.
    """
    with _ASSIGNMENTS:
        if not _listeners:
            nn.Module.__setattr__ = _telling  # type: ignore[method-assign, assignment]
        _listeners.append(listener)
    try:
        yield
    finally:
        with _ASSIGNMENTS:
            _listeners.remove(listener)
            if not _listeners:
                nn.Module.__setattr__ = _assign  # type: ignore[method-assign]


# ---- modes that intercept operators ------------------------------------------------------


@dataclass(frozen=True)
class ModeDepths:
    """How many modes of each kind a thread is in: those that intercept functions, and operators.

    A suspended pass may be inside of some (``with torch.device("cuda")`` in a forward is one),
    which must not see the operators of the passes that run meanwhile.
    """

    functions: int
    operators: int

    @classmethod
    def now(cls) -> ModeDepths:
        """Count them."""
        return cls(torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack())

    def leave_others(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Leave modes until there are as many, and return those left, the innermost first."""
        now = ModeDepths.now()
        functions = range(now.functions - self.functions)
        operators = range(now.operators - self.operators)
        return (
            [torch._C._pop_torch_function_stack() for _ in functions],
            [torch._C._pop_torch_dispatch_stack() for _ in operators],
        )


def enter_again(left: tuple[Sequence[Any], Sequence[Any]]) -> None:
    """Enter the modes that `ModeDepths.leave_others` returned."""
    functions, operators = left
    for mode in reversed(operators):
        torch._C._push_on_torch_dispatch_stack(mode)
    for mode in reversed(functions):
        torch._C._push_on_torch_function_stack(mode)
