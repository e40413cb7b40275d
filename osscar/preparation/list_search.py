"""How lists of modules are found to be experts: by the calls around them, and by trial.

See `osscar.preparation.expert_lists` for what is meant, and how weights are read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree as pytree

from graph.groups import Role, Slot, UnitKind
from osscar.base.errors import ModelError, OsscarError, first_line
from osscar.network.double import InDouble
from osscar.network.hooks import hooks, other_forwards
from osscar.network.modules import copied, forward
from osscar.preparation.expert_lists import (
    ExpertList,
    ListInBlock,
    NoMixture,
    called_as_mixtures,
    joined,
    run_with,
    silence,
)
from osscar.preparation.routing import last_layers
from osscar.shrinking.equivalence import Inputs, finer_precision, in_format_of
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.shrinking.routers import (
    TOLERANCE,
    Call,
    SeenRoutes,
    biases_in,
    by_expert,
    draw_tensors,
    drawn_call,
    logits_of,
    rule_of,
    without_experts,
)
from osscar.shrinking.shrink import rehearse
from solvers import RoutingRule

_NOTHING = 1e-10
"""The share of a token's largest weight, in double precision, below which others are none."""

_OTHER_TOKENS = (
    "the experts of {0!r} are given other tokens than their router {1!r} reads, such as without "
    "the norm before it, or times their weights: let one module that is called with the tokens of "
    "the experts route, such as torch.nn.Sequential(norm, gate), and weigh what experts put out"
)

_TOKENS = 256
"""On how many tokens routes are read, at least."""

# ---- how they are found ------------------------------------------------------------------


@dataclass
class ListCalls:
    """What a pass has called of a block with a list of modules."""

    block: list[tuple[Call, Any]] = field(default_factory=list)
    members: list[tuple[Call, Any]] = field(default_factory=list)
    gates: dict[str, int] = field(default_factory=dict)
    """What may be routers, by name, with how often they were called; the innermost first."""


_NAMED = re.compile(r"(^|\.)experts$")
"""What mixtures are called; those of any name are found where they are called like one."""


def is_named(name: str) -> bool:
    """Whether a module has the name of a mixture."""
    return bool(_NAMED.search(name))


def _may_be_experts(name: str, module: nn.Module) -> bool:
    """Whether a module is a list, or a dictionary, of several that may be experts."""
    several = isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1
    return several and (is_named(name) or alike(module))


