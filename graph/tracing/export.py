"""From a PyTorch model to a graph of ATen operators, without touching the model."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from traceback import walk_tb
from types import TracebackType
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graph.errors import ExampleInputError, TraceError
from graph.tracing.patches import exporting
from graph.tracing.preserve import (
    asked_of_to,
    caches_kept,
    forget_derived,
    preserved,
    without_cache,
)

_MADE = frozenset(
    {torch.arange, torch.empty, torch.full, torch.ones, torch.scalar_tensor, torch.tensor}
    | {torch.zeros}
)
"""Functions that make a tensor of numbers."""


class _Computing(TorchFunctionMode):
    """Compute what depends on nothing but tensors that have values, and on numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = all(type(one) is Tensor for one in tensors) if tensors else func in _MADE
        if known and not any(isinstance(leaf, torch.SymInt) for leaf in leaves):
            with unset_fake_temporarily(), disable_proxy_modes_tracing():
                found = func(*args, **(kwargs or {}))
            # Fractions that are made, such as a bias of attention, are as others.
            if tensors or not found.is_floating_point():
                return found
        return func(*args, **(kwargs or {}))


def whole_numbers(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs that are tensors of whole numbers."""
    kinds = (torch.int64, torch.int32)
    return {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.dtype in kinds}


@contextmanager
def values_known(model: torch.nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model read the values of some of its keyword arguments while it is exported."""

    def given(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, **values}

    hook = model.register_forward_pre_hook(given, with_kwargs=True)
    try:
        with _Computing():
            yield
    finally:
        hook.remove()


# ---- programs -----------------------------------------------------------------------------


ExampleInputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any]


_LONGEST_LIST = 64


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or buffer of the model."""

    shape: tuple[int, ...]
    is_parameter: bool


@dataclass(frozen=True)
class Program:
    """An exported model.

    nodes: The nodes of the graph in execution order.
    tensors: Parameters and buffers by name.
    holders: For each placeholder that stands for one of them, its name.
    written: The placeholders that stand for a tensor in the code.
    constants: For those of them that are a short list of integers, that list.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, TensorInfo]
    holders: Mapping[str, str]
    written: frozenset[str]
    constants: Mapping[str, tuple[int, ...]]


def export_model(model: torch.nn.Module, example_inputs: ExampleInputs) -> Program:
    """Export a model in eval mode, on any device (`meta` included); it is left as it was.

    Raises ExampleInputError if the inputs do not fit the signature of ``model.forward``, and
    TraceError if the model cannot be exported.
    """
    args, kwargs = _bind(model, example_inputs)
    return _program(model, run_export(model, args, kwargs))


def export_with_values(
    model: torch.nn.Module, example_inputs: ExampleInputs, error: TraceError
) -> Program:
    """Export a model whose code reads whole numbers off its inputs, along those of the example.

    What other numbers lead to is not seen.  So all parameters have to be used; where they are not,
    or that is not what the plain export failed by, its error is raised again.
    """
    args, kwargs = _bind(model, example_inputs)
    values = whole_numbers(kwargs)
    if not values or DEPENDS not in str(error):
        raise error
    try:
        with values_known(model, values):
            exported = run_export(model, args, kwargs)
    except TraceError:
        raise error from None
    program = _program(model, exported)
    used = {node.name for node in program.nodes if node.users}
    read = {name for holder, name in program.holders.items() if holder in used}
    if any(one.is_parameter and name not in read for name, one in program.tensors.items()):
        raise error
    return program


def _program(model: torch.nn.Module, exported: torch.export.ExportedProgram) -> Program:
    names = canonical_names(model)
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    holders = {
        spec.arg.name: names[spec.target]
        for spec in exported.graph_signature.input_specs
        if spec.kind in kinds and spec.target in names
    }
    return Program(
        tuple(inlined(exported.graph_module).nodes),
        tensors_of(model),
        holders,
        frozenset(
            spec.arg.name
            for spec in exported.graph_signature.input_specs
            if spec.kind is InputKind.CONSTANT_TENSOR
        ),
        dict(integer_lists(exported)),
    )


