"""The sizes of what operators read and write, as functions of the units that groups keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from graph.axes import Axes, Layout
from graph.call import Value
from graph.operators import ONE, Operand, Operator, Size
from graph.propagate import Propagation, arguments_of, values_in
from graph.tracing.export import Program


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
