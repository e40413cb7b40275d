"""The table of propagation rules: one small function for each operator."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import TypeVar

from graph.call import Rule

_Function = TypeVar("_Function", bound=Rule)


class RuleTable(ChainMap[str, Rule]):
    """Rules by operator name, such as ``aten.add``.

    A name without overload covers every overload and the in-place variant (``aten.add_``); a
    name with overload (``aten.add.Tensor``) is more specific and wins.
    """

    def rule(self, *operators: str) -> Callable[[_Function], _Function]:
        """Register the decorated function as the rule of some operators."""

        def register(function: _Function) -> _Function:
            self.update(dict.fromkeys(operators, function))
            return function

        return register

    def find(self, operator: str) -> Rule | None:
        """Return the rule of an operator given by full name, most specific first, or None."""
        packet = ".".join(operator.split(".")[:2])
        for name in (operator, packet, packet.removesuffix("_")):
            if name in self:
                return self[name]
        return None

    def extended(self) -> RuleTable:
        """Return an empty table on top of this one, which stays as it is."""
        return self.new_child()


def aten(words: str) -> tuple[str, ...]:
    """Return the full names of ATen operators listed in a text."""
    return tuple(f"aten.{word}" for word in words.split())


DEFAULT = RuleTable()
"""The rules that `graph.trace` uses unless it is given a table of its own."""

PROGRAM = DEFAULT.extended()
"""The rules where numbers that the code makes can be cut like weights, since the traced program is
what loses units and not the code."""

CONSTANT = "constant"
"""The name of the rule for tensors that are written in the code."""

rule = DEFAULT.rule
