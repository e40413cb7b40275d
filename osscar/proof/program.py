"""The exported program of a model, shrunk where the code of its modules cannot follow.

What is traced has no code left: parameters, and operators with numbers in them.  The axes of all of
its values say which of those numbers are sizes, and what becomes of them (see
`osscar.proof.literals`).  Every value then has to have the shape that the axes tell,
and the outputs have to be those of the masked model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel

import graph
from graph.extents import Extent, Extents, Staying, TracedProgram, with_axes
from graph.tracing.export import varies
from graph.tracing.patches import shapes_alone
from graph.tracing.preserve import preserved, without_cache
from graph.tracing.standalone import GUARDS, SYMBOLIC, Sizes, Standalone, export_standalone
from osscar.base.errors import AdapterError, ModelError, first_line
from osscar.base.memory import attempt
from osscar.network.attention import expose_attention
from osscar.network.hooks import followed_mixtures
from osscar.network.modules import device_of
from osscar.offload.on_disk import shapes_only
from osscar.proof.equivalence import in_format_of
from osscar.proof.lineage import hand_on, lineage_of
from osscar.proof.literals import ShrunkGraph, refusal, rewrite
from osscar.proof.plan import PruningPlan, TracedInput

_OTHERWISE = (
    "give inputs of such sizes, or prune the modules instead (form eager, `--set form=eager`)"
)


class InputSizes(nn.Module):
    """Refuses inputs of sizes that a program does not take, before it computes anything."""

    _is_impure = True
    """Lets torch keep it in a graph in which nobody reads what it returns."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, *inputs: Tensor) -> None:
        """Check the inputs of the program."""
        given = dict(zip(self.sizes.shapes, inputs, strict=True))
        wrong = self.sizes.misfit(given)
        if wrong is not None:
            raise ModelError(
                f"the exported program takes {wrong} of shape "
                f"{_written(self.sizes.shapes[wrong])}, with which it was traced, and not "
                f"{_written(given[wrong].shape)}; {_OTHERWISE}"
            )
        condition = self.sizes.broken(given)
        if condition is not None:
            sizes = ", ".join(f"{name} of {_written(one.shape)}" for name, one in given.items())
            raise ModelError(
                f"the exported program is right only where {condition}, and there is {sizes}; "
                f"{_OTHERWISE}"
            )


