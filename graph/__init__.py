"""Coupling groups: which slices of which tensors must be kept or removed together."""

from graph.call import Call, Value
from graph.dependency import DependencyGraph, residual_groups, trace
from graph.errors import ExampleInputError, GraphError, RuleError, TraceError, UnknownGroupError
from graph.groups import CouplingGroup, Freeze, Role, Slot, UnitKind
from graph.operators import Operand, Operator, Size
from graph.rules import DEFAULT as DEFAULT_RULES
from graph.rules import PROGRAM as PROGRAM_RULES
from graph.rules import RuleTable, rule

__all__ = [
    "DEFAULT_RULES",
    "PROGRAM_RULES",
    "Call",
    "CouplingGroup",
    "DependencyGraph",
    "ExampleInputError",
    "Freeze",
    "GraphError",
    "Operand",
    "Operator",
    "Role",
    "RuleError",
    "RuleTable",
    "Size",
    "Slot",
    "TraceError",
    "UnitKind",
    "UnknownGroupError",
    "Value",
    "residual_groups",
    "rule",
    "trace",
]
