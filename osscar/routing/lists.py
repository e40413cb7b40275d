"""Mixtures whose experts are a list of modules, which the code of a block calls by number.

While such a block is `called_as_mixtures`, its code runs with experts that return zeros, which
leaves what else is in its outputs.  Its list of experts is then called with tokens, experts and
weights, by the routes of its declaration, which is compared with what the block returns by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree as pytree

from osscar.base.errors import ModelError, first_line
from osscar.base.memory import attempt
from osscar.network.hooks import hooks, other_forwards
from osscar.network.modules import tensors_in
from osscar.routing.declared import Declaration, joined
from osscar.routing.routers import (
    Call,
    Router,
    beyond_ties,
    router_of,
    rule_of_function,
    sends_tokens,
)

_ROUTER = "osscar_router"
"""What a block calls the module that routes while it is `called_as_mixtures`."""


@dataclass(frozen=True)
class ExpertList:
    """Experts in a list, and how the code of their block sends tokens to them."""

    block: str
    """Its name in the model."""
    declared: Declaration
    count: int
    """How many experts there are."""
    outputs: int
    """How many numbers they return for a token."""
    gate: Router
    """What its gate is read by."""

    @property
    def router(self) -> str:
        """The name of the module that routes while the block is called as a mixture is."""
        return joined(self.block, _ROUTER)

    @property
    def routing(self) -> Router:
        """How that module routes."""
        biased = self.gate.bias is not None or self.declared.bias is not None
        return Router(self.gate.rule, "argument 1" if biased else None)


# ---- a block without its experts ---------------------------------------------------------


class _Rest(NamedTuple):
    """What a block returns whose experts return zeros, and the call of its gate."""

    y: Any
    sum: Tensor
    """What the sum over experts is added to, (tokens, outputs)."""
    tokens: Tensor
    """(tokens, d)"""
    call: Call
    routed: Any
    """What the gate returns."""


def _without_experts(
    declared: Declaration, block: nn.Module, own: Callable[..., Any], call: Call, outputs: int
) -> _Rest:
    """Run the code of a block, `own`, with experts that return zeros."""
    seen: list[tuple[Call, Any]] = []

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], outputs)

    def note(_: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        seen.append(((args, kwargs), y))

    experts = block.get_submodule(declared.experts).children()
    with (
        other_forwards((expert, zeros) for expert in experts),
        hooks(block, [declared.gate], after=note),
    ):
        y = own(*call[0], **call[1])
    if len(seen) != 1:
        raise ModelError(f"the gate is called {len(seen)} times in a call of the block, not once")
    [(gated, routed)] = seen
    x = tensors_in(gated)[0].detach()
    return _Rest(
        y, tensors_in(y)[0].reshape(-1, outputs), x.reshape(-1, x.shape[-1]), gated, routed
    )


# ---- whether a declaration holds ---------------------------------------------------------


def expert_list(
    model: nn.Module, block: str, declared: Declaration, calls: Sequence[tuple[Call, Any]]
) -> tuple[ExpertList, Tensor]:
    """Return how a declared block sends tokens to its experts, and the tokens of its call.

    A declaration that does not hold is a ModelError, and so are experts that could not leave.
    """
    with attempt() as tried:  # code of anyone's, which may not take experts that return zeros
        own = model.get_submodule(block)
        experts = own.get_submodule(declared.experts)
        if not alike(experts):
            raise ModelError(
                f"{declared.experts!r} ({type(experts).__name__}) is no torch.nn.ModuleList of "
                "several modules with the same structure and shapes, and no shared tensors"
            )
        if len(calls) != 1:
            raise ModelError(
                f"the block is called {len(calls)} times in a forward pass, so its experts cannot "
                "be removed; give each call a block of its own"
            )
        ((call, y),) = calls
        outputs = tensors_in(y)[0].shape[-1]
        rest = _without_experts(declared, own, own.forward, call, outputs)
        count = len(list(experts.children()))
        one = ExpertList(block, declared, count, outputs, _gate(own, declared, rest, count))
        with called_as_mixtures(model, [one], checked=True):
            own.forward(*call[0], **call[1])
        return one, rest.tokens
    raise ModelError(
        f"{declared} does not fit {block or 'the model'!r}: {first_line(tried.error)}"
    ) from tried.error


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


def _gate(block: nn.Module, declared: Declaration, rest: _Rest, count: int) -> Router:
    """Return by which rule the gate of a block routes, and where it has the bias of the choice."""
    if declared.rule is not None:
        return Router(declared.rule)
    if declared.route is not None:
        return Router(rule_of_function(declared.route, block, count))
    if not sends_tokens(rest.routed):
        raise ModelError(
            f"{declared.gate!r} returns logits, and it is not declared how they become weights of "
            "experts; give top_k=, with normalize= and the like, or route="
        )
    try:
        return router_of(block.get_submodule(declared.gate), rest.call, count)
    except ModelError as error:
        raise ModelError(f"the gate {error}") from error


# ---- called as a mixture -----------------------------------------------------------------


class _RuleRouter(nn.Module):
    """Puts out logits, experts and weights; who watches modules learns of them."""

    def forward(
        self, logits: Tensor, bias: Tensor | None, experts: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return logits, experts, weights


def _sum_over(experts: nn.ModuleList, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over a list of experts of what they make of tokens, times weights."""
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
def called_as_mixtures(
    model: nn.Module, lists: Iterable[ExpertList], *, checked: bool = False
) -> Iterator[None]:
    """Let blocks call lists of experts with tokens, their experts and weights, in the block.

    With `checked`, each call that differs from what the block returns by itself is a ModelError.
    """
    with ExitStack() as around:
        for one in lists:
            block = model.get_submodule(one.block)
            experts = cast(nn.ModuleList, block.get_submodule(one.declared.experts))
            block.add_module(_ROUTER, _RuleRouter().eval())
            around.callback(block._modules.pop, _ROUTER)
            forwards = (
                (block, partial(_forward, one, block, block.forward, checked)),
                (experts, partial(_sum_over, experts)),
            )
            around.enter_context(other_forwards(forwards))
        yield


