"""Mixtures whose experts are a list of modules, which the code of a block calls by number.

No module is called with tokens, their experts and weights there: the block asks a gate for logits,
chooses, and adds up what the experts make of the tokens that it gives them.  How it weighs them is
read off its outputs.  It is run with experts that put out a row of their own each, whatever they
read: what these change about the output are the weights.

While such a block is `called_as_mixtures`, it runs the rest of its code first.  Then it calls a
module that routes by the rule that was found, and its list of experts with tokens, their experts
and weights, as a block with stacked matrices does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from osscar.base.errors import ModelError
from osscar.experts.routers import Call, logits_of, tied
from osscar.network.hooks import hooks, other_forwards
from solvers import RoutingRule

MOST_TIED = 0.01
"""The share of tokens that rounding may send to other experts than their logits say."""

_ROUTER = "osscar_router"
"""What a block calls the module that routes while it is `called_as_mixtures`."""


@dataclass(frozen=True)
class ListInBlock:
    """Experts in a list, and the block whose code sends tokens to them.

    Parameters
    ----------
    block
        Its name in the model.
    gate, experts
        What the block calls the module whose logits route, and the list.
    count
        How many experts there are.
    outputs
        How many numbers they put out for a token.
    """

    block: str
    gate: str
    experts: str
    count: int
    outputs: int

    def experts_in(self, block: nn.Module) -> nn.ModuleList:
        """Return the experts of a block."""
        return cast(nn.ModuleList, block.get_submodule(self.experts))


@dataclass(frozen=True)
class ExpertList(ListInBlock):
    """Experts in a list, and how the code of their block sends tokens to them.

    Parameters
    ----------
    rule
        By which the block routes.
    bias
        What is added to scores for the choice: the name of a tensor, as the block knows it.
    """

    rule: RoutingRule
    bias: str | None

    @property
    def router(self) -> str:
        """The name of the module that routes while the block is called as a mixture is."""
        return joined(self.block, _ROUTER)

    def choice_bias(self, block: nn.Module) -> Tensor | None:
        """Return what is added to scores for the choice, (experts,) float64, if something is."""
        if self.bias is None:
            return None
        found: Tensor = attrgetter(self.bias)(block)
        return found.flatten().double()


def joined(outer: str, inner: str) -> str:
    """Return the name of what lies in a module, either of which may be the whole model."""
    return ".".join(filter(None, (outer, inner)))


def first_tensor(y: Any) -> Tensor:
    """Return the first tensor of what a block puts out, or of a call: there the sum, or tokens."""
    return next(leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor))


# ---- a block without its experts ---------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a block has put out whose experts ignore what they read, and what its gate was asked.

    Tokens are (tokens, d), logits (tokens, experts).
    """

    y: Any
    tokens: Tensor
    logits: Tensor

    @property
    def sum(self) -> Tensor:
        """The sum over experts and what is beside it, (tokens, outputs)."""
        found = first_tensor(self.y)
        if len(self.tokens) == 0 or found.numel() % len(self.tokens):
            raise ModelError(
                f"what it puts out first, {tuple(found.shape)}, has no row for each of the "
                f"{len(self.tokens)} tokens that the gate reads"
            )
        return found.reshape(len(self.tokens), -1)


