"""The sizes that are written in a traced program, and what they become when units leave.

A trace writes down every size that the code has computed, as in ``view(x, [b, 49, 6, 32])``.  A
table says, for each operator, which dimension such a number makes, cuts or repeats; it becomes the
count of those of its positions that stay.  A number that cannot be told refuses the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, floordiv, mul
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node

from graph.call import aten
from graph.extents import Extent, Extents, Staying, TracedProgram
from graph.tracing.export import module_of
from graph.tracing.standalone import SYMBOLIC
from osscar.base.errors import AdapterError

Number: TypeAlias = int | Node
"""A size in a program: written down, or computed from the sizes of the inputs."""


@dataclass(frozen=True, eq=False)
class ShrunkGraph:
    """The graph of a traced program, of which some units leave.

    origins: For each node of the graph the traced one that it is a copy of.
    staying: What stays of each traced value.

    The value of a node, of which the sizes are known, is ``meta["val"]``.
    """

    graph: Graph
    origins: dict[Node, Node]
    traced: TracedProgram
    staying: Staying

    def of(self, node: Node) -> tuple[Extents, ...]:
        """Return the dimensions of each tensor that a node returns, as they were."""
        return self.staying.of(self.origins[node])

    def tensor_name(self, node: Node) -> str | None:
        """Return the name of the parameter or buffer that a node reads, if it is one."""
        origin = self.origins.get(node)
        return None if origin is None else self.traced.standalone.program.holders.get(origin.name)

    def written(self, node: Node) -> Any:
        """Return what a node reads that is written in the code: a tensor or a graph."""
        owner = node.graph.owning_module or self.traced.standalone.module
        return attrgetter(str(node.target))(owner)

    def cut(self, node: Node) -> None:
        """Let what reads numbers that the code makes have those of the positions that stay."""
        origin, readers, cut = self.origins[node], set(node.users), node
        for dim, extent in enumerate(self.of(node)[0]):
            if extent.stays is None:
                continue
            if extent.varies or any(isinstance(argument, Node) for argument in node.args):
                raise refusal(node, "it makes numbers for positions that vary with the inputs")
            kept = extent.stays.nonzero().flatten().tolist()
            device = {"device": origin.meta["val"].device}
            with self.graph.inserting_after(cut):
                index = self.graph.call_function(torch.tensor, (kept,), device)
            with self.graph.inserting_after(index):
                select = torch.ops.aten.index_select.default
                cut = self.graph.call_function(select, (cut, dim, index))
        if cut is not node:
            node.replace_all_uses_with(cut, delete_user_cb=readers.__contains__)
            self.origins[cut] = self.origins.pop(node)


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by name, with those that have their defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    due = node.target._schema.arguments
    given = dict(zip((argument.name for argument in due), node.args, strict=False))
    return {argument.name: argument.default_value for argument in due} | given | node.kwargs


@dataclass(frozen=True)
class _Call:
    """One call of an operator whose numbers follow, by rewriting its arguments in place."""

    node: Node
    program: ShrunkGraph

    @property
    def outputs(self) -> tuple[Extents, ...]:
        """The dimensions of each tensor that it returns."""
        return self.program.of(self.node)

    def argument(self, name: str) -> Any:
        """Return an argument by the name that the operator's schema has for it, or its default."""
        return arguments(self.node)[name]

    def replace(self, name: str, value: Any) -> None:
        """Put a value in the place of an argument."""
        position = [*arguments(self.node)].index(name)
        if name not in self.node.kwargs and position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def input(self, name: str) -> Extents:
        """Return the dimensions of a tensor argument."""
        return self.program.of(self.argument(name))[0]

    def refuse(self, why: str) -> AdapterError:
        """Return an error that says why this call cannot follow."""
        return refusal(self.node, why)

    def resized(self, number: Number, extent: Extent) -> Number:
        """Return what becomes of a number that is the size of a dimension."""
        if number == -1:
            return number
        found = number.meta["val"] if isinstance(number, Node) else number
        found = found.node.hint if isinstance(found, SYMBOLIC) else found
        if found == extent.kept:
            return number
        if found != extent.size:
            raise self.refuse(f"it has {found} where {extent.size} positions are")
        if not isinstance(number, Node):
            return extent.kept
        if extent.ratio is None:
            raise self.refuse("it computes a size of which a part that varies would leave")
        with self.node.graph.inserting_before(self.node):
            scaled = self.node.graph.call_function(mul, (number, extent.ratio.numerator))
            return self.node.graph.call_function(floordiv, (scaled, extent.ratio.denominator))

    def fixed(self, number: object, extent: Extent) -> int:
        """Return a number that counts positions, and that no size of the inputs changes."""
        if not isinstance(number, int) or extent.varies:
            raise self.refuse("it counts positions along a dimension that varies with the inputs")
        return number


