"""The proof that a smaller model is the dense one without some units: its program says so.

The exported program of the dense model, from which a plan takes units, is right by construction:
every size in it follows its axis, or the plan is refused (`osscar.proof.program`).  The smaller
model is right if its own program is that one, operator by operator, tensor by tensor, and number by
number.  A difference is a place where code makes a number of a width that is pruned.

What is assumed: that the exported program is what the code does, for all sizes of the inputs that
its guards let pass.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from graph.errors import GraphError
from graph.extents import Staying, TracedProgram, with_axes
from graph.tracing.export import canonical_names, module_of
from graph.tracing.standalone import SYMBOLIC, Standalone, expression
from osscar.base.errors import AdapterError, EquivalenceError, first_line
from osscar.network.model_state import model_state
from osscar.network.modules import named_tensors
from osscar.offload.on_disk import OnDisk
from osscar.proof.equivalence import runs
from osscar.proof.literals import ShrunkGraph, arguments
from osscar.proof.plan import Integer, PruningPlan, Structure
from osscar.proof.program import (
    exported,
    open_shape,
    part_of,
    shrunk_graph,
    staying_of,
    traced_as_open,
)
from osscar.proof.sizes import only_sizes, other_sizes, sizes_in_words, untried_in_words


class StructureError(EquivalenceError):
    """A smaller model's program is another one than that of the dense model without its units.

    `by_module` says what each module does whose code makes a difference, by its name, without the
    numbers of this width.
    """

    def __init__(self, message: str, by_module: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.by_module = dict(by_module or {})


@dataclass(frozen=True, eq=False)
class DenseProgram:
    """The program of a dense model, its example, and the dimensions whose sizes were left open."""

    traced: TracedProgram
    example: Mapping[str, Any]
    left_open: Mapping[str, Collection[int]]


_Widths: TypeAlias = tuple[frozenset[tuple[str, int]], frozenset[Integer]]
"""How many units each group keeps, and the numbers of modules that follow: code sees no more."""


@dataclass(frozen=True, eq=False)
class DensePrograms:
    """The programs of a dense model; where there is none, `refusal` says why.

    `untried` are sizes that the model takes, and none of these programs, in words.
    `proved` are smaller models that were proved already, with the names of the tensors that their
    programs read.
    """

    programs: tuple[DenseProgram, ...]
    refusal: str = ""
    untried: tuple[str, ...] = ()
    proved: dict[_Widths, tuple[Structure, frozenset[str]]] = field(default_factory=dict)

    def prove(
        self,
        model: nn.Module,
        plan: PruningPlan,
        before: Mapping[str, Tensor] | None = None,
        *,
        anew: bool = False,
    ) -> Structure:
        """Prove that a model in evaluation mode is the dense one without the units of a plan.

        `before` are the tensors of the dense model by name, if those of the smaller one are parts
        of them, bit by bit; they are not compared otherwise.  It is proved `anew` where code may
        tell which units stay, and not only how many, as an adapter can.  Another model raises a
        StructureError, and one of which no program tells, `Unproved`.
        """
        if not self.programs:
            raise Unproved(f"the dense model cannot be exported: {self.refusal}")
        if any(group.kind.routed for group in plan.groups):
            raise Unproved("whole experts leave, and no program says to which others tokens go")
        widths = frozenset((g.name, len(g.kept)) for g in plan.groups), frozenset(plan.integers)
        if anew or widths not in self.proved:
            found = [_compared(one, model, plan) for one in self.programs]
            sizes = tuple(size for one in found for size in one.result().sizes)
            names = frozenset[str]().union(*(one.tensors for one in found))
            structure = replace(found[0].result(), sizes=sizes, untried=self.untried)
            self.proved[widths] = structure, names
        structure, names = self.proved[widths]
        if before is not None:
            _compare_values(model, names, before, staying_of(self.programs[0].traced, plan))
        return structure


def dense_programs(model: nn.Module, example: Mapping[str, Any]) -> DensePrograms:
    """Export a model in evaluation mode, which is left as it was.

    Sizes of inputs are left open as far as the model lets them be.  Where there are other sizes for
    which that program does not hold, it is exported for the first of these, too.
    """
    try:
        left_open, traced = traced_as_open(partial(_traced, model, example), example)
    except GraphError as error:
        return DensePrograms((), first_line(error))
    first = DenseProgram(traced, example, left_open)
    others = [
        one
        for one in other_sizes(traced.standalone, example)
        if not traced.standalone.takes(one.inputs)
    ]
    found = [first]
    if others:
        with suppress(GraphError):  # the model may not take such inputs
            second = _traced(model, others[0].inputs, left_open)
            found.append(DenseProgram(second, others[0].inputs, left_open))
    with model_state(model):
        untried = [
            one
            for one in others
            if not any(program.traced.standalone.takes(one.inputs) for program in found)
            if runs(model, one.inputs)
        ]
    return DensePrograms(tuple(found), untried=untried_in_words(untried))


class Unproved(Exception):
    """A reason why programs cannot be compared."""


def _traced(
    model: nn.Module, example: Mapping[str, Any], left_open: Mapping[str, Collection[int]]
) -> TracedProgram:
    return with_axes(exported(model, example, left_open))


# ---- node by node ------------------------------------------------------------------------


def _compared(dense: DenseProgram, model: nn.Module, plan: PruningPlan) -> _Comparison:
    """Compare the program of a model with that of the dense one without units."""
    try:
        due = shrunk_graph(dense.traced, plan)
    except AdapterError as error:
        raise Unproved(f"the dense program cannot lose these units: {error}") from error
    try:
        made = exported(model, dense.example, dense.left_open)
    except GraphError as error:
        raise StructureError(
            f"the smaller model cannot be exported, as the dense one can: {first_line(error)}"
        ) from error
    names = canonical_names(model)
    found = _Comparison(due, made, names)
    try:
        found.run()
    except StructureError:  # once more, to say in which lines of code
        made = exported(model, dense.example, dense.left_open, lines=True)
        _Comparison(shrunk_graph(dense.traced, plan), made, names).run()
        raise
    return found


def _compare_values(
    model: nn.Module, names: Iterable[str], before: Mapping[str, Tensor], staying: Staying
) -> None:
    """Compare tensors in memory with what stays of the dense ones, bit by bit."""
    after, canonical = dict(named_tensors(model)), canonical_names(model)
    for name in sorted(names):
        whole = before[name].detach()
        if isinstance(whole, OnDisk) or whole.is_meta:
            continue
        part = part_of(whole, staying.of_tensor(name))
        if not _same_tensors(part, after[canonical.get(name, name)]):
            raise StructureError(
                f"{name!r} of the smaller model has other values than the dense one's"
            )


class _Comparison:
    """Finds the first operator that differs, and all numbers and tensors before it."""

    def __init__(self, due: ShrunkGraph, made: Standalone, names: Mapping[str, str]) -> None:
        self.due, self.made, self.names = due, made, names
        self.pairs: dict[Node, Node] = {}
        """For each value of the smaller model's program, that of the dense one's."""
        self.symbols: dict[sympy.Basic, sympy.Basic] = {}
        """What the open sizes of the smaller model's program are in that of the dense one."""
        self.fixed: dict[sympy.Basic, sympy.Basic] = {}
        """Open sizes of the dense program that can be but one number where both programs hold."""
        self.operators = self.numbers = 0
        self.minded = set[Node]()
        """Values of which a copy is another one."""
        self.same: dict[Node, Node] = {}
        """What cannot be told from a value, with that value."""
        self.tensors: set[str] = set()
        self.differences: list[tuple[Node, str]] = []

    def run(self) -> None:
        """Compare inputs, operators in the order in which they run, and outputs."""
        dense = self.due.traced.standalone
        only = only_sizes(dense, self.made)
        for name, theirs, ours in zip(
            dense.input_names, dense.inputs, self.made.inputs, strict=True
        ):
            if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
                for dim, (size, other) in enumerate(zip(theirs.shape, ours.shape, strict=True)):
                    number = only.get(f"{name}.shape[{dim}]")
                    self._bind(expression(size), expression(other), number)
        if dense.structure != self.made.structure:
            raise StructureError(
                "the smaller model's output has another structure than the dense one's"
            )
        self._graphs(self.due.graph, self.made.module.graph)
        by_module: dict[str, str] = {}
        for node, _ in self.differences:
            place = _line_of(node).strip()
            by_module.setdefault(
                module_of(node), f"does something else with fewer units, in {place}"
            )
        if by_module:
            name, said = next(iter(by_module.items()))
            module = f"module {name!r}" if name else "the model"
            raise StructureError(f"{module} {said}: {self.differences[0][1]}", by_module)

    def _bind(self, size: sympy.Basic, other: sympy.Basic, only: int | None) -> None:
        """Note that a size of an input of both programs is the same, and what alone it can be."""
        if other.is_Symbol and other not in self.symbols:
            self.symbols[other] = size
        elif size.is_Symbol and size != (known := other.xreplace(self.symbols)):
            self.fixed[size] = known
        if size.is_Symbol and only is not None:
            self.fixed[size] = sympy.Integer(only)

    def _graphs(self, due: Graph, made: Graph) -> None:
        """Compare two graphs, which lose what nobody reads."""
        for one in (due, made):
            one.eliminate_dead_code(_has_effect)
        for some in (_minding_copies(due), _minding_copies(made)):
            self.minded |= {*due.nodes, *made.nodes} if some is None else some
        inputs = (one.find_nodes(op="placeholder") for one in (made, due))
        self.pairs.update(zip(*inputs, strict=True))
        steps, others = (self._steps(one) for one in (due, made))
        for step, other in zip(steps, others, strict=False):
            if step.target != other.target:
                said = f"it calls {other.target}, and {step.target} is due"
                self.differences.append((other, said))
                return
            self.operators += 1
            self.pairs[other] = step
            self._same(self._arguments(step), self._arguments(other), other)
        if len(steps) != len(others):
            last = others[-1] if others else made.output_node()
            said = f"it calls {len(others)} operators, and {len(steps)} are due"
            self.differences.append((last, said))
            return
        last = made.output_node()
        self._same(due.output_node().args, last.args, last)

    def _same(self, due: Any, made: Any, node: Node) -> None:
        """Compare an argument of a call, and note where it differs."""
        if isinstance(due, list | tuple) and isinstance(made, list | tuple):
            if len(due) != len(made):
                self._differ(node, due, made)
            for one, other in zip(due, made, strict=False):
                self._same(one, other, node)
        elif isinstance(due, Mapping) and isinstance(made, Mapping) and due.keys() == made.keys():
            for key in due:
                self._same(due[key], made[key], node)
        elif isinstance(due, slice) and isinstance(made, slice):
            parts = attrgetter("start", "stop", "step")
            self._same(parts(due), parts(made), node)
        elif _is_number(due) and _is_number(made):
            self.numbers += 1
            if not self._equal(due, made):
                self._differ(node, due, made)
        elif isinstance(due, Node) and isinstance(made, Node):
            self._same_values(due, made, node)
        elif type(due) is not type(made) or due != made:
            self._differ(node, due, made)

    def _steps(self, graph: Graph) -> list[Node]:
        """Return the calls that make the values of a graph, each value once."""
        for node in graph.nodes:
            known = self._known(node)
            if known is not None:
                self.same[node] = known
        near, live = [node for node in graph.nodes if _has_effect(node)], set[Node]()
        while near:
            node = near.pop()
            if node not in live:
                live.add(node)
                near += map(self._seen, node.all_input_nodes)
        return [node for node in _steps(graph) if node in live]

    def _known(self, node: Node) -> Node | None:
        """Return the value before a node that it cannot be told from, if there is one.

        That is what it copies, or what operators lead back to that keep all elements in order.
        """
        if str(node.target) in _COPIES and node not in self.minded:
            return self._seen(node.all_input_nodes[0])
        before, shape = node, None
        while str(before.target) in _IN_ORDER and before not in self.minded:
            shape = shape or self._shape(node)
            before = self._seen(before.all_input_nodes[0])
            earlier = self._shape(before)
            if not shape or not earlier or math.prod(shape) != math.prod(earlier):
                return None
            if shape == earlier:
                return before
        return None

    def _shape(self, node: Node) -> list[sympy.Basic] | None:
        """Return the shape of a tensor for all sizes of the inputs; None where it is not known."""
        if not isinstance(node.meta.get("val"), Tensor):
            return None
        if node.graph is self.made.module.graph:
            return [self._made(size) for size in node.meta["val"].shape]
        if node not in self.due.origins:
            return None
        return [self._due(size) for size in open_shape(self.due, node)]

    def _due(self, size: Any) -> Any:
        """Return a number of the dense program, in open sizes of its inputs."""
        return expression(size).xreplace(self.fixed)

    def _made(self, size: Any) -> Any:
        """Return a number of the smaller model's program, in open sizes of the dense one's."""
        return expression(size).xreplace(self.symbols).xreplace(self.fixed)

    def _seen(self, node: Node) -> Node:
        """Return the first value that a node cannot be told from."""
        return self.same.get(node, node)

    def _arguments(self, node: Node) -> dict[str, Any]:
        """Return what a call is given, by name.

        Attention does not group query heads that are as many as those of keys and values.
        """
        given = arguments(node)
        if given.get("enable_gqa"):
            shapes = (self._shape(given[name]) for name in ("query", "key", "value"))
            heads = [shape[-3] if shape else None for shape in shapes]
            given["enable_gqa"] = None in heads or len({*heads}) > 1
        return given

    def _same_values(self, due: Node, made: Node, node: Node) -> None:
        """Compare two values that are no numbers: results of operators, or what is read."""
        due, made = self._seen(due), self._seen(made)
        if "get_attr" not in (due.op, made.op):
            if self.pairs.get(made) is not due:
                self._differ(node, due, made)
            return
        # Tensors that shared their memory are one tensor now, by the first of their names.
        name, dense = self.made.program.holders.get(made.name), self.due.tensor_name(due)
        if due.op != made.op or name != (dense and self.names.get(dense, dense)):
            self._differ(node, dense or due, name or made)
            return
        if name is not None:
            self.tensors.add(dense or name)
            sizes = tuple(due.meta["val"].shape), tuple(made.meta["val"].shape)
            if sizes[0] != sizes[1]:
                self._differ(node, f"{name} of {sizes[0]}", f"of {sizes[1]}")
            return
        held = self.due.written(due)
        other = attrgetter(str(made.target))(made.graph.owning_module)
        if isinstance(held, GraphModule) and isinstance(other, GraphModule):
            self._graphs(held.graph, other.graph)
            return
        self.numbers += 1
        if not _same_tensors(held, other):
            self._differ(node, "other numbers", "these, which the code writes down,")

    def _equal(self, due: Any, made: Any) -> bool:
        """Whether two numbers are the same for all sizes of the inputs."""
        if isinstance(due, Node) and isinstance(made, Node) and self._computed_alike(due, made):
            return True
        one, other = (x.meta["val"] if isinstance(x, Node) else x for x in (due, made))
        if isinstance(one, _PLAIN) and isinstance(other, _PLAIN):
            return repr(one) == repr(other)  # -0.0 is not 0.0, and 1 is not 1.0
        first, second = self._due(one), self._made(other)
        if free_unbacked_symbols(second):  # a number read from a tensor, whose name tells nothing
            return False
        conditions = isinstance(first, Boolean) or isinstance(second, Boolean)
        return bool(first == second or (not conditions and sympy.simplify(first - second) == 0))

    def _computed_alike(self, due: Node, made: Node) -> bool:
        """Whether two numbers are computed by the same steps, of the same values."""
        if made in self.pairs:
            return self.pairs[made] is due
        if due.target != made.target or due.op != made.op or due.kwargs or made.kwargs:
            return False
        for one, other in zip(due.args, made.args, strict=True):
            if _is_number(one) and _is_number(other):
                if not self._equal(one, other):
                    return False
            elif not (
                isinstance(one, Node)
                and isinstance(other, Node)
                and self.pairs.get(self._seen(other)) is self._seen(one)
            ):
                return False
        return True

    def _differ(self, node: Node, due: Any, made: Any) -> None:
        said = f"it computes with {_shown(made)}, and {_shown(due)} is due"
        self.differences.append((node, said))

    def result(self) -> Structure:
        """Return what was found equal."""
        sizes = sizes_in_words(self.due.traced.standalone, self.made)
        return Structure(self.operators, self.numbers, len(self.tensors), (sizes,))


