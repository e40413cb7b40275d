"""Mixtures whose experts are a list of modules, which the code of a block calls by number.

The block asks a gate for logits, chooses, and adds up what the experts make of the tokens that it
gives them.  Their weights are read off its outputs: it is run with experts that each put out a row
of their own, whatever they read.  The rule by which it routes is found so, on drawn numbers, and
each call is held to it.

While such a block is `called_as_mixtures`, it runs the rest of its code first.  Then it calls a
module that routes by the rule that was found, and its list of experts with tokens, their experts
and weights, as a block with stacked matrices does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree as pytree

from osscar.base.errors import ModelError, first_line
from osscar.base.memory import attempt
from osscar.network.hooks import InDouble, hooks, other_forwards
from osscar.network.modules import copied, tensors_in
from osscar.routing.declared import Declaration, joined
from osscar.routing.routers import (
    TOKENS,
    Call,
    SeenRoutes,
    biases_in,
    draw_tensors,
    drawn_call,
    logits_of,
    misrouted,
    rule_of,
)
from solvers import RoutingRule

_NOTHING = 1e-10
"""The share of a token's largest weight, in double precision, below which others are none."""

_ROUTER = "osscar_router"
"""What a block calls the module that routes while it is `called_as_mixtures`."""


@dataclass(frozen=True)
class ExpertList:
    """Experts in a list, and how the code of their block sends tokens to them."""

    block: str
    """Its name in the model."""
    declared: Declaration
    """What the block calls its gate and the list."""
    count: int
    """How many experts there are."""
    outputs: int
    """How many numbers they put out for a token."""
    rule: RoutingRule | None = None
    """By which the block routes; None until it is found."""
    bias: str | None = None
    """What is added to scores for the choice: the name of a tensor, as the block knows it."""

    @property
    def router(self) -> str:
        """The name of the module that routes while the block is called as a mixture is."""
        return joined(self.block, _ROUTER)

    def experts_in(self, block: nn.Module) -> nn.ModuleList:
        """Return the experts of a block."""
        return cast(nn.ModuleList, block.get_submodule(self.declared.experts))


def first_tensor(y: Any) -> Tensor:
    """Return the first tensor of what a block puts out, or of a call: there the sum, or tokens."""
    return tensors_in(y)[0]


# ---- a block without its experts ---------------------------------------------------------


class _Run(NamedTuple):
    """What a block has put out whose experts ignore what they read, and what its gate was asked."""

    y: Any
    sum: Tensor
    """The sum over experts and what is beside it, (tokens, outputs)."""
    tokens: Tensor
    """(tokens, d)"""
    logits: Tensor
    """(tokens, experts)"""


