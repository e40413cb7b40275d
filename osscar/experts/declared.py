"""Which blocks send tokens to a list of modules: declared by the user, and checked by trial.

See `osscar.experts.lists` for how such a block is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree as pytree

import graph
from graph import CouplingGroup, Freeze, Role, Slot, UnitKind
from osscar.base.errors import ModelError, OptionError, OsscarError, first_line
from osscar.base.inputs import safe_repr
from osscar.base.memory import let_shortage_pass
from osscar.experts.lists import (
    ExpertList,
    ListInBlock,
    called_as_mixtures,
    first_tensor,
    joined,
    run_with,
    silence,
)
from osscar.experts.routers import (
    Call,
    SeenRoutes,
    biases_in,
    draw_tensors,
    drawn_call,
    rule_of,
)
from osscar.network.hooks import InDouble, hooks, other_forwards
from osscar.network.modules import copied, forward
from osscar.offload.on_disk import is_on_disk
from osscar.shrinking.follow import full_name

_NOTHING = 1e-10
"""The share of a token's largest weight, in double precision, below which others are none."""
_TOKENS = 256
"""On how many tokens routes are read, at least."""

_Class = TypeVar("_Class", bound=type[nn.Module])


@dataclass(frozen=True)
class Declaration:
    """What a user says of a class of blocks: what these call their gate, and their list."""

    kind: str
    gate: str
    experts: str

    def __str__(self) -> str:
        return f"osscar.mixture({self.kind!r}, gate={self.gate!r}, experts={self.experts!r})"


_DECLARED: dict[str, Declaration] = {}


def mixture(*classes: type[nn.Module] | str, gate: str, experts: str) -> Callable[[_Class], _Class]:
    """Declare that modules of some classes send tokens to experts that are a list of modules.

    A block asks its gate for the logits of all experts, calls some of them with rows of tokens,
    and puts out the sum of what they make of these, times weights; the sum may stand in other
    terms, and it is the first tensor that is put out.  Whether a block is one is tried when its
    experts are to leave, with fewer of them too.  Experts whose matrices are stacked in one
    parameter, as in transformers, need no declaration.

    Parameters
    ----------
    classes
        Classes, or their full names such as ``"package.module.Block"``, which spare an import.
        Subclasses are covered too.
    gate, experts
        What a block calls the module that puts out logits, and the `torch.nn.ModuleList`.

    Returns
    -------
    A decorator of a class, which is declared as well.

    Raises
    ------
    OptionError
        If a class or a name is none.

    Examples
    --------
    >>> import osscar
    >>> _ = osscar.mixture("mylib.blocks.Block", gate="router", experts="ffns")
    """
    for name in (gate, experts):
        if not (isinstance(name, str) and name):
            raise OptionError(f"a module of a mixture is {safe_repr(name)}; give its name")

    def declare(kind: _Class | str) -> None:
        if not isinstance(kind, str) and not (
            isinstance(kind, type) and issubclass(kind, nn.Module)
        ):
            raise OptionError(
                f"a mixture is {safe_repr(kind)}; give a class of modules, or its full name"
            )
        name = kind if isinstance(kind, str) else full_name(kind)
        _DECLARED[name] = Declaration(name, gate, experts)

    for one in classes:
        declare(one)

    def decorate(kind: _Class) -> _Class:
        declare(kind)
        return kind

    return decorate


# ---- declared blocks of a model ----------------------------------------------------------


def declared_in(model: nn.Module) -> dict[str, Declaration]:
    """Return the declarations of those modules that have one, by name."""
    found = {}
    for name, module in model.named_modules():
        told = [_DECLARED[n] for n in map(full_name, type(module).__mro__) if n in _DECLARED]
        if told:
            found[name] = told[0]
    return found


def undeclared(model: nn.Module, experts: str) -> str:
    """Return how to declare the block that a list of modules lies in, as the end of a sentence."""
    if not isinstance(model.get_submodule(experts), nn.ModuleList | nn.ModuleDict):
        return ""
    block, _, attribute = experts.rpartition(".")
    told = Declaration(full_name(type(model.get_submodule(block))), "...", attribute)
    return f"; if code sends tokens to the modules of {experts!r}, declare it: {told}"


