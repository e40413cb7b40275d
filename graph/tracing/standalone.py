"""A traced model as a module of its own, which runs at more than one size of its inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from graph.errors import TraceError
from graph.tracing.export import (
    Program,
    bound_arguments,
    canonical_names,
    concrete,
    inlined,
    integer_lists,
    run_export,
    tensors_of,
    varies,
)
from graph.tracing.patches import compiled_when_run, every_size, few_questions

LARGEST = 2**16
"""A limit of a size beyond this is that of an index, and not one of the code."""

GUARDS = "_guards_fn"
"""The module in a program that checks the sizes of its inputs."""

_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)

_RESHAPES = ("aten.view.default", "aten.reshape.default", "aten.unflatten.int")

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Sizes:
    """For inputs of which sizes a program holds.

    shapes: Of each tensor among its arguments, by name; None for a size that is open.
    guards: Conditions under which the code does what was traced, as Python code.
    """

    shapes: Mapping[str, tuple[int | None, ...]]
    guards: tuple[str, ...]

    def misfit(self, inputs: Mapping[str, Any]) -> str | None:
        """Return the name of an input of another shape; None if there is none."""
        return next((n for n, due in self.shapes.items() if not _fits(inputs[n].shape, due)), None)

    def broken(self, inputs: Mapping[str, Any]) -> str | None:
        """Return a condition that some inputs, by name, do not meet; None if there is none."""
        code = (guard for guard in self.guards if not eval(guard, {"math": math}, dict(inputs)))
        return next(code, None)


def _fits(shape: Sequence[int], due: Sequence[int | None]) -> bool:
    pairs = zip(due, shape, strict=False)
    # Not by `in`, of which torch.compile makes something else for a size that is open.
    return len(shape) == len(due) and all(size is None or size == given for size, given in pairs)


@dataclass(frozen=True)
class Standalone:
    """A traced model that runs without the code it was traced from.

    module: Holds every tensor that the graph reads under the name that it has in the model, the
        model's own tensors and not copies; its nodes are those of the program.
    program: The same as the rules read it, sizes as in the example.
    names: Of its arguments, in order.
    structure: What its outputs, a flat list in the graph, are put together to.
    sizes: For inputs of which sizes it holds.
    most: The largest value of each open size that has one.
    exact: Whether the guards say what is done for sizes of 0 and 1.
    """

    module: GraphModule
    program: Program
    names: tuple[str, ...]
    structure: pytree.TreeSpec
    sizes: Sizes
    most: Mapping[Any, int]
    exact: bool

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        """The leaves of the arguments, as they were traced: tensors without values, and numbers."""
        nodes = self.module.graph.find_nodes(op="placeholder")
        return tuple(node.meta.get("val") for node in nodes)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """The name of each leaf of the arguments."""
        return tuple(str(node.target) for node in self.module.graph.find_nodes(op="placeholder"))

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the program holds for inputs of these sizes."""
        leaves = pytree.tree_leaves({name: inputs[name] for name in self.names})
        named = dict(zip(self.input_names, leaves, strict=True))
        return self.sizes.misfit(named) is None and self.sizes.broken(named) is None

    def generic_sizes(self) -> dict[sympy.Basic, int]:
        """Return sizes that the program takes and that no number in its code is likely to equal.

        They are given by the symbol of each open size: a prime, or what the guards allow.
        """
        shapes = {
            name: value.shape
            for name, value in zip(self.input_names, self.inputs, strict=True)
            if isinstance(value, Tensor)
        }
        opened: list[Any] = [size for shape in shapes.values() for size in shape if varies(size)]
        found = {expression(s): s.node.hint for s in opened if expression(s).is_Symbol}

        # A reshape that computes a size by division takes multiples alone.
        reshaped = [
            (before, after)
            for node in self.module.graph.nodes
            if str(node.target) in _RESHAPES
            for before, after in [map(_count, (node.args[0].meta["val"], node.meta["val"]))]
            if before != after
        ]

        def takes(sizes: Mapping[Any, Any]) -> bool:
            made = {
                name: SimpleNamespace(
                    shape=tuple(int(expression(s).xreplace(sizes)) for s in shape)
                )
                for name, shape in shapes.items()
            }
            within = all(sizes[size] <= self.most.get(size, LARGEST) for size in sizes)
            whole = all(one.xreplace(sizes) == other.xreplace(sizes) for one, other in reshaped)
            return within and whole and self.sizes.broken(made) is None

        for size, given in [*found.items()]:
            for number in (*_PRIMES, *(given * prime for prime in _PRIMES), given + 1, given - 1):
                if number not in found.values() and takes({**found, size: number}):
                    found[size] = number
                    break
        return found

    @property
    def most_samples(self) -> int | None:
        """How many samples the program holds for; None for any number."""
        counts = [v.shape[0] for v in self.inputs if isinstance(v, Tensor) and v.dim()]
        if any(varies(count) and expression(count) not in self.most for count in counts):
            return None
        found = [self.most.get(expression(count), concrete(count)) for count in counts]
        return max((count for count in found if count is not None), default=1)


def expression(size: Any) -> Any:
    """Return a number of a trace as an expression of sympy."""
    return size.node.expr if isinstance(size, SYMBOLIC) else sympy.sympify(size)