def by_construction(shrunk: ShrunkGraph) -> Structure:
    """Return what a program consists of that is the dense one without some units."""
    calls = [(n.args, n.kwargs) for n in shrunk.graph.nodes if n.op.startswith("call_")]
    numbers = sum(map(_is_number, pytree.tree_leaves(calls)))
    names = {shrunk.tensor_name(node) for node in shrunk.graph.find_nodes(op="get_attr")} - {None}
    program = shrunk.traced.standalone
    sizes = sizes_in_words(program, program, samples=1 if program.exact else 2)
    return Structure(len(_steps(shrunk.graph)), numbers, len(names), (sizes,))


_PLAIN = (int, float, complex)
_COPIES = frozenset({"aten.clone.default", "aten.contiguous.default", "aten.alias.default"})
_IN_ORDER = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints"),
        *("unflatten.int", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "squeeze.default"),
        *("expand.default", "slice.Tensor", "repeat.default", "repeat_interleave.self_int"),
    )
)
"""Operators whose results have the same elements in the same order, where they have as many."""


def _has_effect(node: Node) -> bool:
    """Whether a node does something even if nobody reads its result."""
    writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return writes or node.op in ("placeholder", "output")


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or a node that computes one."""
    known = value.meta.get("val") if isinstance(value, Node) else value
    return isinstance(known, (*_PLAIN, *SYMBOLIC))


def _steps(graph: Graph) -> list[Node]:
    """Return the calls of operators that do something, but those that compute numbers of sizes."""

    def is_of_sizes(node: Node) -> bool:  # and looks at no value of a tensor
        reads = not all(map(_is_number, node.all_input_nodes)) and "sym_" not in str(node.target)
        return _is_number(node) and not reads

    calls = (node for node in graph.nodes if node.op.startswith("call_"))
    return [n for n in calls if (n.users or _has_effect(n)) and not is_of_sizes(n)]


_READ = ("as_strided", "_reshape_alias", "view.dtype")
"""Operators that read the order in memory."""


_COMPOSED = "CompositeImplicitAutograd"
"""What torch calls operators that are made of others."""

_COMPUTED = {"linear", "matmul", "conv1d", "conv2d", "conv3d", "layer_norm"}
"""Such operators whose results are new tensors whatever they are given."""


def _minding_copies(graph: Graph) -> set[Node] | None:
    """Return the values of which a copy is another one; elsewhere it depends on sizes alone.

    These share memory with what an operator writes to.  All values do (None) where one reads the
    order in memory, and where nothing tells, as that does not, what a write changes.
    """
    targets = [str(node.target) for node in graph.nodes]
    if any(name in target for target in targets for name in _READ):
        return None
    near = [one for node in graph.nodes for one in _written_by(node)]
    found = set[Node]()
    while near:
        node = near.pop()
        if node in found:
            continue
        if node.op in ("placeholder", "get_attr") or _may_share(node):
            return None
        found.add(node)
        near += [user for user in node.users if node in _shared_with(user)]
        near += _shared_with(node)
    return found


def _written_by(node: Node) -> list[Node]:
    """Return what an operator writes to."""
    if not node.op.startswith("call_") or not _has_effect(node):
        return []
    return _given(node, lambda one: one.alias_info is not None and one.alias_info.is_write)


def _shared_with(node: Node) -> list[Node]:
    """Return with what of that which an operator is given its result may share memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    if str(node.target) in _COPIES | _IN_ORDER or _may_share(node) or _is_idle(node):
        return node.all_input_nodes
    return _given(node, lambda one: one.alias_info is not None)


