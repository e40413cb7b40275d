"""Run the rules over an exported graph, in execution order."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch

from graph.axes import Axes, Layout
from graph.call import CONSTANT, Call, Findings, Result, Rule, RuleTable, Shape, Value, aten
from graph.errors import RuleError, TraceError
from graph.groups import Freeze
from graph.operators import Operator
from graph.tracing.export import DEPENDS, Program, concrete, module_of


@dataclass(frozen=True)
class Propagation:
    """What is known when every rule has run."""

    axes: Axes
    tensors: Mapping[str, tuple[Layout, ...]]
    findings: Findings
    operators: tuple[Operator, ...]
    values: Mapping[torch.fx.Node, Any]
    """For each node a `Value`, or a tuple of them; or a number."""


def propagate(
    program: Program,
    table: RuleTable,
    opaque: Collection[str | type[torch.nn.Module]] = (),
    sizes: Mapping[sympy.Basic, int] | None = None,
) -> Propagation:
    """Relate the axes of all tensors of a program by the rules of a table.

    Open sizes are those of the example, or `sizes`, by symbol.  Inside of `opaque` modules, by name
    or by class, nothing is related, and what touches them is frozen.  Raises RuleError if a rule
    fails, or its layouts do not have the shapes of its outputs.
    """
    return _Propagating(program, table, opaque, sizes).run()


class _Propagating:
    def __init__(
        self,
        program: Program,
        table: RuleTable,
        opaque: Collection[str | type[torch.nn.Module]],
        sizes: Mapping[sympy.Basic, int] | None,
    ) -> None:
        self.program = program
        self.table = table
        self.sizes = sizes
        self.opaque = {
            name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}"
            for name in opaque
        }
        self.axes = Axes()
        self.findings = Findings()
        self.tensors = {
            name: tuple(self.axes.fresh(size) for size in info.shape)
            for name, info in program.tensors.items()
        }
        self.used = _used(program.nodes)
        self.results: dict[torch.fx.Node, Any] = {}
        self.operators: list[Operator] = []

    def run(self) -> Propagation:
        for order, node in enumerate(self.program.nodes):
            if node.op in ("placeholder", "get_attr"):
                self.results[node] = self._placeholder(node)
            elif node.op == "output":
                self._output(node)
            else:
                self.results[node] = self._call(node, order)
        return Propagation(
            self.axes, self.tensors, self.findings, tuple(self.operators), self.results
        )

    def _placeholder(self, node: torch.fx.Node) -> Value | None:
        name = self.program.holders.get(node.name)
        if name is not None:
            dims = self.tensors[name]
            return Value(dims, tuple(((name, dim),) for dim in range(len(dims))))
        shapes = _shapes(node.meta.get("val"), module_of(node), self.sizes)
        if not shapes:
            return None
        if node.op == "get_attr" or node.name in self.program.written:
            return self._constant(node, shapes)
        value = Value(tuple(self.axes.fresh(size) for size in shapes[0]))
        reason = "it is a dimension of an input of the model"
        self._freeze(value, Freeze(reason, node.op, module_of(node)))
        return value

    def _constant(self, node: torch.fx.Node, shapes: tuple[Shape, ...]) -> Value:
        """Ask the rule for tensors that are written in the code."""
        call = Call(CONSTANT, module_of(node), -1, {}, shapes, self.axes, self.findings)
        rule = self.table.find(CONSTANT)
        assert rule is not None
        (value,) = _applied(rule, call)
        return replace(value, constant=self.program.constants.get(node.name, ()))

    def _output(self, node: torch.fx.Node) -> None:
        freeze = Freeze("it is a dimension of an output of the model", "output", "")
        for source in node.all_input_nodes:
            for value in values_in(self.results.get(source)):
                self._freeze(value, freeze)

    def _freeze(self, value: Value, freeze: Freeze) -> None:
        for layout in value.dims:
            self.axes.freeze(layout, freeze)

    def _call(self, node: torch.fx.Node, order: int) -> Any:
        if node.target is operator.getitem:
            source, index = cast(tuple[torch.fx.Node, int], node.args)
            result = self.results[source]
            return result[index] if isinstance(result, tuple) else result
        if isinstance(node.meta.get("val"), int | torch.SymInt):
            return concrete(node.meta["val"], self.sizes)
        call = self._call_of(node, order)
        if not call.shapes:
            return None
        self._note(node, call)
        checked = self._result(node, call)
        single = isinstance(node.meta.get("val"), torch.Tensor)
        return checked[0] if single else checked

    def _result(self, node: torch.fx.Node, call: Call) -> tuple[Value, ...]:
        if not self.opaque.isdisjoint(_owners(node)):
            return _values(call.opaque("it enters a module that was declared opaque"))
        rule = self.table.find(call.operator)
        if rule is None:
            return _values(call.opaque(f"no propagation rule is known for {call.operator}"))
        unread = _unread(node, call, rule)
        if unread is not None:
            return _values(call.opaque(f"its propagation rule does not read {unread!r}"))
        _freeze_overwritten(call)
        return _applied(rule, call)

    def _call_of(self, node: torch.fx.Node, order: int) -> Call:
        return Call(
            operator=_target_name(node),
            module=module_of(node),
            order=order,
            arguments=arguments_of(node, self.results.get),
            shapes=_shapes(node.meta.get("val"), module_of(node), self.sizes),
            axes=self.axes,
            findings=self.findings,
            used=node in self.used,
        )

    def _note(self, node: torch.fx.Node, call: Call) -> None:
        sources = [source.name for source in node.all_input_nodes]
        holders = self.program.holders
        self.operators.append(
            Operator(
                name=node.name,
                target=call.operator,
                module=call.module,
                order=call.order,
                inputs=tuple(name for name in sources if name not in holders),
                tensors=tuple(holders[name] for name in sources if name in holders),
                function=cast("Callable[..., Any]", node.target),
            )
        )


def arguments_of(node: torch.fx.Node, value: Callable[[torch.fx.Node], Any]) -> dict[str, object]:
    """Return the arguments of a call by name, defaults filled in, a value in place of each node."""
    values: Any = torch.fx.map_arg(node.args, value)
    named: Any = torch.fx.map_arg(node.kwargs, value)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(position): given for position, given in enumerate(values)} | dict(named)
    arguments: dict[str, object] = {
        a.name: a.default_value for a in schema.arguments if a.has_default_value()
    }
    arguments |= dict(zip((a.name for a in schema.arguments), values, strict=False))
    arguments.update(named)
    return arguments


def _used(nodes: Sequence[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the nodes on which an output depends, or which change something in place."""
    used: set[torch.fx.Node] = set()
    for node in reversed(nodes):
        in_place = _target_name(node).split(".")[1:2]
        changes = in_place and in_place[0].endswith("_") and not in_place[0].endswith("__")
        if node.op == "output" or changes or any(user in used for user in node.users):
            used.add(node)
    return used