def _run_with(
    one: ExpertList, block: nn.Module, own: Callable[..., Any], call: Call, rows: Tensor
) -> _Run:
    """Run the code of a block, `own`, with experts that put out a row, (outputs,), each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def put_out(row: Tensor, x: Tensor) -> Tensor:
        return row.to(x).expand(*x.shape[:-1], -1).clone()

    def note(_: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        try:
            logits = logits_of(module, (args, kwargs), y, one.count)
        except ModelError as error:
            raise ModelError(f"the gate {error}") from error
        seen.append((first_tensor((args, kwargs)).detach(), logits))

    experts = one.experts_in(block)
    mute = [(expert, partial(put_out, row)) for expert, row in zip(experts, rows, strict=True)]
    with other_forwards(mute), hooks(block, [one.declared.gate], after=note):
        y = own(*call[0], **call[1])
    if len(seen) != 1:
        raise ModelError(f"the gate is called {len(seen)} times in a call of the block, not once")
    x, logits = seen[0]
    tokens, total = x.reshape(-1, x.shape[-1]), first_tensor(y)
    if len(tokens) == 0 or total.numel() % len(tokens):
        raise ModelError(
            f"what it puts out first, {tuple(total.shape)}, has no row for each of the "
            f"{len(tokens)} tokens that the gate reads"
        )
    return _Run(y, total.reshape(len(tokens), -1), tokens, logits)


def _weighed(
    one: ExpertList, block: nn.Module, own: Callable[..., Any], call: Call
) -> tuple[_Run, Tensor, float]:
    """Run the code of a block without its experts, and return also how it would weigh them.

    Weights are (tokens, experts), in double precision.  Experts put out multiples of unit vectors,
    as many at a time as there are of these, and so large that rounding of the rest hides nothing;
    how large comes last.
    """
    silent = torch.zeros(one.count, one.outputs)
    rest = _run_with(one, block, own, call, silent)
    size = 2.0 ** math.ceil(math.log2(1 + float(rest.sum.double().abs().mean())))
    found = []
    for start in range(0, one.count, one.outputs):
        some = torch.arange(min(one.outputs, one.count - start))
        rows = silent.clone()
        rows[start + some, some] = size
        changed = _run_with(one, block, own, call, rows).sum - rest.sum
        found.append(changed[:, : len(some)].double() / size)
    return rest, torch.cat(found, 1), size


# ---- whether a declaration holds, and by which rule --------------------------------------


def expert_list(
    model: nn.Module, block: str, declared: Declaration, calls: Sequence[tuple[Call, Any]]
) -> tuple[ExpertList, Tensor]:
    """Return how a declared block sends tokens to its experts, and the tokens of its call.

    A declaration that does not hold is a ModelError, and so are experts that could not leave.
    """
    with attempt() as tried:  # code of anyone's, which may not take other experts
        return _expert_list(model.get_submodule(block), block, declared, calls)
    found = str(tried.error)
    if not isinstance(tried.error, ModelError):
        found = (
            "its code fails with experts that put out drawn numbers, or on drawn tokens: "
            f"{first_line(tried.error)}"
        )
    raise ModelError(f"{declared} does not fit {block or 'the model'!r}: {found}")


def _expert_list(
    own: nn.Module, block: str, declared: Declaration, calls: Sequence[tuple[Call, Any]]
) -> tuple[ExpertList, Tensor]:
    for name in (declared.gate, declared.experts):
        if name not in dict(own.named_modules()):
            there = ", ".join(repr(child) for child, _ in own.named_children())
            raise ModelError(f"it has no module {name!r}, and has {there or 'none'}")
    experts = own.get_submodule(declared.experts)
    if not isinstance(experts, nn.ModuleList):
        raise ModelError(
            f"{declared.experts!r} is a {type(experts).__name__}; experts leave from a "
            "torch.nn.ModuleList that the code calls by number"
        )
    if not alike(experts):
        raise ModelError(
            f"the modules of {declared.experts!r} are not several of the same structure and "
            "shapes, or share tensors: only experts that are alike can leave as a whole"
        )
    if len(calls) != 1:
        raise ModelError(
            f"it is called {len(calls)} times in a forward pass, and experts can be removed only "
            "from a block that is called once; give each call a block of its own"
        )
    ((call, y),) = calls
    one = ExpertList(block, declared, len(experts), first_tensor(y).shape[-1])
    tokens = _run_with(one, own, own.forward, call, torch.zeros(one.count, one.outputs)).tokens
    rule, bias = _rule_of_block(one, own, call, len(tokens))
    one = replace(one, rule=rule, bias=bias)
    _check_sum(own, one, call)
    return one, tokens


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


def _rule_of_block(
    one: ExpertList, block: nn.Module, call: Call, tokens: int
) -> tuple[RoutingRule, str | None]:
    """Return by which rule tokens are sent to a list, and the name of the bias of the choice."""
    copy = _drawn_copy(one, block)
    draws = range(-(-TOKENS // tokens))
    seen = [_seen(one, copy, drawn_call(call, one.count, seed)) for seed in draws]
    if seen[0].experts.shape[1] == one.count:
        raise ModelError(
            f"every token is sent to all {one.count} experts, or more is done with what they put "
            "out than to add it up, so that none can leave"
        )
    try:
        return rule_of(seen, [copy.get_submodule(one.declared.gate), copy])
    except ModelError as error:
        raise ModelError(f"its code with the gate {error}") from error


def _drawn_copy(one: ExpertList, block: nn.Module) -> nn.Module:
    """Return a copy of a block in double precision that routes by drawn numbers.

    Its experts have no weights.
    """
    blank = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in one.experts_in(block).parameters()
    }
    copy = copied(block, blank).double()
    gate = copy.get_submodule(one.declared.gate)
    own = (*copy.parameters(recurse=False), *copy.buffers(recurse=False))
    biases = [tensor for tensor in own if tensor.numel() == one.count]
    draw_tensors([*gate.parameters(), *gate.buffers(), *biases], one.count)
    return copy


def _seen(one: ExpertList, copy: nn.Module, call: Call) -> SeenRoutes:
    """Return how a copy of a block routes the tokens of a call."""
    with InDouble():
        rest, weights, _ = _weighed(one, copy, copy.forward, call)
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
    own = biases_in(copy, ((), {}), one.count).items()
    biases = {n: t for n, t in own if "." not in n or n.startswith(f"{one.declared.gate}.")}
    return SeenRoutes(rest.logits, experts, weights.gather(1, experts), biases)


def _check_sum(block: nn.Module, one: ExpertList, call: Call) -> None:
    """Refuse a block that does not put out the sum over experts of what they make of the tokens."""
    args, kwargs = call
    expected = first_tensor(block.forward(*args, **kwargs)).double()
    with called_as_mixtures(block, [replace(one, block="")]):
        found = first_tensor(block.forward(*args, **kwargs))
    error, size = (torch.linalg.vector_norm(y) for y in (found.double() - expected, expected))
    if not bool(error <= torch.finfo(found.dtype).eps ** 0.5 * size):
        raise ModelError(
            "it does not put out the sum of what experts make of the rows that "
            f"{one.declared.gate!r} reads, times weights: they may be given other rows, such as "
            "without the norm before it (let one module route: torch.nn.Sequential(norm, gate)), "
            "or rows times weights"
        )


# ---- called as a mixture -----------------------------------------------------------------


class _RuleRouter(nn.Module):
    """Puts out logits, experts and weights; who watches modules learns of them.

    `beside` is what the sum over experts will be added to.
    """

    def forward(
        self, logits: Tensor, bias: Tensor | None, routes: tuple[Tensor, Tensor], beside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return logits, routes[0], routes[1].to(beside)


def _sum_over(experts: nn.ModuleList, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over experts, a list of modules, of what they make of tokens, times weights.

    The arguments behind the list are those of `Routed`.
    """
    parts = [
        (token, expert(hidden[token]) * weights[token, place, None])
        for number, expert in enumerate(experts)
        for token, place in [(chosen == number).nonzero(as_tuple=True)]
        if len(token)
    ]
    outputs = parts[0][1].shape[1] if parts else hidden.shape[1]
    y = hidden.new_zeros(len(hidden), outputs)
    for token, part in parts:
        y.index_add_(0, token, part.to(y))
    return y


