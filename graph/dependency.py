"""The dependency graph of a model: its coupling groups, and how they hang together."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import torch

from graph.draw import render
from graph.errors import ArgumentError, ExampleInputError, GraphError, UnknownGroupError
from graph.grouping import build_groups
from graph.groups import CouplingGroup, Role
from graph.propagate import Operator, propagate
from graph.rules import DEFAULT, RuleTable
from graph.tracing.export import ExampleInputs, export_model
from graph.training import followed_in_training


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
        Names of the parameters that the example does not reach, and of which it is unknown whether
        they read a group's units.
    stuck
        Of these, what code for training reads beside a group's units, in a way that cannot follow.
    """

    groups: tuple[CouplingGroup, ...]
    operators: tuple[Operator, ...]
    unread: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()

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
        ArgumentError
            If it is no text.
        """
        if not isinstance(name, str):
            raise ArgumentError(f"the name of a group is a {type(name).__name__}; give a str")
        names = {group.name: group for group in self.groups}
        if name in names:
            return names[name]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or list(names)[:5]
        raise UnknownGroupError(
            f"no coupling group is called {name!r}; near it: {', '.join(near) or 'none at all'}"
        )

    def networkx(self) -> nx.DiGraph[str]:
        """Return a directed graph of operators, slots and groups.

        Nodes carry ``kind`` (``"operator"``, ``"slot"`` or ``"group"``) and the object they stand
        for as ``data``.  Edges run from operators to the operators that read their results, from
        slots to the operators that use them, and between slots and groups: from producers and
        pass-through slots to the group, from the group to its consumers.  No operator uses what
        training alone reads.
        """
        network: nx.DiGraph[str] = nx.DiGraph()
        by_order = {operator.order: operator.name for operator in self.operators}
        used = {tensor for operator in self.operators for tensor in operator.tensors}
        for operator in self.operators:
            network.add_node(operator.name, kind="operator", data=operator)
            network.add_edges_from((name, operator.name) for name in operator.inputs)
        for group in self.groups:
            network.add_node(group.name, kind="group", data=group)
            for slot in group.slots:
                name = f"{slot.tensor}[{slot.dim}]+{slot.offset} {slot.role.value} of {group.name}"
                network.add_node(name, kind="slot", data=slot)
                reads = slot.role in (Role.CONSUMER, Role.ASIDE)
                network.add_edge(*((group.name, name) if reads else (name, group.name)))
                if slot.tensor in used:
                    network.add_edge(name, by_order[slot.order])
        return network

    def draw(self, path: str | Path) -> Path:
        """Write a drawing of the groups as SVG and return where it lies.

        Parameters
        ----------
        path
            File to write.

        Raises
        ------
        ArgumentError
            If it is no path.
        GraphError
            If it cannot be written.
        """
        if not isinstance(path, str | Path):
            raise ArgumentError(f"the path is a {type(path).__name__}; give the name of a file")
        target = Path(path)
        try:
            if target.is_fifo():
                raise OSError(errno.EINVAL, "it is a pipe, which may never be read")
            target.write_text(render(self.groups), encoding="utf-8")
        except (OSError, ValueError) as error:  # a NUL in its name
            reason = getattr(error, "strerror", None) or error
            raise GraphError(f"cannot write {str(path)[:300]!r}: {reason}") from error
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
    ArgumentError
        If something is of a wrong type.
    ExampleInputError
        If the inputs do not fit the model's signature, or an opaque module does not exist.
    TraceError
        If `torch.export` refuses the model; the error carries its reason and what usually helps.
    RuleError
        If a propagation rule is wrong.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    if rules is not None and not isinstance(rules, RuleTable):
        raise ArgumentError(f"rules is a {type(rules).__name__}; give a RuleTable, or None")
    _check_opaque(model, opaque)
    table = DEFAULT if rules is None else rules
    program = export_model(model, example_inputs)
    propagation = propagate(program, table, opaque)
    groups = build_groups(propagation, program.tensors)
    read = {name for operator in propagation.operators for name in operator.tensors}
    unread = {name: tensor for name, tensor in program.tensors.items() if name not in read}
    groups, unknown, stuck = followed_in_training(
        model, example_inputs, table, opaque, groups, unread
    )
    return DependencyGraph(
        groups, propagation.operators, tuple(sorted(unknown)), tuple(sorted(stuck))
    )


def _check_opaque(model: torch.nn.Module, opaque: Collection[str | type[torch.nn.Module]]) -> None:
    if not isinstance(opaque, list | tuple | set | frozenset):
        raise ArgumentError(f"opaque is a {type(opaque).__name__}; give a list of names or classes")
    for wanted in opaque:
        if not isinstance(wanted, str | type):
            raise ArgumentError(f"opaque names a {type(wanted).__name__}; give names or classes")
    modules = dict(model.named_modules())
    kinds = {type(module) for module in modules.values()}
    for wanted in opaque:
        if wanted not in (modules if isinstance(wanted, str) else kinds):
            near = difflib.get_close_matches(str(wanted), modules, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ExampleInputError(f"the model has no module {wanted!r} to leave whole{hint}")