def refusal(node: Node, why: str) -> AdapterError:
    """Return an error that says why a call of a program cannot follow."""
    return AdapterError(
        f"the exported program cannot be pruned in module {module_of(node) or 'the model'!r}: "
        f"{why}, in {node.target}"
    )


# ---- rules -------------------------------------------------------------------------------

Rule: TypeAlias = Callable[[_Call], None]


def _resize(call: _Call, name: str, extents: Sequence[Extent]) -> None:
    """Let an argument that lists the sizes of some dimensions follow."""
    numbers: Sequence[Number] = call.argument(name)
    call.replace(name, [call.resized(n, e) for n, e in zip(numbers, extents, strict=True)])


def _sized(name: str) -> Rule:
    """Make a rule for an argument that lists the sizes of the output."""
    return lambda call: _resize(call, name, call.outputs[0])


def _unflattened(call: _Call) -> None:
    first = call.argument("dim") % len(call.input("self"))
    _resize(call, "sizes", call.outputs[0][first:][: len(call.argument("sizes"))])


def _repeated(name: str) -> Rule:
    """Make a rule for an argument that says how often each dimension is repeated."""

    def follow(call: _Call) -> None:
        numbers: list[Number] = list(call.argument(name))
        made, before = call.outputs[0], call.input("self")
        for back in range(1, len(numbers) + 1):
            old = before[-back] if back <= len(before) else Extent(1)
            numbers[-back] = _times(call, numbers[-back], old, made[-back])
        call.replace(name, numbers)

    return follow


def _repeated_inside(call: _Call) -> None:
    dim = call.argument("dim")
    if dim is not None:
        before, made = call.input("self")[dim], call.outputs[0][dim]
        call.replace("repeats", _times(call, call.argument("repeats"), before, made))


def _times(call: _Call, count: Number, before: Extent, made: Extent) -> Number:
    """Return how often a dimension is repeated: as the share of it changes that stays."""
    if made.whole and before.whole:
        return count
    if made.ratio is None or before.ratio is None:
        raise call.refuse("it repeats a dimension of which a part leaves")
    if made.ratio == before.ratio:
        return count
    times = made.ratio / before.ratio * call.fixed(count, Extent(1))
    if times.denominator != 1:
        raise call.refuse("it repeats a part of a dimension")
    return int(times)


def _split_evenly(call: _Call) -> None:
    dim = call.argument("dim")
    parts = [dims[dim] for dims in call.outputs]
    if all(part.whole for part in parts):
        return
    if len({part.kept for part in parts}) > 1:
        raise call.refuse("it cuts into equal parts what does not stay in equal parts")
    if "split_size" in arguments(call.node):  # else it says how many parts
        call.replace("split_size", call.resized(call.argument("split_size"), parts[0]))


def _split_by_sizes(call: _Call) -> None:
    _resize(call, "split_sizes", [dims[call.argument("dim")] for dims in call.outputs])


def _split_at(call: _Call) -> None:
    extent = call.input("self")[call.argument("dim")]
    if not extent.whole:
        cuts = [call.fixed(cut, extent) for cut in call.argument("indices")]
        call.replace("indices", [_moved(cut, extent) for cut in cuts])


def _moved(position: int, extent: Extent) -> int:
    """Return where a place between positions, counted from either end, comes to lie."""
    if position >= extent.size:
        return position
    return extent.before(max(position + extent.size if position < 0 else position, 0))


def _sliced(call: _Call) -> None:
    extent = call.input("self")[call.argument("dim")]
    if extent.whole:
        return
    start, end, step = call.argument("start"), call.argument("end"), call.argument("step")
    if step != 1:
        # One of `step` positions that lie side by side, which stay or leave together.
        first = start is None or (isinstance(start, int) and 0 <= start < step)
        last = end is None or (isinstance(end, int) and end >= extent.size)
        if not (first and last):
            raise call.refuse("it takes every n-th position of a part")
        return
    if start is not None:
        call.replace("start", _moved(call.fixed(start, extent), extent))
    if end is not None:
        call.replace("end", _moved(call.fixed(end, extent), extent))