_STORAGE = (
    *("dtype", "out_dtype", "layout", "device", "pin_memory", "memory_format"),
    *("non_blocking", "copy", "generator"),
)
"""Arguments that say how and where numbers are stored or drawn, and relate no positions."""


def _unread(node: torch.fx.Node, call: Call, rule: Rule) -> str | None:
    """Return an argument that a rule has not read and that may matter, or None.

    It has another value than its schema's default, or is written to and is not ``self``.
    """
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    schema = {argument.name: argument for argument in arguments}
    for name, value in call.arguments.items():
        known = schema.get(name)
        if known is not None and known.is_write and name != "self":
            return name
        if name in rule.reads or name in _STORAGE:
            continue
        if known is None or not known.has_default_value() or known.default_value != value:
            return name
    return None


_KEEPING_ZEROS = frozenset(aten("zero_ mul_ div_ neg_ requires_grad_ detach_"))


def _freeze_overwritten(call: Call) -> None:
    """Freeze a weight that is changed in place, unless its zeros stay zeros."""
    packet = ".".join(call.operator.split(".")[:2])
    changed = next(iter(call.values()), None)
    if changed is None or not packet.endswith("_") or packet.endswith("__"):
        return
    if changed.is_weight and packet not in _KEEPING_ZEROS:
        call.freeze(changed.dims, "a weight is changed in place along it")


def _owners(node: torch.fx.Node) -> Iterator[str]:
    """Yield the names and the classes of the modules in which a node was traced."""
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        yield re.sub(r"@\d+", "", path)
        yield kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _applied(rule: Rule, call: Call) -> tuple[Value, ...]:
    """Return what a rule says of the outputs of a call, in the shapes of these."""
    function = rule.function
    try:
        values = _values(function(call))
        shapes = tuple(tuple(call.axes.size(dim) for dim in value.dims) for value in values)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RuleError(
            f"the rule {function.__module__}.{function.__name__} failed on {call.operator} in "
            f"module {call.module!r}: {type(error).__name__}: {error}"
        ) from error
    if shapes != call.shapes:
        raise RuleError(
            f"the rule of {call.operator} in module {call.module!r} returned layouts of shapes "
            f"{shapes} for outputs of shapes {call.shapes}"
        )
    return values


def _values(result: Result) -> tuple[Value, ...]:
    return (result,) if isinstance(result, Value) else tuple(result)


def values_in(result: object) -> list[Value]:
    """Return the tensors in what is known of a node."""
    if isinstance(result, Value):
        return [result]
    return [value for value in result if value] if isinstance(result, tuple) else []


def _target_name(node: torch.fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def _shapes(
    value: object, module: str, open_sizes: Mapping[sympy.Basic, int] | None
) -> tuple[Shape, ...]:
    """Return the shapes of a traced value: one for a tensor, several for a list of tensors."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(concrete(size, open_sizes) for size in value.shape)
        if None in sizes:
            raise TraceError(
                f"the shape {tuple(value.shape)} of a tensor {DEPENDS} another",
                module,
                "Selections by a mask, such as x[x > 0], have no size that could be known in "
                "advance; write them as products with the mask.",
            )
        return (cast(Shape, sizes),)
    if isinstance(value, list | tuple):
        return tuple(shape for item in value for shape in _shapes(item, module, open_sizes))
    return ()
