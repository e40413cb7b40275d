"""A traced model as a module of its own, which runs at more than one size of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from graph.errors import ExampleInputError, TraceError
from graph.tracing.export import (
    Program,
    canonical_names,
    integer_lists,
    run_export,
    tensors_of,
    varies,
)
from graph.tracing.inline import inlined

_ANY_NUMBER = 2**31
"""Of samples: no batch has as many."""

_NO_CHANGE = ("_assert_tensor_metadata",)
"""Operators that look at the number format of the example, and compute nothing."""


@dataclass(frozen=True)
class Standalone:
    """A traced model that runs without the code it was traced from.

    module: Holds every tensor that the graph reads under the name that it has in the model, the
        model's own tensors and not copies; its nodes are those of the program.
    program: The same as the rules read it, sizes as in the example.
    names: Of its arguments, in order.
    structure: What its outputs, a flat list in the graph, are put together to.
    """

    module: GraphModule
    program: Program
    names: tuple[str, ...]
    structure: pytree.TreeSpec


def export_standalone(
    model: torch.nn.Module, example: Mapping[str, Tensor], left_open: Mapping[str, Collection[int]]
) -> Standalone:
    """Trace a model for any number of samples, and for other sizes where it is made for them.

    model: In evaluation mode; left as it was.
    example: Keyword arguments of its forward pass, tensors with two samples or more.
    left_open: Dimensions of the inputs whose sizes are left open where the model does so, 0 among
        them.
    Raises ExampleInputError if an argument is no tensor, or none of that name is taken.
    Raises TraceError if it cannot be exported, or only for the number of samples in the example.
    """
    inputs = _in_order(model, example)
    auto: Any = Dim.AUTO
    sizes = {name: dict.fromkeys(left_open.get(name, ()), auto) for name in inputs}
    exported = run_export(model, (), inputs, sizes)
    unlifted = exported.module()
    graph = inlined(unlifted)
    _check_modes(unlifted)
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    _check_samples([node.meta["val"].shape[0] for node in arguments], exported)
    for node in list(graph.nodes):
        if any(name in str(node.target) for name in _NO_CHANGE):
            graph.erase_node(node)
    return Standalone(
        GraphModule(unlifted, graph),
        _program(model, graph, exported),
        tuple(inputs),
        exported.call_spec.out_spec,
    )


def _in_order(model: torch.nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments in the order in which the model takes them."""
    if not example or not all(
        isinstance(value, Tensor) and value.dim() for value in example.values()
    ):
        raise ExampleInputError("a program is traced with tensors alone, each with samples")
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(**example).arguments
    except TypeError as error:
        raise ExampleInputError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    named = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
    return named | {name: value for name, value in example.items() if name not in named}


def _check_samples(
    numbers: Sequence[int | torch.SymInt], exported: torch.export.ExportedProgram
) -> None:
    """Refuse a program that does not hold for any number of samples."""
    open_ones = [n.node.expr for n in numbers if isinstance(n, torch.SymInt) and varies(n)]
    if not open_ones:
        raise TraceError(
            "its program holds for the number of samples in the example alone",
            "",
            "Write -1 for that number in a view, or take it from the shape of an input.",
        )
    ranges = exported.range_constraints
    limits = [ranges[number].upper if number in ranges else None for number in open_ones]
    most = max(_ANY_NUMBER if n is None or not n.is_Integer else int(n) for n in limits)
    if most < _ANY_NUMBER:
        raise TraceError(
            f"its program holds for up to {most} samples: its code does something else for more",
            "",
            "Let the code not depend on the number of samples.",
        )


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