def alike(module: nn.Module) -> bool:
    """Whether a module is a list of several modules of the same structure and shapes."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    forms = {
        (
            tuple(type_before_parametrizations(inner) for inner in member.modules()),
            tuple((n, t.shape, t.dtype) for n, t in member.state_dict(keep_vars=True).items()),
        )
        for member in module
    }
    own = [id(parameter) for member in module for parameter in member.parameters()]
    return len(forms) == 1 and len(set(own)) == len(own) > 0


def list_calls(
    model: nn.Module, example: Mapping[str, Any], names: Sequence[str]
) -> dict[str, ListCalls]:
    """Run a model, and return what it calls around lists of modules."""
    found = {name: ListCalls() for name in names}
    counts = {name: len(model.get_submodule(name)) for name in names}  # type: ignore[arg-type]

    def look(called: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        for name, calls in found.items():
            block = name.rpartition(".")[0]
            if called == block:
                calls.block.append(((args, kwargs), y))
            elif called.startswith(f"{name}."):
                if "." not in called[len(name) + 1 :]:
                    calls.members.append(((args, kwargs), y))
            elif (
                called.startswith(f"{block}." if block else "")
                and logits_of(module, (args, kwargs), y, counts[name]) is not None
            ):
                calls.gates[called] = calls.gates.get(called, 0) + 1

    with hooks(model, after=look):
        forward(model, example)
    return found


def expert_list(model: nn.Module, name: str, calls: ListCalls) -> ExpertList:
    """Return how a block sends tokens to a list of experts.

    Raises
    ------
    NoMixture
        If it is not called as experts are.
    ModelError
        If some of them could not leave.
    """
    block_name = name.rpartition(".")[0]
    experts = model.get_submodule(name)
    if not alike(experts):
        raise NoMixture(
            f"the modules of {name!r} are not several of the same structure and shapes, or share "
            "tensors: only experts that are alike can leave as a whole"
        )
    if len(calls.block) != 1:
        raise NoMixture(
            f"{name!r} lies in {block_name or 'the model'!r}, which is called {len(calls.block)} "
            "times in a pass: only a block that is called once can do without some experts; give "
            "each call a block of its own"
        )
    if _is_shared(model, experts):
        raise NoMixture(f"other modules have experts of {name!r}, or tensors of them, too")
    count, outputs = len(experts), _outputs(name, calls)  # type: ignore[arg-type]
    block, (call, _) = model.get_submodule(block_name), calls.block[0]
    reason: ModelError = NoMixture(
        f"no module called once in {block_name or 'the model'!r} puts out a number for each "
        f"of the {count} modules of {name!r}, so that no router is known that could do without some"
    )
    for gate, times in calls.gates.items():
        if times != 1:
            continue
        try:
            one = _routed(ListInBlock(block_name, name, gate, count, outputs), block, call)
            _check_list(model, one, call)
            return one
        except ModelError as error:
            if isinstance(reason, NoMixture):  # another one may tell more
                reason = error
    raise reason


def _is_shared(model: nn.Module, experts: nn.Module) -> bool:
    """Whether tensors of modules in a list have another place in a model, too."""
    own = [id(tensor) for tensor in experts.state_dict(keep_vars=True).values()]
    places = model.state_dict(keep_vars=True).values()
    return sum(id(tensor) in own for tensor in places) > len(own)


def _outputs(name: str, calls: ListCalls) -> int:
    """Return how many numbers experts put out for a token."""
    if not calls.members:
        raise NoMixture(f"no module of {name!r} is called")
    widths = set()
    for (args, kwargs), y in calls.members:
        x = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(x) != 1 or not isinstance(y, Tensor) or y.shape[:-1] != x[0].shape[:-1]:
            raise NoMixture(
                f"the modules of {name!r} are not called with tokens alone, or do not put out a "
                "row for each: their weights cannot be told"
            )
        widths.add(y.shape[-1])
    return int(max(widths))


def _routed(one: ListInBlock, block: nn.Module, call: Call) -> ExpertList:
    """Add to what is known of a list where its sum is put out, and by which rule."""
    place = _place(one, block, call)
    copy = _drawn_copy(one, block)
    tokens = len(run_with(one, block, block.forward, call, silence(one)).tokens)
    seen = [
        _seen(one, copy, drawn_call(call, one.count, seed), place)
        for seed in range(min(-(-_TOKENS // tokens), _TOKENS))
    ]
    top_k = seen[0].experts.shape[1]
    if top_k == one.count:
        raise NoMixture(
            f"every token is sent to all {one.count} experts of {one.experts!r}, or more is done "
            "with what they put out than to add it up, so that none can leave"
        )
    try:
        rule, bias = rule_of(seen, [copy.get_submodule(one.relative(one.gate)), copy])
    except ModelError as error:
        raise ModelError(
            f"the code of {one.block or 'the model'!r} with the router {one.gate!r} {error}"
        ) from error
    return ExpertList(**vars(one), place=place, rule=rule, bias=bias)


def _place(one: ListInBlock, block: nn.Module, call: Call) -> int:
    """Return which leaf of what a block puts out holds the sum over experts."""
    run = partial(run_with, one, block, block.forward, call)
    rest, other = run(silence(one)), run(silence(one) + 1)
    pairs = zip(pytree.tree_leaves(rest.y), pytree.tree_leaves(other.y), strict=True)
    changed = [
        i for i, (a, b) in enumerate(pairs) if isinstance(a, Tensor) and not torch.equal(a, b)
    ]
    leaves = pytree.tree_leaves(rest.y)
    if len(changed) != 1 or leaves[changed[0]].numel() != len(rest.tokens) * one.outputs:
        raise NoMixture(
            f"{one.block or 'the model'!r} does not put out a sum over the experts of "
            f"{one.experts!r} for each token that its router {one.gate!r} reads"
        )
    return changed[0]


def _drawn_copy(one: ListInBlock, block: nn.Module) -> nn.Module:
    """Return a copy of a block in double precision that routes by drawn numbers.

    Its experts have no weights.
    """
    experts = one.experts_in(block)
    blank = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in experts.parameters()
    }
    copy = copied(block, blank).double()
    draw_tensors(copy.get_submodule(one.relative(one.gate)), one.count)
    for tensor in tensors_of(copy, one.count, recurse=False).values():
        if tensor.is_floating_point() and tensor.numel() == one.count:
            generator = torch.Generator().manual_seed(1)
            tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return copy


def _read_weights(
    one: ListInBlock, block: nn.Module, call: Call, place: int
) -> tuple[Tensor, Tensor]:
    """Return the logits of the tokens of a call, and the weights of all experts, (tokens, experts).

    Experts put out unit vectors, as many at a time as there are of these.
    """
    run = partial(run_with, one, block, block.forward, call)
    rest = run(silence(one))
    found = []
    for start in range(0, one.count, one.outputs):
        some = torch.arange(min(one.outputs, one.count - start))
        rows = silence(one)
        rows[start + some, some] = 1
        found.append((run(rows).sum(place) - rest.sum(place))[:, : len(some)])
    return rest.logits, torch.cat(found, 1)


def _seen(one: ListInBlock, copy: nn.Module, call: Call, place: int) -> SeenRoutes:
    """Return how a copy of a block routes the tokens of a call."""
    with InDouble():
        logits, weights = _read_weights(one, copy, call, place)
    taken = weights.abs() > _NOTHING * weights.abs().amax(1, keepdim=True)
    counts = set(taken.sum(1).tolist())
    if len(counts) != 1 or 0 in counts:
        raise NoMixture(
            f"{one.block or 'the model'!r} sends tokens to {sorted(counts)} experts of "
            f"{one.experts!r}: no rule is known for tokens that go to different numbers of them"
        )
    top_k = counts.pop()
    experts = taken.nonzero()[:, 1].view(-1, top_k)
    gate = one.relative(one.gate)
    biases = {
        joined(gate, n): t
        for n, t in biases_in(copy.get_submodule(gate), ((), {}), one.count).items()
    }
    own = tensors_of(copy, one.count, recurse=False)
    biases |= {n: t for n, t in own.items() if t.numel() == one.count}
    return SeenRoutes(logits, experts, weights.gather(1, experts), biases)


def last_layer(experts: Iterable[nn.Module], hidden: Tensor) -> str | None:
    """Return the name of the linear layer that puts out what each expert of a list does, if any."""
    found = [list(last_layers(expert, hidden.clone())) for expert in experts]
    return next((name for name in found[0] if all(name in names for names in found)), None)


def tokens_of(model: nn.Module, one: ExpertList, call: Call) -> Tensor:
    """Return the tokens, (tokens, d), that the router reads in a call of the block."""
    block = model.get_submodule(one.block)
    return run_with(one, block, block.forward, call, silence(one)).tokens


# ---- what cannot be traced ---------------------------------------------------------------


def untraced_blocks(model: nn.Module, example: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the blocks that give tokens to lists of modules, with the list and what they put out.

    Which tokens a module gets depends on their values, and so do shapes in the code of the block.
    """
    names = [name for name, module in model.named_modules() if _may_be_experts(name, module)]
    found = list_calls(model, example, names) if names else {}
    blocks = {}
    for name, calls in found.items():
        with suppress(NoMixture):
            if len(set(map(_shapes, calls.block))) == 1 and calls.gates and _outputs(name, calls):
                blocks[name.rpartition(".")[0]] = name, calls.block[0][1]
    return blocks