def _count(tensor: Tensor) -> Any:
    """Return the number of entries of a traced tensor as an expression of sympy."""
    return math.prod(map(expression, tensor.shape))


def export_standalone(
    model: torch.nn.Module,
    example: Mapping[str, Any],
    left_open: Mapping[str, Collection[int]],
    *,
    lines: bool = False,
    exact: bool = True,
) -> Standalone:
    """Trace a model in evaluation mode, some sizes of its inputs left open.

    left_open: Dimensions, by argument, whose sizes are left open where the model does so.
    lines: Whether nodes say which lines of code called them, which takes half as long again.
    exact: Whether guards say what the code does for open sizes of 0 and 1; else it is taken for
        granted that it does the same.
    Raises ExampleInputError if no argument of a name is taken, TraceError if there is no program.
    """
    bound = bound_arguments(model, (), example).arguments
    inputs = {name: value for name, value in bound.items() if name in example} | dict(example)
    sizes = {name: _sizes(given, left_open.get(name, ())) for name, given in inputs.items()}
    with few_questions(), every_size() if exact else nullcontext():
        exported = run_export(model, (), inputs, sizes, lines=lines)
    with compiled_when_run():
        unlifted = exported.module()
    graph = inlined(unlifted)
    _check_modes(unlifted)
    for node in list(graph.nodes):
        # Guards are those of `Sizes`: torch's are of kernels, too, and would refuse single samples.
        # Number formats are asserted as they were in the example.
        if node.target == GUARDS or "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)
    with compiled_when_run():
        module = GraphModule(unlifted, graph)
    return Standalone(
        module,
        _program(model, graph, exported),
        tuple(inputs),
        exported.call_spec.out_spec,
        _sizes_taken(graph),
        {
            size: int(limits.upper)
            for size, limits in exported.range_constraints.items()
            if limits.upper.is_Integer and limits.upper < LARGEST
        },
        exact,
    )


def _sizes(given: Any, dims: Collection[int]) -> Any:
    """Return which sizes are left open in an argument, as `torch.export` has it."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return dict.fromkeys((dim for dim in dims if dim < leaf.dim()), Dim.AUTO)

    return pytree.tree_map(of, given)


_KERNELS = ("_meta_registrations", "_subclasses", "_ops", "_prims", "_refs", "_decomp")
"""Modules of torch that compute the shape of what an operator returns."""


def _sizes_taken(graph: Graph) -> Sizes:
    """Return for which sizes a program holds.

    Conditions of operators say which shapes they take, or how results lie in memory.  They are no
    branches of the code, and who gives other sizes is told by the operator.
    """
    given = {str(n.target): n.meta.get("val") for n in graph.find_nodes(op="placeholder")}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    named: dict[Any, str] = {}
    guards: dict[str, None] = {}
    for name, value in tensors.items():
        for dim, size in enumerate(map(expression, value.shape)):
            first = named.setdefault(size, f"{name}.shape[{dim}]")
            if size.is_Symbol and first != f"{name}.shape[{dim}]":
                guards[f"{name}.shape[{dim}] == {first}"] = None
    symbols = {size: sympy.Symbol(name) for size, name in named.items() if size.is_Symbol}
    fakes = [value for value in tensors.values() if isinstance(value, FakeTensor)]
    env = fakes[0].fake_mode.shape_env if fakes else None
    for guard in env.guards if env is not None else ():
        condition = env.simplify(guard.expr)  # type: ignore[union-attr]  # there are guards
        named_here = condition.free_symbols and condition.free_symbols <= symbols.keys()
        if named_here and not _is_of_kernels(guard.sloc):
            guards[PythonPrinter().doprint(condition.xreplace(symbols))] = None
    shapes = {
        name: tuple(None if varies(size) else concrete(size) for size in value.shape)
        for name, value in tensors.items()
    }
    return Sizes(shapes, tuple(guards))


def _is_of_kernels(place: Any) -> bool:
    """Whether it was an operator that relied on something, and not code that calls operators."""
    path = Path(place.framework_loc.filename) if place.framework_loc is not None else Path()
    inside = path.parts[path.parts.index("torch") + 1 :] if "torch" in path.parts else ()
    return bool(inside) and inside[0].removesuffix(".py").startswith(_KERNELS)


def _check_modes(module: GraphModule) -> None:
    """Refuse a program that asks for lower precision by itself: the mode is not written out."""
    for node in module.graph.nodes:
        lowers = getattr(node.target, "__name__", "") == "wrap_with_autocast"
        if lowers and True in node.args[:4]:
            raise TraceError(
                "a part of it runs under torch.autocast",
                "",
                "Turn autocast on around the model rather than inside of it.",
            )


def _program(
    model: torch.nn.Module, graph: Graph, exported: torch.export.ExportedProgram
) -> Program:
    names = canonical_names(model)
    read = {node: str(node.target) for node in graph.nodes if node.op == "get_attr"}
    holders = {node.name: names[target] for node, target in read.items() if target in names}
    lists = {
        spec.target: numbers
        for spec in exported.graph_signature.input_specs
        for name, numbers in integer_lists(exported)
        if name == spec.arg.name
    }
    constants = {node.name: lists[target] for node, target in read.items() if target in lists}
    return Program(tuple(graph.nodes), tensors_of(model), holders, frozenset(), constants)