def _given(node: Node, which: Callable[[Any], bool]) -> list[Node]:
    """Return what an operator is given for some of the arguments of its schema."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((one.name for one in arguments), node.args, strict=False)), **node.kwargs}
    some = [given.get(one.name) for one in arguments if which(one)]
    return [one for one in pytree.tree_leaves(some) if isinstance(one, Node)]


def _may_share(node: Node) -> bool:
    """Whether a result shares memory with what its operator is given, or not, as no schema tells.

    Operators that are made of others declare no memory that they share: `reshape` copies where the
    order in memory asks for it.  Those with kernels of their own declare it, but for `unsafe_split`
    and `lift`.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or _is_idle(node):
        return False
    name: str = node.target.name()  # type: ignore[no-untyped-call]
    if name.partition(".")[0].removeprefix("aten::") in _COMPUTED:
        return False
    composed: bool = torch._C._dispatch_has_kernel_for_dispatch_key(name, _COMPOSED)
    return composed or name.startswith(("aten::unsafe_", "aten::lift"))


def _is_idle(node: Node) -> bool:
    """Whether a node is dropout in evaluation, which returns what it is given."""
    return node.target is torch.ops.aten.dropout.default and not arguments(node)["train"]


def _same_tensors(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same bits: NaN is NaN, and -0.0 is not 0.0.

    Of what `torch.cond` and the like capture, numbers may be unknown: these are not the same.
    """
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if isinstance(one, FakeTensor) or isinstance(other, FakeTensor):
        return False
    bits = (
        tensor.detach().to_dense().resolve_conj().resolve_neg().contiguous().flatten()
        for tensor in (one, other)
    )
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(
        *(tensor.view(torch.uint8) for tensor in bits)
    )


def _shown(value: Any) -> str:
    if isinstance(value, Node) and _is_number(value):
        value = value.meta["val"]
    return f"the result of {value.target}" if isinstance(value, Node) else f"{value}"


def _line_of(node: Node) -> str:
    """Return the line of code that called an operator."""
    frames = re.findall(r'File "(.*)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    if not frames:
        return f"a call of {node.target} "
    file, number, code = frames[-1]
    return f"`{code.strip()}` ({os.path.basename(file)}, line {number}) "