def run_export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Any = None,
    *,
    lines: bool = False,
) -> torch.export.ExportedProgram:
    """Call `torch.export` on a model in eval mode, which is left as it was.

    dynamic: Which sizes of inputs may differ from those of the example, as of `torch.export`.
    lines: Whether nodes say which lines of code called them.
    Raises TraceError if the model cannot be exported.
    """
    with (
        caches_kept(model),
        preserved(model),
        without_cache(model),
        _in_evaluation(model),
        _without_idle_casts(model),
        exporting(lines),
        torch.no_grad(),
    ):
        try:
            forget_derived(model)  # which would be constants
            exported = torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=dynamic, strict=False
            )
        except Exception as error:  # anything the user's forward may raise
            raise _explained(error, model) from error
        _let_layouts_differ(exported)
    return exported


def _let_layouts_differ(exported: torch.export.ExportedProgram) -> None:
    """Let a program run whatever strides its operators choose.

    Kernels of one operator, as of attention, lay out what they return in different ways.  Under
    one of them a ``contiguous()`` does nothing and is not noted, and the ``view`` after it fails
    under another; ``reshape`` copies there.
    """
    aten = torch.ops.aten
    for module in exported.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
                node.target = aten.reshape.default
            module.recompile()


def tensors_of(model: torch.nn.Module) -> dict[str, TensorInfo]:
    """Describe the parameters and buffers of a model, by the first of their names."""
    names = canonical_names(model)
    return {
        names[name]: TensorInfo(tuple(tensor.shape), is_parameter)
        for name, tensor, is_parameter in _named_tensors(model)
    }


def integer_lists(exported: torch.export.ExportedProgram) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the short lists of integers in the code: the name of each, and what it holds."""
    for spec in exported.graph_signature.input_specs:
        constant = exported.constants.get(spec.target or "")
        if spec.kind is not InputKind.CONSTANT_TENSOR or not isinstance(constant, torch.Tensor):
            continue
        short = constant.dim() == 1 and constant.numel() <= _LONGEST_LIST
        if short and constant.dtype is torch.int64 and constant.device.type != "meta":
            yield spec.arg.name, tuple(constant.tolist())


def module_of(node: Node) -> str:
    """Return the qualified name of the innermost module in which a node was traced."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # A module called again is recorded as ``name@1``.
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def concrete(
    size: int | torch.SymInt, sizes: Mapping[sympy.Basic, int] | None = None
) -> int | None:
    """Return what a size is for the example inputs; None if it depends on their values.

    sizes: Numbers for the symbols of open sizes, in place of those of the example.
    """
    if not isinstance(size, torch.SymInt):
        return size
    known = size.node.expr.xreplace(sizes) if sizes else size.node.hint
    return int(known) if isinstance(known, int | sympy.Integer) else None


def varies(size: int | torch.SymInt) -> bool:
    """Whether a size in a trace is another one for other inputs."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


# ---- code under a mode such as `torch.no_grad` ---------------------------------------------

_WRAPPERS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Operators that call a graph under a mode, which changes no axis of it."""


def inlined(module: GraphModule) -> Graph:
    """Return the graph of a module with the graphs called under a mode in place of their calls."""
    if not any(_is_wrapper(node) for node in module.graph.nodes):
        return module.graph
    flat = Graph()
    flat.output(_copied(module, flat, {}))
    return flat


def _is_wrapper(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _WRAPPERS


def _copied(module: GraphModule, into: Graph, known: dict[Node, Any]) -> Any:
    """Copy all nodes whose results are not `known` and return what the module returns."""
    *nodes, output = module.graph.nodes
    for node in nodes:
        if node in known:
            continue
        if _is_wrapper(node):
            known[node] = _called(module, node, into, known)
        elif node.target is operator.getitem and not isinstance(known[node.args[0]], Node):
            known[node] = known[node.args[0]][node.args[1]]
        else:
            known[node] = into.node_copy(node, known.__getitem__)
    return map_arg(output.args[0], known.__getitem__)


def _called(module: GraphModule, call: Node, into: Graph, known: dict[Node, Any]) -> Any:
    """Copy the graph that is called: (settings, ..., graph, arguments, ...)."""
    place = next(i for i, arg in enumerate(call.args) if _names_graph(module, arg))
    graph = getattr(module, str(call.args[place].target))  # type: ignore[union-attr]
    arguments = map_arg(call.args[place + 1 :], known.__getitem__)
    inputs = (node for node in graph.graph.nodes if node.op == "placeholder")
    return _copied(graph, into, dict(zip(inputs, arguments, strict=True)))


def _names_graph(module: torch.nn.Module, argument: object) -> bool:
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return False
    return isinstance(getattr(module, str(argument.target), None), GraphModule)


# ---- inputs ------------------------------------------------------------------------------


def _bind(
    model: torch.nn.Module, example_inputs: ExampleInputs
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple):
        args, kwargs = example_inputs, {}
    else:
        raise ExampleInputError(
            f"example_inputs is a {type(example_inputs).__name__}; pass a tuple of positional "
            "arguments or a dict of keyword arguments"
        )
    bound = bound_arguments(model, args, kwargs)
    if "use_cache" in bound.signature.parameters and "use_cache" not in bound.arguments:
        # A cache would make keys and values outputs of the model.
        kwargs["use_cache"] = False
    device = next((tensor.device for _, tensor, _ in _named_tensors(model)), None)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))  # type: ignore[no-any-return]