def _forward(
    one: ExpertList,
    block: nn.Module,
    own: Callable[..., Any],
    checked: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the code of a block without its experts, and then call these."""
    declared = one.declared
    experts = cast(nn.ModuleList, block.get_submodule(declared.experts))
    rest = _without_experts(declared, block, own, (args, kwargs), one.outputs)
    gate = block.get_submodule(declared.gate)
    logits, bias = one.gate.scores(gate, rest.call, rest.routed, one.count)
    if declared.bias is not None:
        bias = attrgetter(declared.bias)(block).flatten().double()
    chosen, weights = one.gate.rule.route(logits, None, bias)
    routes = chosen, weights.to(rest.sum)
    if checked:
        due = tensors_in(own(*args, **kwargs))[0].reshape(rest.sum.shape)
        _hold(one, rest.sum, _sum_over(experts, rest.tokens, *routes), due, logits)
    _, chosen, weights = block.get_submodule(_ROUTER)(logits, bias, *routes)
    total = experts(rest.tokens, chosen, weights)
    leaves, form = pytree.tree_flatten(rest.y)
    place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[place] = leaves[place] + total.reshape(leaves[place].shape)
    return pytree.tree_unflatten(leaves, form)


def _hold(one: ExpertList, rest: Tensor, total: Tensor, due: Tensor, logits: Tensor) -> None:
    """Refuse a block that does not return what is beside its experts plus the sum over these.

    All are (tokens, outputs).  Rounding may move a token by the root of the rounding unit for the
    size of the sum, and by some units of the rest; routers round to float32 in any case.
    """
    eps = max(torch.finfo(kind).eps for kind in (total.dtype, torch.float32))
    error = (rest.double() + total.double() - due.double()).abs().amax(1)
    allowed = eps**0.5 * total.double().abs().max() + 8 * eps * rest.double().abs().amax(1)
    off = beyond_ties(~(error <= allowed), logits)
    if off:
        raise ModelError(
            f"{off} of {len(due)} outputs of {one.block or 'the model'!r} differ from its "
            f"declaration: they are not the weighted sum of {one.declared.experts!r} on the rows "
            f"that {one.declared.gate!r} reads. Declare the rule of its code, declare a norm and "
            "the gate as one module (torch.nn.Sequential(norm, gate)), or, if a gate rounds its "
            "logits, use dtype float32 (`--dtype float32`)"
        )
