"""Propagation rules, grouped by theme; importing this package fills the default table.

A rule says what one operator does to layouts.  One for an operator that scales each channel (the
last dimension) by a parameter, for instance::

    @graph.rule("mylib.scale_channels", reads="x scale")
    def scale_channels(call: graph.Call) -> graph.Value:
        value, scale = call.value("x"), call.value("scale")
        channels = call.unify(value.dims[-1], scale.dims[0])
        call.record(scale, graph.Role.PASS_THROUGH)
        return graph.Value((*value.dims[:-1], channels))

`reads` names the arguments for every value of which the rule is right: a call in which another one
differs from its schema's default is frozen.

Dimensions whose positions influence one another are frozen with `Call.freeze`, dimensions about
which nothing is known are made with `Call.unknown`, and `Call.opaque` answers anything safely.
"""

from graph.call import DEFAULT, PROGRAM, RuleTable, rule
from graph.rules import contraction, convolution, elementwise, indexing, shape

__all__ = [
    "DEFAULT",
    "PROGRAM",
    "RuleTable",
    "contraction",
    "convolution",
    "elementwise",
    "indexing",
    "rule",
    "shape",
]