def bound_arguments(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Return the arguments of a forward pass by its signature, or raise ExampleInputError."""
    try:
        signature = inspect.signature(model.forward)
    except ValueError as error:
        raise ExampleInputError(
            f"{type(model).__name__}.forward has no signature, as in a TorchScript model; "
            "give the original model"
        ) from error
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error


@contextmanager
def _in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _without_idle_casts(model: torch.nn.Module) -> Iterator[None]:
    """Let modules that cast others in their forward pass be, where that changes nothing.

    `torch.export` stands in for their parameters meanwhile, and these cannot be replaced.  Each
    module has a ``to`` of its own while the block runs, within `preserved`, which takes it away.
    """
    for module in model.modules():
        vars(module)["to"] = partial(_cast, module, module.to)
    yield


def _cast(
    module: torch.nn.Module, to: Callable[..., torch.nn.Module], *args: Any, **options: Any
) -> torch.nn.Module:
    device, dtype, memory_format = asked_of_to(*args, **options)
    idle = memory_format is None and all(
        device in (None, tensor.device)
        and (dtype in (None, tensor.dtype) or not tensor.is_floating_point())
        for tensor in (*module.parameters(), *module.buffers())
    )
    return module if idle else to(*args, **options)


# ---- names -------------------------------------------------------------------------------


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, True
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, False


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Map every name of a tensor to the first one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor, _ in _named_tensors(model)}


# ---- errors ------------------------------------------------------------------------------

DEPENDS = "depends on the values in"
"""What errors say of code that reads numbers off tensors."""

_VALUES_HINT = (
    f"Its control flow {DEPENDS} a tensor. Move the decision out of `forward`, or give example "
    "inputs and options with which it is not taken."
)
_HINT = (
    "Check that the model runs on the example inputs, and that these and its outputs are tensors, "
    "numbers, tuples, lists and dicts, or classes registered with "
    "torch.export.register_dataclass. Move side effects and calls into other libraries out of "
    "`forward`; pass the Python module in place of TorchScript, and the floating-point model in "
    "place of a quantized one."
)
CAPTURE_HINT = (
    "What torch.cond, torch.while_loop and the like call has to be captured whole: without side "
    "effects, with results of the same form in every branch, and without modules where the model "
    "is to be pruned. Move the modules or the decision out of it."
)


def _explained(error: Exception, model: torch.nn.Module) -> TraceError:
    by_values = re.search("data-?dependent", f"{type(error).__name__} {error}", re.IGNORECASE)
    hint = _VALUES_HINT if by_values else _HINT
    if is_of_capture(error):
        hint = CAPTURE_HINT
    return TraceError(first_lines(error), failing_module(error.__traceback__, model), hint)


def is_of_capture(error: BaseException) -> bool:
    """Tell whether `torch._dynamo` could not capture what an operator like `torch.cond` calls."""
    from_capture = any(kind.__module__.startswith("torch._dynamo") for kind in type(error).__mro__)
    called = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return from_capture and any(name.startswith("torch._higher_order_ops") for name in called)


def first_lines(error: BaseException) -> str:
    """Return the first line of what an error says, and the next one if it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:announced]) or type(error).__name__


def failing_module(trace: TracebackType | None, model: torch.nn.Module) -> str:
    """Return the name of the innermost module whose method ran when an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = names.get(id(owner), found)
        trace = trace.tb_next
    return found