def _written(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


class ProgramModule(GraphModule):
    """A model in the form of a program: parameters and operators, without the code they come from.

    It takes the tensors that the model was traced with, by position or by name; parameters and
    buffers have the names that they had there.  Modes of modules were settled when it was traced:
    it computes what the model does in evaluation mode, also while it is trained.

    Attributes
    ----------
    built_by
        The class of transformers and the config that build the dense model; None for others.
    """

    built_by: tuple[type[PreTrainedModel], PreTrainedConfig] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        copy: ProgramModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        hand_on(self, copy)  # which torch leaves behind
        copy.built_by = self.built_by
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProgramModule:
        """Change parameters and buffers; what the program makes by itself moves to their device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next(self.parameters()).device

        def moved(argument: Any) -> Any:
            return device if isinstance(argument, torch.device) else argument

        for part in (one for one in self.modules() if isinstance(one, GraphModule)):
            for node in part.graph.nodes:
                node.args, node.kwargs = map_aggregate((node.args, node.kwargs), moved)
            part.recompile()
        return self

    def _get_name(self) -> str:
        return ProgramModule.__name__  # each program of torch has a class of its own, GraphModule


def example_of(program: ProgramModule) -> dict[str, Tensor]:
    """Return zeros like the inputs that a program was traced with, by name."""
    device = device_of(program)
    made = {given.name: given.example().to(device) for given in _traced(program)}
    return in_format_of(made, program)


def open_sizes(program: ProgramModule) -> dict[str, tuple[int, ...]]:
    """Return the dimensions of the inputs whose sizes were left open, by name."""
    return {given.name: given.varies for given in _traced(program)}


def _traced(program: ProgramModule) -> tuple[TracedInput, ...]:
    return [plan.traced for plan in lineage_of(program).plans if plan.traced][-1]


_EVERY, _SAMPLES = range(32), range(1)
"""Dimensions of the inputs whose sizes are left open."""


def traced_as_open(
    trace: Callable[[Mapping[str, range]], TracedProgram], example: Mapping[str, Any]
) -> tuple[Mapping[str, range], TracedProgram]:
    """Trace a model with every size open, or else the number of samples alone, or none.

    The resolution of images is not left open under attention: that takes minutes.  Returned are the
    open dimensions of each input, which `trace` was given, and what it found.
    """
    images = any(leaf.dim() > 3 for leaf in pytree.tree_leaves(example) if hasattr(leaf, "dim"))
    found: list[tuple[Mapping[str, range], TracedProgram]] = []
    failures: list[Exception] = []
    for dims in (_SAMPLES, _EVERY, range(0)) if images else (_EVERY, _SAMPLES, range(0)):
        if found and (dims != _EVERY or _attends(found[0][1])):
            break
        left_open = dict.fromkeys(example, dims)
        try:
            found.append((left_open, trace(left_open)))
        except (graph.GraphError, AdapterError) as error:
            failures.append(error)
    if not found:
        raise failures[0]
    return found[-1]


def _attends(traced: TracedProgram) -> bool:
    """Whether there is attention in a program."""
    names = [str(node.target) for node in traced.standalone.module.graph.nodes]
    return any("softmax" in name or "scaled_dot_product" in name for name in names)


def exported(
    model: nn.Module,
    example: Mapping[str, Any],
    left_open: Mapping[str, Collection[int]],
    *,
    lines: bool = False,
    exact: bool = True,
) -> Standalone:
    """Export a model in evaluation mode, which is then as it was; see `export_standalone`."""
    with (
        preserved(model),
        shapes_only(model, example) as small,
        without_cache(model),
        followed_mixtures(model),
    ):
        expose_attention(model)  # a plan may name the heads that it has then
        return export_standalone(model, small, left_open, lines=lines, exact=exact)


def trace_dense(
    model: nn.Module, example: Mapping[str, Tensor], left_open: Mapping[str, Collection[int]]
) -> TracedProgram:
    """Trace a model in evaluation mode, which is then as it was, with the axes of all values."""
    with attempt() as tried:  # the model may be anyone's code, and torch puts it together
        found = exported(model, example, left_open)
        if not found.takes({name: tensor[:1] for name, tensor in example.items()}):
            # Its code asks whether there is one sample.  Whoever has one is not left without.
            found = exported(model, example, left_open, exact=False)
        traced = with_axes(found)
    if tried.failed:
        raise AdapterError(
            f"there is no exported program to shrink: {first_line(tried.error)}"
        ) from tried.error
    most = traced.standalone.most_samples
    if most is not None:
        raise AdapterError(
            f"there is no exported program to shrink: the code has a fixed number of samples, and "
            f"the program is right for at most {most}; write -1 for that number in a view, or take "
            "it from the shape of an input"
        )
    return traced


def staying_of(traced: TracedProgram, plan: PruningPlan) -> Staying:
    """Return what stays of the values of a program."""
    kept = {}
    for group in plan.groups:
        try:
            kept[traced.axis_of(group.slots)] = group.kept
        except graph.GraphError as error:
            raise AdapterError(f"group {group.name!r} cannot leave the program: {error}") from error
    return Staying(traced, kept)


def shrunk_graph(traced: TracedProgram, plan: PruningPlan) -> ShrunkGraph:
    """Remove units from a program: every size in it follows, or the plan is refused."""
    staying = staying_of(traced, plan)
    program, copies = Graph(), dict[Node, Node]()
    program.output(program.graph_copy(traced.standalone.module.graph, copies))
    origins = {node: origin for origin, node in copies.items()}
    made = ShrunkGraph(program, origins, traced, staying)
    _Rewriting(made).check()
    return made


def smaller(shrunk: ShrunkGraph) -> ProgramModule:
    """Return a smaller program in evaluation mode, on tensors of its own; tied ones stay tied."""
    program, standalone = shrunk.graph, shrunk.traced.standalone
    arguments = program.find_nodes(op="placeholder")
    with program.inserting_after(arguments[-1]):
        program.call_module(GUARDS, tuple(arguments))
    _, inputs = pytree.tree_flatten((standalone.names, {}))
    form = _PyTreeInfo(list(standalone.names), inputs, standalone.structure)
    program.set_codegen(_PyTreeCodeGen(form))
    program.lint()
    attributes: dict[str, Any] = {GUARDS: InputSizes(standalone.sizes)}
    once: dict[int, Tensor] = {}
    for node in program.find_nodes(op="get_attr"):
        held = shrunk.written(node)
        if isinstance(held, Tensor):
            held = once.setdefault(id(held), _cut(held, shrunk, node))
        attributes[str(node.target)] = held
    made = ProgramModule(attributes, program)
    for node in made.graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
    made.eval()
    return made


def _cut(tensor: Tensor, shrunk: ShrunkGraph, node: Node) -> Tensor:
    """Return a copy of the tensor that a node reads, without what leaves of it."""
    name, new = shrunk.tensor_name(node), tensor.detach()
    new = new if name is None else part_of(new, shrunk.staying.of_tensor(name))
    new = new.clone(memory_format=torch.contiguous_format)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new


def part_of(tensor: Tensor, extents: Extents) -> Tensor:
    """Return what stays of a tensor."""
    for dim, extent in enumerate(extents):
        if extent.stays is not None:
            positions = extent.stays.nonzero().flatten()
            tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor


_NUMBERS = (int, float, *SYMBOLIC)
_OF_TENSORS = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


class _Rewriting(Interpreter):
    """Lets the sizes in a program follow, and compares every shape with what the axes tell.

    Each node is rewritten and then run without values.  Sizes that are open are those of the
    example: operators make numbers of some of them when they run, as they do not when they are
    traced.
    """

    def __init__(self, shrunk: ShrunkGraph) -> None:
        module, graph = shrunk.traced.standalone.module, shrunk.graph
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.shrunk = shrunk
        self.copies = frozenset(shrunk.origins)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def check(self) -> None:
        """Run the program on the shapes of the example; the value of each node is noted."""
        arguments = self.shrunk.graph.find_nodes(op="placeholder")
        self.run(*map(self._example, arguments), enable_io_processing=False)

    def _example(self, node: Node) -> Any:
        traced = self.shrunk.origins[node].meta.get("val")
        if not isinstance(traced, Tensor):
            return traced
        shape = [extent.size for extent in self.shrunk.of(node)[0]]
        with self.mode:
            return torch.empty(shape, dtype=traced.dtype, device=traced.device)

    def run_node(self, n: Node) -> Any:
        """Rewrite one node and run it."""
        if n.op == "output":
            return None
        if n in self.copies:
            rewrite(n, self.shrunk)
        for size in n.all_input_nodes:  # which was put in for this node
            if size not in self.env:
                self.env[size] = self.run_node(size)
        shape = self._shape_of_tensor(n)
        # Whatever an operator raises when sizes do not fit.
        with attempt() as tried, shapes_alone(self.mode), torch.no_grad():
            result = super().run_node(n)
            if shape is not None:
                result = torch.empty(shape, dtype=result.dtype, device=result.device)
        if tried.failed:
            raise refusal(n, first_line(tried.error)) from tried.error
        if n in self.shrunk.origins:
            tensors = result if isinstance(result, tuple | list) else (result,)
            shapes = [tuple(tensor.shape) for tensor in tensors if isinstance(tensor, Tensor)]
            due = [tuple(extent.kept for extent in dims) for dims in self.shrunk.of(n)]
            if shapes != due:
                raise refusal(n, f"it makes {shapes} where {due} is due")
        n.meta["val"] = self._open(n) if isinstance(result, _NUMBERS) else result
        return result

    def _open(self, node: Node) -> Any:
        """Return a number that a node computes, for all sizes that are open."""
        origin = self.shrunk.origins.get(node)
        if node.target in _OF_TENSORS:
            tensor, *dims = cast(tuple[Any, ...], node.args)
            sizes = open_shape(self.shrunk, tensor)
            return math.prod(sizes[d] for d in dims or range(len(sizes)))
        changed = [
            one.meta["val"]
            for one in node.all_input_nodes
            if one in self.shrunk.origins
            and str(one.meta["val"]) != str(self.shrunk.origins[one].meta["val"])
        ]
        if origin is not None and not changed:
            return origin.meta["val"]
        known = isinstance(node.target, FunctionType | BuiltinFunctionType)
        if not known and any(isinstance(one, _NUMBERS) for one in changed):
            raise refusal(node, "it computes a size in a way that is not known")
        given = torch.fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
        return node.target(*given[0], **given[1])  # type: ignore[operator]

    def _shape_of_tensor(self, node: Node) -> tuple[int, ...] | None:
        """Return the shape of what is left of the tensor that a node reads, if it reads one."""
        if node.op != "get_attr":
            return None
        name = self.shrunk.tensor_name(node)
        if name is not None:
            return tuple(extent.kept for extent in self.shrunk.staying.of_tensor(name))
        held = self.shrunk.written(node)
        return tuple(held.shape) if isinstance(held, Tensor) else None


def open_shape(shrunk: ShrunkGraph, node: Node) -> list[Any]:
    """Return the shape of the tensor that a node returns, for all sizes that are open."""
    return [*map(_part, shrunk.of(node)[0], shrunk.origins[node].meta["val"].shape)]


def _part(extent: Extent, size: int | torch.SymInt) -> Any:
    """Return how much of a size stays."""
    if extent.whole:
        return size
    if not varies(size) or extent.ratio is None:
        return extent.kept
    return size * extent.ratio.numerator // extent.ratio.denominator