def _shapes(call: tuple[Call, Any]) -> tuple[torch.Size, ...]:
    """Return the shapes of the tensors that a call puts out."""
    leaves = pytree.tree_leaves(call[1])
    return tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))


@contextmanager
def stood_in_for(model: nn.Module, blocks: Mapping[str, tuple[str, Any]]) -> Iterator[None]:
    """Let blocks put out numbers of the right shapes, which depend on what they read."""

    def forward(y: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        total = sum(leaf.sum() for leaf in read)
        return pytree.tree_map_only(
            Tensor, lambda leaf: (read[0].new_zeros(leaf.shape) + total).to(leaf.dtype), y
        )

    forwards = [(model.get_submodule(name), partial(forward, y)) for name, (_, y) in blocks.items()]
    with other_forwards(forwards):
        yield


# ---- what belongs to an expert, and whether it is all ------------------------------------


def tensors_of(module: nn.Module, count: int, *, recurse: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a module, or of it alone, that have an entry for each expert."""
    own = {
        **dict(module.named_parameters(recurse=recurse)),
        **dict(module.named_buffers(recurse=recurse)),
    }
    return {name: tensor for name, tensor in own.items() if count in tensor.shape}


def slots_in(
    model: nn.Module, name: str, count: int, role: Role, *, recurse: bool = True, order: int = 0
) -> list[Slot]:
    """Return where tensors of a module have entries for each of `count` experts.

    Matrices have the role that is given.
    """
    module = model.get_submodule(name)
    if isinstance(module, nn.ModuleList):
        return [Slot(name, 0, role, name, count, order=order)]
    return [
        Slot(
            joined(name, tensor), tuple(t.shape).index(count),
            Role.PASS_THROUGH if t.numel() == count else role, name, count, order=order,
        )
        for tensor, t in tensors_of(module, count, recurse=recurse).items()
    ]  # fmt: skip


def router_slots(model: nn.Module, router: str, count: int, order: int = 0) -> list[Slot]:
    """Return where a router has entries for each of `count` experts."""
    slots = slots_in(model, router, count, Role.PRODUCER, order=order)
    if not any(slot.role is Role.PRODUCER for slot in slots):
        raise ModelError(
            f"the router {router!r} has no tensor with a row for each of {count} experts"
        )
    return slots


def list_slots(model: nn.Module, one: ExpertList, order: int = 0) -> list[Slot]:
    """Return where the experts of a list lie, in a model that may be the block alone."""
    rows = router_slots(model, one.gate, one.count, order)
    own = slots_in(model, one.block, one.count, Role.PRODUCER, recurse=False, order=order)
    return [*rows, *own, *slots_in(model, one.experts, one.count, Role.CONSUMER, order=order)]


def trial_experts(rule: RoutingRule, count: int) -> list[int]:
    """Return experts among which a router can choose: the last ones of each group, about half."""
    size, fewest = count // rule.groups, rule.fewest // rule.groups
    if fewest >= size:
        raise ModelError(
            f"the router needs {rule.fewest} experts, which are all that there are: none can leave"
        )
    stays = max(fewest, size // 2)
    return [g * size + i for g in range(rule.groups) for i in range(size - stays, size)]


def _check_list(model: nn.Module, one: ExpertList, call: Call) -> None:
    """Refuse a block that is not what is known of it, or not without some experts.

    It has to compute the sum over experts that is found; to route among some by the rule once the
    logits of others are at minus infinity; and to compute the same once these are gone, on drawn
    tokens, too.
    """
    block, kept = model.get_submodule(one.block), trial_experts(one.rule, one.count)
    inner = _renamed(one, "")
    slots = list_slots(block, inner)
    _check_sum(inner, block, call, one)
    _check_masked(inner, block, call, plan_of(slots, kept), one.experts)
    alone, shell = _SumAlone(block, one.place), _renamed(one, "block")
    plan = PruningPlan((plan_of(list_slots(alone, shell), kept),))
    given = [_as_inputs(block, calls) for calls in (call, _drawn_like(call, one.count))]
    try:
        with finer_precision(alone, given[0]):
            rehearse(alone, plan, [in_format_of(inputs, alone) for inputs in given])
    except OsscarError as error:
        raise ModelError(
            f"the code of {one.block or 'the model'!r} cannot do without some experts of "
            f"{one.experts!r}: {first_line(error)}"
        ) from error


def _renamed(one: ExpertList, block: str) -> ExpertList:
    """Return what is known of a block as it is where that has another name."""
    experts, gate = (joined(block, one.relative(name)) for name in (one.experts, one.gate))
    return replace(one, block=block, experts=experts, gate=gate)


def plan_of(slots: Sequence[Slot], kept: Sequence[int]) -> GroupPlan:
    """Return a plan by which some experts stay."""
    return GroupPlan("experts", UnitKind.EXPERTS, slots[0].units, tuple(kept), tuple(slots))


class _SumAlone(nn.Module):
    """A block of which the leaf with the sum over experts is put out: logits may be beside it."""

    def __init__(self, block: nn.Module, place: int) -> None:
        super().__init__()
        self.block, self.place = block, place
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return that leaf."""
        return pytree.tree_leaves(self.block(*args, **kwargs))[self.place]


def _drawn_like(call: Call, count: int) -> Call:
    """Return a call with drawn numbers in its own number formats."""
    args, kwargs = drawn_call(call, count, 0)
    flat, form = pytree.tree_flatten((args, kwargs))
    given = pytree.tree_leaves(call)
    drawn = [
        a.to(b.dtype) if isinstance(a, Tensor) else a for a, b in zip(flat, given, strict=True)
    ]
    found: Call = pytree.tree_unflatten(drawn, form)
    return found


def _as_inputs(block: nn.Module, call: Call) -> Inputs:
    args, kwargs = call
    if not kwargs:
        return args
    return dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)


def _check_sum(one: ExpertList, block: nn.Module, call: Call, named: ExpertList) -> None:
    for given in (call, _drawn_like(call, one.count)):
        expected = pytree.tree_leaves(block.forward(*given[0], **given[1]))[one.place]
        with called_as_mixtures(block, [one]):
            found = pytree.tree_leaves(block.forward(*given[0], **given[1]))[one.place]
        error = torch.linalg.vector_norm(found.double() - expected.double())
        size = torch.linalg.vector_norm(expected.double())
        if not bool(error <= torch.finfo(expected.dtype).eps ** 0.5 * size):
            if not _reads_alike(one, block, given):
                raise ModelError(_OTHER_TOKENS.format(named.experts, named.gate))
            raise ModelError(
                f"the block around {named.experts!r} ({type(block).__name__}) does not put out the "
                "sum over experts, times their weights"
            )


def _reads_alike(one: ExpertList, block: nn.Module, call: Call) -> bool:
    """Whether experts are given tokens that the router reads, by the first of each."""
    tokens = run_with(one, block, block.forward, call, silence(one)).tokens
    alike = []

    def look(_: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        first = x.reshape(-1, x.shape[-1])[:1].to(tokens)
        near = torch.isclose(tokens, first) if first.shape[1] == tokens.shape[1] else tokens < 0
        alike.append(not len(first) or bool(near.all(1).any()))

    names = [f"{one.relative(one.experts)}.{number}" for number in range(one.count)]
    with hooks(block, names, before=look):
        block.forward(*call[0], **call[1])
    return all(alike)


def _check_masked(
    one: ExpertList, block: nn.Module, call: Call, plan: GroupPlan, name: str
) -> None:
    copy = _drawn_copy(one, block)
    given = drawn_call(call, one.count, len(plan.kept))
    whole = _seen(one, copy, given, one.place)
    with without_experts(copy, [plan]):
        masked = _seen(one, copy, given, one.place)
    bias = None if one.bias is None else whole.biases[one.bias].flatten()
    ours = by_expert(*one.rule.route(whole.logits, plan.kept, bias))
    theirs = by_expert(masked.experts, masked.weights)
    error = (ours[1] - theirs[1]).abs().max() if ours[0].shape == theirs[0].shape else torch.inf
    if not torch.equal(ours[0], theirs[0]) or not error <= TOLERANCE * ours[1].abs().max():
        raise ModelError(
            f"the code around {name!r} ({type(block).__name__}) does not route among the others "
            "once the logits of some experts are at minus infinity"
        )
