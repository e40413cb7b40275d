"""The exported program of a model, shrunk where the code of its modules cannot follow.

What is traced has no code left: parameters, and operators with numbers in them.  The axes of all of
its values say which of those numbers are sizes, and what becomes of them (see
`osscar.shrinking.program.literals`).  Every value then has to have the shape that the axes tell,
and the outputs have to be those of the masked model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel

import graph
from graph.extents import Staying, TracedProgram, trace_program
from graph.tracing.export import concrete, varies
from graph.tracing.preserve import without_cache
from osscar.base.errors import AdapterError, ModelError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.network.fake import on_shapes
from osscar.network.kernels import followed_mixtures
from osscar.network.model_state import restored
from osscar.shrinking.attention import expose_attention
from osscar.shrinking.lineage import LINEAGE, lineage_of
from osscar.shrinking.plan import GroupPlan, PruningPlan, TracedInput
from osscar.shrinking.program.input_sizes import InputSizes
from osscar.shrinking.program.literals import Sizes, refusal, rewrite
from osscar.shrinking.structure import hand_on_structure

_GUARDS = "_guards_fn"
"""The module in a program that checks the sizes of its inputs."""


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
        if hasattr(self, LINEAGE):  # which torch leaves behind
            setattr(copy, LINEAGE, lineage_of(self))
        hand_on_structure(self, copy)
        copy.built_by = self.built_by
        return copy


def example_of(program: ProgramModule) -> dict[str, Tensor]:
    """Return zeros like the inputs that a program was traced with, by name."""
    reference = next(program.parameters())
    made = {given.name: given.example().to(reference.device) for given in _traced(program)}
    return {
        name: tensor.to(reference.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in made.items()
    }


def open_sizes(program: ProgramModule) -> dict[str, tuple[int, ...]]:
    """Return the dimensions of the inputs whose sizes were left open, by name."""
    return {given.name: given.varies for given in _traced(program)}


def _traced(program: ProgramModule) -> tuple[TracedInput, ...]:
    plans = [plan for plan in lineage_of(program).plans if plan.traced]
    if not plans:
        raise ModelError(
            "the program does not know the inputs that it was traced with; give one that "
            "osscar.prune, osscar.shrink_program or osscar.load returned"
        )
    return plans[-1].traced


def trace_dense(
    model: nn.Module, example: Mapping[str, Tensor], left_open: Mapping[str, Collection[int]]
) -> TracedProgram:
    """Trace a model in evaluation mode, which is then as it was, with the axes of all values.

    `left_open` are the dimensions of the inputs, 0 too, whose sizes are left open where the model
    does so; the example has two samples or more.
    """
    try:
        with without_cache(model), followed_mixtures(model), restored(model):
            expose_attention(model)  # a plan may name the heads that it has then
            return trace_program(model, example, left_open)
    except Exception as error:  # the model may be anyone's code, and torch puts it together
        let_shortage_pass(error)
        raise AdapterError(
            f"there is no exported program to shrink: {first_line(error)}"
        ) from error


def input_shapes(traced: TracedProgram) -> dict[str, tuple[int | None, ...]]:
    """Return the sizes of a program's inputs; None for those that may vary."""
    arguments = (node for node in traced.standalone.program.nodes if node.op == "placeholder")
    return {
        name: tuple(None if varies(size) else concrete(size) for size in node.meta["val"].shape)
        for name, node in zip(traced.standalone.names, arguments, strict=True)
    }


def smaller(traced: TracedProgram, plan: PruningPlan) -> ProgramModule:
    """Return a smaller program, in evaluation mode; it shares no tensor with the traced one."""
    kept = {_axis_of(traced, group): group.kept for group in plan.groups}
    staying = Staying(traced, kept, _unread(traced, plan))
    program, copies = Graph(), dict[Node, Node]()
    program.output(program.graph_copy(traced.standalone.module.graph, copies))
    origins = {node: origin for origin, node in copies.items()}
    sizes = Sizes(staying, origins)
    for node in list(origins):
        rewrite(node, sizes)
    _finish(program, traced)
    made = ProgramModule(_attributes(program, traced, staying), program)
    _ShapeCheck(made, staying, {node.name: origin for node, origin in origins.items()}).check()
    for node in made.graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
    made.eval()
    return made


def _axis_of(traced: TracedProgram, group: GroupPlan) -> int:
    try:
        return traced.axis_of(group.slots)
    except graph.GraphError as error:
        raise AdapterError(f"group {group.name!r} cannot leave the program: {error}") from error