def run_with(
    one: ListInBlock, block: nn.Module, own: Callable[..., Any], call: Call, rows: Tensor
) -> Run:
    """Run the code of a block, `own`, with experts that put out a row, (outputs,), each."""
    seen: list[tuple[Tensor, Tensor | None]] = []

    def put_out(row: Tensor, x: Tensor) -> Tensor:
        return row.to(x).expand(*x.shape[:-1], -1).clone()

    def note(_: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        x = first_tensor((args, kwargs)).detach()
        seen.append((x, logits_of(module, (args, kwargs), y, one.count)))

    experts = one.experts_in(block)
    mute = [(expert, partial(put_out, row)) for expert, row in zip(experts, rows, strict=True)]
    with other_forwards(mute), hooks(block, [one.gate], after=note):
        y = own(*call[0], **call[1])
    if len(seen) != 1:
        raise ModelError(f"the gate is called {len(seen)} times for the tokens of a call")
    x, logits = seen[0]
    if logits is None:
        raise ModelError(f"the gate puts out no logits of {one.count} experts")
    return Run(y, x.reshape(-1, x.shape[-1]), logits)


def silence(one: ListInBlock) -> Tensor:
    """Return rows, (experts, outputs), that add nothing to the sum over experts."""
    return torch.zeros(one.count, one.outputs)


# ---- called as a mixture -----------------------------------------------------------------


class _RuleRouter(nn.Module):
    """Routes tokens by a rule, given their logits."""

    def __init__(self, rule: RoutingRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(
        self, logits: Tensor, bias: Tensor | None = None, *, beside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, experts and weights.

        `beside` is what the sum over experts will be added to: who watches modules learns of it.
        """
        experts, weights = self.rule.route(logits.double(), None, bias)
        return logits, experts, weights.to(beside)


def sum_over(experts: nn.ModuleList, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
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

    What they compute stays the same.  Blocks that are called so already stay as they are.

    Raises
    ------
    ModelError
        When the model runs, if a block sends tokens to others than its logits say.
    """
    with ExitStack() as around:
        for one in lists:
            block = model.get_submodule(one.block)
            if _ROUTER in block._modules:
                continue
            experts = one.experts_in(block)
            block.add_module(_ROUTER, _RuleRouter(one.rule).eval())
            around.callback(block._modules.pop, _ROUTER)
            forwards = (
                (block, partial(_forward, one, block, block.forward)),
                (experts, partial(sum_over, experts)),
            )
            around.enter_context(other_forwards(forwards))
        yield


def _forward(
    one: ExpertList, block: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run the code of a block without its experts, and then call these."""
    rest = run_with(one, block, own, (args, kwargs), silence(one))
    _check_routes(one, block, own, (args, kwargs), rest)
    bias = one.choice_bias(block)
    router, experts = block.get_submodule(_ROUTER), one.experts_in(block)
    given = (rest.logits,) if bias is None else (rest.logits, bias)
    _, chosen, weights = router(*given, beside=rest.sum)
    total = experts(rest.tokens, chosen, weights)
    leaves, form = pytree.tree_flatten(rest.y)
    place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[place] = leaves[place] + total.reshape(leaves[place].shape)
    return pytree.tree_unflatten(leaves, form)


def _check_routes(
    one: ExpertList, block: nn.Module, own: Callable[..., Any], call: Call, rest: Run
) -> None:
    """Refuse tokens that the code of a block does not send as the logits say."""
    beside = rest.sum
    rows = torch.randn(one.count, one.outputs, generator=torch.Generator().manual_seed(0))
    rows *= 1 + float(beside.double().abs().mean())  # so that rounding of the rest hides nothing
    found = (run_with(one, block, own, call, rows).sum - beside).double()
    experts, weights = one.rule.route(rest.logits.double(), None, one.choice_bias(block))
    expected = (weights[:, :, None] * rows.to(weights)[experts]).sum(1)
    norm = torch.linalg.vector_norm
    allowed = torch.finfo(beside.dtype).eps ** 0.5 * (norm(expected, dim=1) + norm(beside, dim=1))
    off = ~(norm(found - expected, dim=1) <= allowed) & ~tied(rest.logits)
    if int(off.sum()) > MOST_TIED * len(off):
        raise ModelError(
            f"the code of {one.block or 'the model'!r} sends {int(off.sum())} of {len(off)} tokens "
            f"to other experts of {joined(one.block, one.experts)!r}, or with other weights, than "
            f"the logits of {one.gate!r} say: what changes them cannot be told without some "
            "experts; leave it out (--skip)"
        )
