"""Propagation rules, grouped by theme; importing this package fills the default table."""

from graph.rules import (
    attention,
    contraction,
    convolution,
    elementwise,
    factory,
    indexing,
    normalization,
    reduction,
    shape,
)
from graph.rules.table import DEFAULT, RuleTable, rule

__all__ = [
    "DEFAULT",
    "RuleTable",
    "attention",
    "contraction",
    "convolution",
    "elementwise",
    "factory",
    "indexing",
    "normalization",
    "reduction",
    "rule",
    "shape",
]
