"""The dependency graph of a model: its coupling groups, and how they hang together."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import networkx as nx
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from graph.axes import Axes, Layout
from graph.call import Value
from graph.errors import ExampleInputError, GraphError, TraceError, UnknownGroupError
from graph.grouping import groups_by_axis
from graph.groups import CouplingGroup, UnitKind
from graph.operators import ONE, Operand, Operator, Size
from graph.propagate import Propagation, arguments_of, propagate, values_in
from graph.rules import DEFAULT, RuleTable
from graph.tracing.export import ExampleInputs, Program, export_model, export_with_values


class Sizes:
    """The sizes of layouts, given the names of groups by axes; other axes keep all positions."""

    def __init__(self, axes: Axes, names: Mapping[int, str]) -> None:
        self._axes, self._names = axes, names
        self._known: dict[Layout, Size] = {}

    def of(self, dims: Iterable[Layout]) -> tuple[Size, ...]:
        """Return the sizes of some dimensions."""
        return tuple(map(self._of, dims))

    def _of(self, layout: Layout) -> Size:
        if layout not in self._known:
            total: Counter[tuple[str, ...]] = Counter()
            for segment in self._axes.resolve(layout):
                product = ONE
                for axis in segment:
                    product *= self._of_axis(axis)
                total.update(dict(product.terms))
            self._known[layout] = Size.summed(total)
        return self._known[layout]

    def _of_axis(self, axis: int) -> Size:
        bound = self._axes.parts(axis)
        if bound is not None:
            return self._of(bound)
        if axis in self._names:
            return Size((((self._names[axis],), 1),))
        return Size((((), self._axes.axis_size(axis)),))


def with_operands(program: Program, found: Propagation, sizes: Sizes) -> tuple[Operator, ...]:
    """Return the operators of a program with their arguments and outputs."""
    nodes = {node.name: node for node in program.nodes}

    def operands(node: Node) -> object:
        """Return what stands for a node: tensors, or a number."""
        result, traced = found.values.get(node), node.meta.get("val")
        if isinstance(result, int):
            return result
        tensors = (one for one in pytree.tree_leaves(traced) if isinstance(one, Tensor))
        made = [
            Operand(sizes.of(value.dims), tensor.dtype, program.holders.get(node.name, ""))
            for value, tensor in zip(values_in(result), tensors, strict=True)
        ]
        return made[0] if isinstance(result, Value) else made

    return tuple(
        replace(
            operator,
            arguments=arguments_of(node, operands),
            outputs=tuple(pytree.tree_leaves(operands(node))),
        )
        for operator in found.operators
        for node in (nodes[operator.name],)
    )


# ---- the graph ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DependencyGraph:
    """Which tensor slices of a model go together.

    Parameters
    ----------
    groups
        Coupling groups in execution order, frozen ones included.
    operators
        The operators of the traced graph in execution order.
    unread
        Names of the parameters that the example does not reach in evaluation mode, and of which it
        is unknown whether they read a group's units.
    tensors
        The dimensions of each parameter and buffer, by name.
    """

    groups: tuple[CouplingGroup, ...]
    operators: tuple[Operator, ...]
    unread: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[Size, ...]] = field(default_factory=dict, repr=False)

    @property
    def prunable(self) -> tuple[CouplingGroup, ...]:
        """The groups from which units may be removed."""
        return tuple(group for group in self.groups if group.prunable)

    def group(self, name: str) -> CouplingGroup:
        """Return a group by name.

        Raises
        ------
        UnknownGroupError
            If there is none; the message lists names close to it.
        """
        names = {group.name: group for group in self.groups}
        if name in names:
            return names[name]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or list(names)[:5]
        raise UnknownGroupError(
            f"no coupling group is called {name!r}; near it: {', '.join(near) or 'none at all'}"
        )

    def names_in(self, module: str) -> frozenset[str]:
        """Return the names of the groups whose units operators in a module, or below it, touch."""
        return frozenset(
            name
            for operator in self.operators
            if operator.module == module or operator.module.startswith(f"{module}.")
            for operand in (*operator.reads, *operator.outputs)
            for size in operand.dims
            for names, _ in size.terms
            for name in names
        )

    def draw(self, path: str | Path) -> Path:
        """Draw the groups, and the tensors whose slices they own, to a file; return its path.

        The suffix says the format, SVG without one; a GraphError says that it cannot be written.
        """
        import matplotlib

        from graph.draw import drawn  # takes a second to load

        target = Path(path)
        try:
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "groups"}):
                drawn(self.groups).savefig(target, format=target.suffix[1:] or "svg")
        except (OSError, ValueError) as error:  # a NUL in its name, or no format
            raise GraphError(f"cannot write {str(path)[:300]!r}: {error}") from error
        return target


def trace(
    model: torch.nn.Module,
    example_inputs: ExampleInputs,
    *,
    rules: RuleTable | None = None,
    opaque: Collection[str | type[torch.nn.Module]] = (),
) -> DependencyGraph:
    """Find the coupling groups of a model.

    Parameters
    ----------
    model
        Any PyTorch module, on any device, `meta` included; it is left as it was.
    example_inputs
        A tuple of positional arguments of ``model.forward`` or a dict of keyword arguments.  Only
        shapes and types matter, as far as the model's control flow goes.
    rules
        Propagation rules to use instead of the default ones, usually an extension of them:
        ``rules = graph.DEFAULT_RULES.extended()``.
    opaque
        Modules, by qualified name or by class, whose inside must be left whole: every axis that
        enters or leaves them is frozen.

    Returns
    -------
    DependencyGraph
        Its groups name the slices of every tensor that each unit owns.

    Raises
    ------
    ExampleInputError
        If the inputs do not fit the model's signature, or an opaque module does not exist.
    TraceError
        If `torch.export` refuses the model; the error carries its reason and what usually helps.
    RuleError
        If a propagation rule is wrong.
    """
    _check_opaque(model, opaque)
    table = DEFAULT if rules is None else rules
    try:
        program = export_model(model, example_inputs)
        propagation = propagate(program, table, opaque)
    except TraceError as error:
        program = export_with_values(model, example_inputs, error)
        propagation = propagate(program, table, opaque)
    groups = groups_by_axis(propagation, program.tensors)
    sizes = Sizes(propagation.axes, {axis: group.name for axis, group in groups.items()})
    operators = with_operands(program, propagation, sizes)
    read = {name for operator in operators for name in operator.tensors}
    unread = (n for n, tensor in program.tensors.items() if tensor.is_parameter and n not in read)
    tensors = {name: sizes.of(dims) for name, dims in propagation.tensors.items()}
    return DependencyGraph(tuple(groups.values()), operators, tuple(sorted(unread)), tensors)


def _check_opaque(model: torch.nn.Module, opaque: Collection[str | type[torch.nn.Module]]) -> None:
    modules = dict(model.named_modules())
    kinds = {type(module) for module in modules.values()}
    for wanted in opaque:
        if wanted not in (modules if isinstance(wanted, str) else kinds):
            near = difflib.get_close_matches(str(wanted), modules, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ExampleInputError(f"the model has no module {wanted!r}, which opaque names{hint}")


# ---- residual streams --------------------------------------------------------------------


def residual_groups(traced: DependencyGraph) -> frozenset[str]:
    """Return the names of the groups whose units are sums of what several layers produce.

    Such units run through many blocks: removing one narrows them all.  The gates of squeeze and
    excitation multiply what another layer produced and make no residual stream.
    """
    network: nx.DiGraph[str] = nx.DiGraph()
    for operator in traced.operators:
        network.add_node(operator.name, target=operator.target)
        network.add_edges_from((name, operator.name) for name in operator.inputs)
    names = {operator.order: operator.name for operator in traced.operators}
    return frozenset(
        group.name
        for group in traced.groups
        if group.kind is UnitKind.HIDDEN
        or (
            group.kind is UnitKind.CHANNELS
            and _is_summed(
                network,
                {names[slot.order] for slot in group.producers},
                {names[slot.order] for slot in group.consumers},
            )
        )
    )


def _is_summed(network: nx.DiGraph[str], producers: set[str], consumers: set[str]) -> bool:
    """Tell whether an addition joins values of which each has a producer that the other lacks."""
    if len(producers) < 2:
        return False
    # What a producer reads, and what a consumer makes of the units, are other units.
    read = network.in_edges(producers)
    flow = nx.restricted_view(network, consumers - producers, read)
    reached = {name: {name} | nx.descendants(flow, name) for name in producers}
    for name in set().union(*reached.values()):
        if not network.nodes[name]["target"].startswith("aten.add"):
            continue
        sources = [
            {p for p in producers if value in reached[p]} for value in network.predecessors(name)
        ]
        if any(a - b and b - a for a, b in combinations(sources, 2)):
            return True
    return False
