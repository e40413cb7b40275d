"""Coupling groups: which slices of which tensors must be kept or removed together."""

from graph.call import Call, Value
from graph.dependency import DependencyGraph, trace
from graph.errors import (
    ExampleInputError,
    GraphError,
    RuleError,
    TraceError,
    UnknownGroupError,
)
from graph.groups import CouplingGroup, Freeze, Kind, Role, Slot
from graph.propagate import Operator
from graph.rules import DEFAULT as DEFAULT_RULES
from graph.rules import RuleTable, rule

__all__ = [
    "DEFAULT_RULES",
    "Call",
    "CouplingGroup",
    "DependencyGraph",
    "ExampleInputError",
    "Freeze",
    "GraphError",
    "Kind",
    "Operator",
    "Role",
    "RuleError",
    "RuleTable",
    "Slot",
    "TraceError",
    "UnknownGroupError",
    "Value",
    "rule",
    "trace",
]