@contextmanager
def called_as_mixtures(model: nn.Module, lists: Iterable[ExpertList]) -> Iterator[None]:
    """Let blocks call lists of experts with tokens, their experts and weights, in the block.

    What they compute stays the same.  A block that sends tokens to other experts than its logits
    say raises a ModelError when it runs.
    """
    with ExitStack() as around:
        for one in lists:
            block = model.get_submodule(one.block)
            experts = one.experts_in(block)
            block.add_module(_ROUTER, _RuleRouter().eval())
            around.callback(block._modules.pop, _ROUTER)
            forwards = (
                (block, partial(_forward, one, block, block.forward)),
                (experts, partial(_sum_over, experts)),
            )
            around.enter_context(other_forwards(forwards))
        yield


def _forward(
    one: ExpertList, block: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run the code of a block without its experts, and then call these."""
    rest, weighed, size = _weighed(one, block, own, (args, kwargs))
    assert one.rule is not None
    bias = None if one.bias is None else attrgetter(one.bias)(block).flatten().double()
    routes = one.rule.route(rest.logits.double(), None, bias)
    beside = rest.sum.double().abs().amax(1) / size
    off = misrouted(routes, weighed, rest.logits, rest.sum.dtype, beside)
    if off:
        raise ModelError(
            f"the code of {one.block or 'the model'!r} sends {off} of {len(weighed)} tokens to "
            f"other experts of {joined(one.block, one.declared.experts)!r}, or with other weights, "
            f"than the logits of {one.declared.gate!r} say: what changes them is not known with "
            "fewer experts; leave it out (skip, `--skip`)"
        )
    _, chosen, weights = block.get_submodule(_ROUTER)(rest.logits, bias, routes, rest.sum)
    total = one.experts_in(block)(rest.tokens, chosen, weights)
    leaves, form = pytree.tree_flatten(rest.y)
    place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[place] = leaves[place] + total.reshape(leaves[place].shape)
    return pytree.tree_unflatten(leaves, form)