def calls_of(
    model: nn.Module, example: Mapping[str, Any], names: Sequence[str]
) -> dict[str, list[tuple[Call, Any]]]:
    """Run a model, and return the calls of some modules, with what they put out."""
    found: dict[str, list[tuple[Call, Any]]] = {name: [] for name in names}

    def look(name: str, _: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        found[name].append(((args, kwargs), y))

    with hooks(model, names, after=look):
        forward(model, example)
    return found


@contextmanager
def stood_in_for(model: nn.Module, blocks: Mapping[str, Any]) -> Iterator[None]:
    """Let blocks, by name with what they put out, put out such shapes whatever they compute.

    What they put out depends on what they read.  Which tokens a module of a list gets depends on
    their values, and so do shapes in the code of the block, which cannot be traced.
    """

    def forward(y: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        total = sum(leaf.sum() for leaf in read)
        return pytree.tree_map_only(
            Tensor, lambda leaf: (read[0].new_zeros(leaf.shape) + total).to(leaf.dtype), y
        )

    with other_forwards([(model.get_submodule(n), partial(forward, y)) for n, y in blocks.items()]):
        yield


_OPAQUE = (
    "it enters {!r}, whose code gives experts the tokens that are sent to them: shapes depend on "
    "values there, so that it cannot be traced"
)
_SENT = (
    "belongs to experts that the code of {!r} gives the tokens that are sent to them: shapes "
    "depend on values there, so that it cannot be traced; whole experts may leave (experts=)"
)


def traced_around(
    model: nn.Module,
    example: Mapping[str, Any],
    small: Mapping[str, Any],
    error: graph.TraceError,
) -> tuple[graph.DependencyGraph, tuple[CouplingGroup, ...]]:
    """Trace a model around its declared blocks, or raise the error that it cannot be traced with.

    Last come frozen groups for the neurons of the experts in these blocks.
    """
    blocks = {} if is_on_disk(model) else declared_in(model)
    if not blocks:
        lists = [name for name, _ in model.named_modules() if is_named(name)]
        said = "".join(undeclared(model, name) for name in lists[:1])
        raise graph.TraceError(error.reason, error.module, error.hint + said) from error
    calls = calls_of(model, example, list(blocks))
    with stood_in_for(model, {name: y for name, [(_, y), *_] in calls.items()}):
        traced = graph.trace(model, small, opaque=list(blocks))
    groups = tuple(_opaque_named(group, blocks) for group in traced.groups)
    untraced = (
        CouplingGroup(
            f"{joined(block, told.experts)}.neurons", UnitKind.NEURONS, 1, (), 0,
            (Freeze(_SENT.format(block or "the model"), "", block),),
        )
        for block, told in blocks.items()
    )  # fmt: skip
    return replace(traced, groups=groups), tuple(untraced)


def _opaque_named(group: CouplingGroup, blocks: Collection[str]) -> CouplingGroup:
    """Say what is in the way of a group that enters code which was not traced."""
    frozen = (
        replace(freeze, reason=_OPAQUE.format(freeze.module or "the model"))
        if freeze.module in blocks
        else freeze
        for freeze in group.frozen
    )
    return replace(group, frozen=tuple(frozen))


def is_named(name: str) -> bool:
    """Whether a module has the name of a mixture; others are found by how they are called."""
    return name.rpartition(".")[2] == "experts"


def expert_list(
    model: nn.Module, block: str, told: Declaration, calls: Sequence[tuple[Call, Any]]
) -> tuple[ExpertList, Tensor]:
    """Return how a declared block sends tokens to its experts, and the tokens of its call.

    Raises
    ------
    ModelError
        If the declaration does not hold, or some of the experts could not leave.
    """
    try:
        return _expert_list(model, block, told, calls)
    except OsscarError as error:
        if not isinstance(error, ModelError):
            raise
        found = str(error)
    except Exception as error:  # code of anyone's, which may not take other experts
        let_shortage_pass(error)
        found = (
            "its code fails with experts that put out drawn numbers, or on drawn tokens: "
            f"{first_line(error)}"
        )
    raise ModelError(f"{told} does not hold for {block or 'the model'!r}: {found}")


def _expert_list(
    model: nn.Module, block: str, told: Declaration, calls: Sequence[tuple[Call, Any]]
) -> tuple[ExpertList, Tensor]:
    own = model.get_submodule(block)
    for name in (told.gate, told.experts):
        if name not in dict(own.named_modules()):
            there = ", ".join(repr(child) for child, _ in own.named_children())
            raise ModelError(f"it has no module {name!r}, and has {there or 'none'}")
    experts = own.get_submodule(told.experts)
    if not isinstance(experts, nn.ModuleList):
        raise ModelError(
            f"{told.experts!r} is a {type(experts).__name__}; experts leave from a "
            "torch.nn.ModuleList that the code calls by number"
        )
    if not alike(experts):
        raise ModelError(
            f"the modules of {told.experts!r} are not several of the same structure and shapes, or "
            "share tensors: only experts that are alike can leave as a whole"
        )
    if len(calls) != 1:
        raise ModelError(
            f"it is called {len(calls)} times in a pass: only a block that is called once can do "
            "without some experts; give each call a block of its own"
        )
    (call, _), count = calls[0], len(experts)
    tokens = _tokens(own, told, call)
    y = experts[0](tokens[:1])
    if not isinstance(y, Tensor) or y.shape[:-1] != (1,):
        raise ModelError(
            f"the modules of {told.experts!r} do not put out a row for each row that {told.gate!r} "
            "reads"
        )
    one = ListInBlock(block, told.gate, told.experts, count, y.shape[1])
    found = _routed(one, own, call, len(tokens))
    _check_sum(own, found, call)
    return found, tokens


def _tokens(block: nn.Module, told: Declaration, call: Call) -> Tensor:
    """Return what the gate of a block reads, (tokens, d)."""
    seen: list[Tensor] = []

    def look(_: str, __: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(first_tensor((args, kwargs)))

    with hooks(block, [told.gate], before=look):
        block.forward(*call[0], **call[1])
    if len(seen) != 1:
        raise ModelError(f"{told.gate!r} is called {len(seen)} times in a call of it, and not once")
    return seen[0].reshape(-1, seen[0].shape[-1])


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


# ---- the rule ----------------------------------------------------------------------------


def _routed(one: ListInBlock, block: nn.Module, call: Call, tokens: int) -> ExpertList:
    """Add to what is known of a list by which rule tokens are sent to it."""
    copy = _drawn_copy(one, block)
    seen = [
        _seen(one, copy, drawn_call(call, one.count, seed))
        for seed in range(min(-(-_TOKENS // tokens), _TOKENS))
    ]
    if seen[0].experts.shape[1] == one.count:
        raise ModelError(
            f"every token is sent to all {one.count} experts, or more is done with what they put "
            "out than to add it up, so that none can leave"
        )
    try:
        rule, bias = rule_of(seen, [copy.get_submodule(one.gate), copy])
    except ModelError as error:
        raise ModelError(f"its code with the gate {error}") from error
    return ExpertList(**vars(one), rule=rule, bias=bias)


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
    draw_tensors(copy.get_submodule(one.gate), one.count)
    for tensor in tensors_of(copy, one.count, recurse=False).values():
        if tensor.is_floating_point() and tensor.numel() == one.count:
            generator = torch.Generator().manual_seed(1)
            tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return copy


def _seen(one: ListInBlock, copy: nn.Module, call: Call) -> SeenRoutes:
    """Return how a copy of a block routes the tokens of a call.

    Experts put out unit vectors, as many at a time as there are of these: what they change about
    the output are their weights.
    """
    with InDouble():
        rest = run_with(one, copy, copy.forward, call, silence(one))
        found = []
        for start in range(0, one.count, one.outputs):
            some = torch.arange(min(one.outputs, one.count - start))
            rows = silence(one)
            rows[start + some, some] = 1
            changed = run_with(one, copy, copy.forward, call, rows).sum - rest.sum
            found.append(changed[:, : len(some)])
    weights = torch.cat(found, 1)
    taken = weights.abs() > _NOTHING * weights.abs().amax(1, keepdim=True)
    counts = set(taken.sum(1).tolist())
    if counts == {0}:
        raise ModelError(
            "what it puts out first does not depend on what the experts put out: put out their sum "
            "there"
        )
    if len(counts) != 1:
        raise ModelError(
            f"it sends tokens to {sorted(counts)} experts: no rule is known for tokens that go to "
            "different numbers of them"
        )
    experts = taken.nonzero()[:, 1].view(-1, counts.pop())
    biases = {
        joined(one.gate, n): t
        for n, t in biases_in(copy.get_submodule(one.gate), ((), {}), one.count).items()
    }
    own = tensors_of(copy, one.count, recurse=False)
    biases |= {n: t for n, t in own.items() if t.numel() == one.count}
    return SeenRoutes(rest.logits, experts, weights.gather(1, experts), biases)


# ---- what belongs to an expert -----------------------------------------------------------


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
    """Return where the experts of a list lie."""
    gate, experts = (joined(one.block, name) for name in (one.gate, one.experts))
    rows = router_slots(model, gate, one.count, order)
    own = slots_in(model, one.block, one.count, Role.PRODUCER, recurse=False, order=order)
    return [*rows, *own, *slots_in(model, experts, one.count, Role.CONSUMER, order=order)]


# ---- whether it is the sum ---------------------------------------------------------------


def _check_sum(block: nn.Module, one: ExpertList, call: Call) -> None:
    """Refuse a block that does not put out the sum over experts of what they make of the tokens."""
    args, kwargs = call
    expected = first_tensor(block.forward(*args, **kwargs)).double()
    with called_as_mixtures(block, [replace(one, block="")]):
        found = first_tensor(block.forward(*args, **kwargs))
    error, size = (torch.linalg.vector_norm(y) for y in (found.double() - expected, expected))
    if not bool(error <= torch.finfo(found.dtype).eps ** 0.5 * size):
        raise ModelError(
            f"it does not put out the sum of what experts make of the rows that {one.gate!r} "
            "reads, times weights: they may be given other rows, such as without the norm before "
            "it (let one module route: torch.nn.Sequential(norm, gate)), or rows times weights"
        )