def _unread(traced: TracedProgram, plan: PruningPlan) -> dict[str, dict[int, Tensor]]:
    """Return what stays of tensors that belong to units, but that the program does not read."""
    stays: dict[str, dict[int, Tensor]] = {}
    for group in plan.groups:
        for slot in group.slots:
            if slot.tensor not in traced.unread:
                continue
            shape = traced.standalone.program.tensors[slot.tensor].shape
            fits = slot.dim < len(shape) and slot.units == group.units
            if not fits or slot.offset + slot.units * slot.width > shape[slot.dim]:
                raise AdapterError(
                    f"group {group.name!r} cannot leave the program: {slot.tensor!r} of shape "
                    f"{shape} has no such units along dimension {slot.dim}"
                )
            dims = stays.setdefault(slot.tensor, {})
            whole = torch.ones(shape[slot.dim], dtype=torch.bool)
            dims.setdefault(slot.dim, whole)[slot.indices(group.gone)] = False
    return stays


def _finish(program: Graph, traced: TracedProgram) -> None:
    """Let a program take its arguments by position or name, and put its outputs together.

    They are checked first.
    """
    arguments = program.find_nodes(op="placeholder")
    if not program.find_nodes(op="call_module", target=_GUARDS):
        with program.inserting_after(arguments[-1]):
            program.call_module(_GUARDS, tuple(arguments))
    names, structure = traced.standalone.names, traced.standalone.structure
    _, inputs = pytree.tree_flatten((names, {}))
    program.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(names), inputs, structure)))
    program.lint()


def _attributes(program: Graph, traced: TracedProgram, staying: Staying) -> dict[str, Any]:
    """Return copies of what a program reads, cut to what stays; tied tensors stay tied."""
    module, holders = traced.standalone.module, traced.standalone.program.holders
    once: dict[int, Any] = {}
    attributes: dict[str, Any] = {}
    for node in program.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        target = str(node.target)
        if target == _GUARDS:
            guards = copy.deepcopy(getattr(module, _GUARDS, None))
            attributes[target] = InputSizes(input_shapes(traced), guards)
            continue
        held = attrgetter(target)(module)
        if isinstance(held, Tensor):
            held = once.setdefault(id(held), _cut(held, staying, holders.get(node.name)))
        attributes[target] = held
    return attributes


def _cut(tensor: Tensor, staying: Staying, name: str | None) -> Tensor:
    """Return a copy of a tensor, without what leaves of it."""
    new = tensor.detach()
    for dim, extent in enumerate(() if name is None else staying.of_tensor(name)):
        if extent.stays is not None:
            new = new.index_select(dim, extent.stays.nonzero().flatten().to(new.device))
    new = new.clone(memory_format=torch.contiguous_format)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new


class _ShapeCheck(Interpreter):
    """Runs a program without values, and compares every shape with what the axes tell."""

    def __init__(self, module: GraphModule, staying: Staying, origins: Mapping[str, Node]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.staying, self.origins = staying, origins
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def check(self) -> None:
        """Run the program on the shapes of the example."""
        arguments = [node for node in self.origins.values() if node.op == "placeholder"]
        self.run(*map(self._example, arguments), enable_io_processing=False)

    def _example(self, origin: Node) -> Tensor:
        traced = origin.meta["val"]
        shape = [extent.size for extent in self.staying.of(origin)[0]]
        with self.mode:
            return torch.empty(shape, dtype=traced.dtype, device=traced.device)

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        if n.target == _GUARDS or n.op == "output":
            return None
        try:
            with on_shapes(self.mode), torch.no_grad():
                result = super().run_node(n)
        except Exception as error:  # whatever an operator raises when sizes do not fit
            let_shortage_pass(error)
            raise refusal(n, first_line(error)) from error
        origin = self.origins.get(n.name)
        if origin is not None:
            self._compare(n, result, origin)
        return result

    def _compare(self, node: Node, result: Any, origin: Node) -> None:
        tensors = result if isinstance(result, tuple | list) else (result,)
        shapes = [tuple(tensor.shape) for tensor in tensors if isinstance(tensor, Tensor)]
        due = [tuple(extent.kept for extent in dims) for dims in self.staying.of(origin)]
        if shapes != due:
            raise refusal(node, f"it makes {shapes} where {due} is due")