def _narrowed(call: _Call) -> None:
    extent = call.input("self")[call.argument("dim")]
    if not extent.whole:
        start = call.fixed(call.argument("start"), extent) % extent.size
        end = start + call.fixed(call.argument("length"), extent)
        call.replace("start", extent.before(start))
        call.replace("length", extent.before(end) - extent.before(start))


def _padded(call: _Call) -> None:
    numbers = list(call.argument("pad"))
    before, made = call.input("self"), call.outputs[0]
    for pair in range(len(numbers) // 2):
        old, new = before[-1 - pair], made[-1 - pair]
        if old.whole and new.whole:
            continue
        left, right = (call.fixed(number, new) for number in numbers[2 * pair : 2 * pair + 2])
        numbers[2 * pair] = new.before(left) if left >= 0 else -old.before(-left)
        numbers[2 * pair + 1] = (
            new.kept - new.before(new.size - right)
            if right >= 0
            else old.before(old.size + right) - old.kept
        )
    call.replace("pad", numbers)


def _convolved(call: _Call) -> None:
    """Count the groups of channels that stay: all channels, over those of a group."""
    weight, channels = call.input("weight"), call.input("input")
    space = len(weight) - 2
    transposed = arguments(call.node).get("transposed", "transpose" in str(call.node.target))
    many = (call.outputs[0] if transposed else channels)[-space - 1]
    if not (many.whole and weight[1].whole):
        if many.kept % weight[1].kept:
            raise call.refuse("it keeps a part of a group of channels")
        call.replace("groups", many.kept // weight[1].kept)


def _normalized_by_group(call: _Call) -> None:
    channels, groups = call.input("input")[1], call.argument("num_groups")
    if not channels.whole:
        members = channels.size // groups
        if channels.kept % members:
            raise call.refuse("it keeps a part of a group of channels")
        call.replace("num_groups", channels.kept // members)


def _looked_up(call: _Call) -> None:
    for extent, index in zip(call.input("self"), call.argument("indices"), strict=False):
        if index is not None and not extent.whole:
            raise call.refuse("it lists positions by number")


def _in_memory(call: _Call) -> None:
    if not all(extent.whole for dims in call.outputs for extent in dims):
        raise call.refuse("it says where in memory positions lie")


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        aten(
            "view _unsafe_view expand broadcast_to full zeros ones empty rand randn new_zeros "
            "new_ones new_empty new_full"
        ),
        _sized("size"),
    ),
    "aten.reshape": _sized("shape"),
    "aten.repeat": _repeated("repeats"),
    "aten.tile": _repeated("dims"),
    "aten.repeat_interleave.self_int": _repeated_inside,
    "aten.unflatten": _unflattened,
    **dict.fromkeys(
        aten("split unsafe_split chunk unsafe_chunk tensor_split.sections"), _split_evenly
    ),
    **dict.fromkeys(aten("split.sizes split_with_sizes unsafe_split_with_sizes"), _split_by_sizes),
    "aten.tensor_split.indices": _split_at,
    "aten.slice": _sliced,
    "aten.narrow": _narrowed,
    **dict.fromkeys(aten("pad constant_pad_nd"), _padded),
    **dict.fromkeys(
        aten("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"),
        _convolved,
    ),
    "aten.group_norm": _normalized_by_group,
    "aten.index": _looked_up,
    **dict.fromkeys(aten("arange eye linspace logspace"), lambda call: call.program.cut(call.node)),
    **dict.fromkeys(
        aten(
            "as_strided empty_strided new_empty_strided _reshape_alias native_group_norm view.dtype"
        ),
        _in_memory,
    ),
}
"""By the name of an ATen operator, with its overload where that matters."""


def rewrite(node: Node, program: ShrunkGraph) -> None:
    """Let the numbers in one call follow; of those that it reads the values have to be known."""
    if program.staying.is_written(program.origins[node]):
        program.cut(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    name = str(node.target)
    rule = _RULES.get(name, _RULES.get(name.rpartition(".")[0]))
    if rule is not None:
        rule(_Call(node, program))
