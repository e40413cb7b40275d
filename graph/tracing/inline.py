"""Write out, in a traced graph, what the code does under a mode such as `torch.no_grad`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

_WRAPPERS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Operators that call a graph under a mode, which changes no axis of it."""


def inlined(module: GraphModule) -> Graph:
    """Return the graph of a module with the graphs called under a mode in place of their calls.

    module: As exported; it is not changed.
    """
    if not any(_is_wrapper(node) for node in module.graph.nodes):
        return module.graph
    flat = Graph()
    flat.output(_copied(module, flat, {}))
    return flat


def _is_wrapper(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _WRAPPERS


def _copied(module: GraphModule, into: Graph, known: dict[Node, Any]) -> Any:
    """Copy all nodes whose results are not `known` and return what the module returns."""
    for node in module.graph.nodes:
        if node.op == "output":
            return map_arg(node.args[0], known.__getitem__)
        if node in known:
            continue
        if _is_wrapper(node):
            known[node] = _called(module, node, into, known)
        elif node.target is operator.getitem and not isinstance(known[node.args[0]], Node):
            known[node] = known[node.args[0]][node.args[1]]
        else:
            known[node] = into.node_copy(node, known.__getitem__)
    raise ValueError("a traced graph returns nothing")


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
