"""Routers of mixtures of experts: by which rule they route, and routing among some experts alone.

A router is called with tokens, and returns logits of all experts, the experts that each token is
sent to, and their weights.  The published rules are tried on drawn tokens and weights, and the one
that returns the same is taken.  A model among some of its experts alone (`without_experts`) is what
a smaller model is proved against.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.groups import Role, Slot
from osscar.base.errors import ModelError
from osscar.network.hooks import InDouble, hooks
from osscar.network.modules import copied, named_tensors, tensors_in
from osscar.offload.on_disk import OnDisk, values_of
from solvers import GroupScore, RouterScores, RoutingRule, SolverError

_TOLERANCE = 1e-5
"""Of weights, in double precision: some code adds up to a millionth to what it divides by."""
_TOKENS = 256
"""On how many tokens rules are compared, at least."""
_MOST_TIED = 0.01
"""The share of tokens that rounding may send to other experts than their logits say."""

_GROUPS = r"(n|num)_(expert_)?groups?"
_OPEN_GROUPS = r"top_?k_groups?|(n|num)_(limited|open)_groups?"
"""What routers call the number of groups that experts lie in, and how many of them are open."""

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """Logits, (tokens, experts), experts and weights, (tokens, k), and possible biases by name."""

    logits: Tensor
    experts: Tensor
    weights: Tensor
    biases: Mapping[str, Tensor]


class Scores(NamedTuple):
    """What a router chooses by, in double precision."""

    logits: Tensor
    """(tokens, experts)"""
    bias: Tensor | None
    """What is added to scores, (experts,)."""


@dataclass(frozen=True)
class Router:
    """How a module routes."""

    rule: RoutingRule
    bias: str | None = None
    """What is added to scores for the choice alone: a tensor of the module, or an argument."""
    places: tuple[int, int] = (1, 2)
    """Where experts and weights are among the leaves of what it returns, if it does so."""

    def scores(self, module: nn.Module, call: Call, y: Any, count: int) -> Scores:
        """Return what a call of the module chooses among `count` experts by."""
        bias = None if self.bias is None else _biases_in(module, call, count)[self.bias].flatten()
        logits = _logits_of(module, call, y, count).double()
        return Scores(logits, None if bias is None else bias.double())

    def among(self, kept: Sequence[int], count: int, module: nn.Module, call: Call, y: Any) -> Any:
        """Return what the module would return with the experts kept alone, by their old numbers."""
        leaves, form = pytree.tree_flatten(y)
        logits, bias = self.scores(module, call, y, count)
        for place, found in zip(self.places, self.rule.route(logits, kept, bias), strict=True):
            leaves[place] = found.to(leaves[place])
        return pytree.tree_unflatten(leaves, form)


def sends_tokens(y: Any) -> bool:
    """Whether a module returns to which experts tokens go, and not logits alone."""
    return any(tensor.dtype in (torch.int64, torch.int32) for tensor in tensors_in(y))


# ---- the rule ----------------------------------------------------------------------------


@torch.no_grad()
def router_of(module: nn.Module, call: Call, count: int) -> Router:
    """Return how a module routes tokens to `count` experts, given a call of it.

    A ModelError, whose message goes on after the module's name, says that no known rule does so.
    """
    own, places = _run(_in_double(module), call, count)
    copy = _in_double(module)
    _draw_tensors([*copy.parameters(), *copy.buffers()], count)
    draws = -(-_TOKENS // max(1, len(own.logits)))
    drawn = (_drawn_call(call, count, seed) for seed in range(draws))
    rule, bias = _rule_of([own, *(_run(copy, one, count)[0] for one in drawn)], module)
    return Router(rule, bias, places)


def rule_of_function(
    route: Callable[[Tensor], tuple[Tensor, Tensor]], block: nn.Module, count: int
) -> RoutingRule:
    """Return which rule a function of logits follows; `block` may state groups and scale."""
    logits = 2 * torch.randn(_TOKENS, count, generator=torch.Generator().manual_seed(0))
    with InDouble():
        seen = _Seen(logits.double(), *route(logits.double()), {})
    return _rule_of([seen], block)[0]


def _rule_of(seen: Sequence[_Seen], holder: nn.Module) -> tuple[RoutingRule, str | None]:
    """Return the rule seen and the bias of its choice; `holder` may state groups and scale."""
    tried = 0
    for rule, bias in _candidates(holder, seen[-1]):
        same, scale = _scale(rule, bias, seen)
        tried = max(tried, same)
        if scale is not None:
            return replace(rule, scale=_stated(holder, scale)), bias
    what = "with other weights than" if tried else "to other experts than"
    raise ModelError(
        f"({type(holder).__name__}) sends tokens {what} a softmax or a sigmoid of its logits would"
    )


def _in_double(module: nn.Module) -> nn.Module:
    """Return a copy of a module in double precision, whose weights are in memory."""
    on_disk = [p for p in module.parameters() if isinstance(p, OnDisk)]
    return copied(module, {id(p): nn.Parameter(p.values().clone()) for p in on_disk}).double()


@torch.no_grad()
def _draw_tensors(tensors: Iterable[Tensor], count: int) -> None:
    """Fill tensors that have an entry for each of `count` experts with random numbers."""
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors:
        if tensor.is_floating_point() and count in (tensor.numel(), *tensor.shape):
            each = tensor.numel() // count
            size = 0.3 if each == 1 else 2 / each**0.5
            tensor.copy_(size * torch.randn(tensor.shape, generator=generator))


def _drawn_call(call: Call, count: int, seed: int) -> Call:
    """Return a call with drawn numbers in the place of its fractions, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def draw(given: Tensor) -> Tensor:
        if not given.is_floating_point():
            return given
        size = 0.3 if given.numel() == count else 1.0
        drawn = size * torch.randn(given.shape, generator=generator, dtype=torch.float64)
        return drawn.to(given.device)

    args, kwargs = pytree.tree_map_only(Tensor, draw, call)
    return args, kwargs


def _run(module: nn.Module, call: Call, count: int) -> tuple[_Seen, tuple[int, int]]:
    """Return what a router in double precision returns without its hooks, and `Router.places`."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x, call
    )
    with InDouble():
        leaves = pytree.tree_leaves(module.forward(*args, **kwargs))
    places = _places(leaves, count)
    logits = _logits_of(module, (args, kwargs), leaves, count)
    biases = _biases_in(module, (args, kwargs), count)
    experts, weights = (leaves[place] for place in places)
    return _Seen(logits, experts, weights, biases), places


def _places(leaves: Sequence[Any], count: int) -> tuple[int, int]:
    """Find experts and weights, both (tokens, k), beside logits, which may be missing."""
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    experts = [i for i, t in tensors.items() if sends_tokens(t) and t.ndim == 2]
    weights = [
        i
        for i, t in tensors.items()
        if experts and t.is_floating_point() and t.shape == tensors[experts[0]].shape
    ]
    if not len(experts) == len(weights) == 1 >= len(like_logits(leaves, count)):
        found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors.values())
        raise ModelError(
            f"returns {found or 'no tensor'}, where the logits of {count} experts, the experts "
            "of each token, and their weights are due, each once"
        )
    return experts[0], weights[0]


def _biases_in(module: nn.Module, call: Call, count: int) -> dict[str, Tensor]:
    """Return what has one number for each expert: tensors of a module, and arguments of it."""
    own = dict(named_tensors(module))
    given = pytree.tree_leaves(call)
    own |= {f"argument {i}": leaf for i, leaf in enumerate(given) if isinstance(leaf, Tensor)}
    return {n: values_of(t) for n, t in own.items() if t.is_floating_point() and t.numel() == count}


def _candidates(holder: nn.Module, seen: _Seen) -> Iterator[tuple[RoutingRule, str | None]]:
    """Yield rules of scale one, with a bias or None; groups that the module states come first."""
    numbers = [(name, v) for name, v in vars(holder).items() if type(v) is int and v > 0]
    counts = [v for name, v in numbers if re.fullmatch(_GROUPS, name)]
    opened = [v for name, v in numbers if re.fullmatch(_OPEN_GROUPS, name)]
    grouped = itertools.product(counts, opened, reversed(GroupScore))
    groupings = [one for one in grouped if 1 < one[0] >= one[1]]
    groupings.append((1, 1, GroupScore.MAX))
    biases: tuple[str | None, ...] = (None, *seen.biases)
    top_k = seen.experts.shape[1]
    for groups, bias, scores in itertools.product(groupings, biases, RouterScores):
        for normalized in (False, True):
            if not (normalized and scores is RouterScores.SOFTMAX_OF_CHOSEN):  # are already
                yield RoutingRule(top_k, scores, normalized, 1.0, *groups), bias


def _scale(rule: RoutingRule, bias: str | None, seen: Sequence[_Seen]) -> tuple[bool, float | None]:
    """Return whether a rule chooses the experts seen, and the scale of its weights, if one fits."""
    mine, theirs = [], []
    for one in seen:
        try:
            routes = rule.route(
                one.logits, None, None if bias is None else one.biases[bias].flatten()
            )
        except SolverError:  # not of so many experts
            return False, None
        clear = ~_tied(one.logits)
        found, expected = (
            (chosen.gather(1, order), weights.gather(1, order))
            for chosen, weights in (routes, (one.experts, one.weights))
            for order in [chosen.argsort(1)]
        )
        if not torch.equal(found[0][clear], expected[0][clear]):
            return False, None
        mine.append(found[1][clear])
        theirs.append(expected[1][clear])
    a, b = torch.cat(mine).flatten(), torch.cat(theirs).flatten()
    scale = float((a @ b) / (a @ a))
    fits = bool((b - scale * a).abs().max() <= _TOLERANCE * b.abs().max())
    return True, scale if fits else None


def like_logits(leaves: Sequence[Any], count: int) -> list[int]:
    """Return which leaves of what a module returns may be the logits of so many experts."""
    tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return [i for i, t in tensors if t.is_floating_point() and t.shape[-1:] == (count,)]


def _logits_of(module: nn.Module, call: Call, y: Any, count: int) -> Tensor:
    """Return the logits, (tokens, experts), of a call of a router.

    A router that returns experts and weights alone makes them of tokens times a matrix.  The
    message of a ModelError, where there are none, goes on after the router's name.
    """
    leaves = pytree.tree_leaves(y)
    places = like_logits(leaves, count)
    if len(places) == 1:
        found: Tensor = leaves[places[0]]
        return found.reshape(-1, count)
    matrices = [p for p in module.parameters() if p.ndim == 2 and len(p) == count]
    if sends_tokens(y) and len(matrices) == 1:
        W = values_of(matrices[0]).detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        for x in tensors_in(call):
            if x.is_floating_point() and x.shape[-1:] == W.shape[1:]:
                return x.detach().reshape(-1, W.shape[1]).to(W) @ W.T
    raise ModelError(
        f"returns no logits of {count} experts, and multiplies tokens with no one matrix that has "
        "a row for each of them"
    )


def misrouted(
    routes: tuple[Tensor, Tensor], weighed: Tensor, logits: Tensor, rounded: torch.dtype
) -> int:
    """Return how many tokens are sent otherwise than a rule says; 0 where rounding may do so.

    `routes` are experts and weights by the rule, (tokens, k).  `weighed` is the weight that each
    expert has, in the number format `rounded`, and `logits` are by what it is chosen, (tokens,
    experts).
    """
    expected = torch.zeros_like(weighed).scatter(1, routes[0], routes[1].to(weighed))
    allowed = torch.finfo(rounded).eps ** 0.5 * expected.amax(1)
    return beyond_ties(~((weighed - expected).abs().amax(1) <= allowed), logits)


def beyond_ties(off: Tensor, logits: Tensor) -> int:
    """Return how many tokens without ties are `off`, or 0 where rounding may make so many so."""
    off = off & ~_tied(logits)  # as those of padding may be, which is all zero
    return int(off.sum()) if int(off.sum()) > _MOST_TIED * len(off) else 0


def _tied(logits: Tensor) -> Tensor:
    """Tell the tokens, (tokens,) bool, that have the same logit twice."""
    return (logits.sort(1).values.diff(dim=1) == 0).any(1)


def _stated(holder: nn.Module, scale: float) -> float:
    """Return a scale as an attribute of the router has it, which rounding has not touched."""
    stated = (float(v) for v in vars(holder).values() if type(v) in (int, float))
    found = [1.0, *stated]
    near = [v for v in found if abs(v - scale) <= _TOLERANCE * abs(scale)]
    return min(near, key=lambda v: abs(v - scale), default=scale)


# ---- among some experts alone -------------------------------------------------------------


@contextmanager
def without_experts(
    model: nn.Module, staying: Iterable[tuple[Sequence[Slot], Sequence[int]]]
) -> Iterator[None]:
    """Let no token be sent to experts that leave while the block runs.

    `staying` has the slots of each mixture and the experts that stay.  Biases beside a router are
    at minus infinity, too.  A router that follows no known rule, or cannot do without these
    experts, raises a ModelError when the model runs.
    """
    planned = {
        next(slot.module for slot in slots if slot.role is Role.PRODUCER): (slots, kept)
        for slots, kept in staying
    }
    found: dict[str, Router] = {}
    before: list[tuple[Tensor, Tensor]] = []

    def reroute(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        (slots, kept), call = planned[name], (args, kwargs)
        count = slots[0].units
        if not sends_tokens(y):
            return _without_logits(y, count, _gone(count, kept))
        if name not in found:
            found[name] = router_of(module, call, count)
        try:
            return found[name].among(kept, count, module, call, y)
        except SolverError as error:
            raise ModelError(f"the router {name!r} cannot keep these experts: {error}") from error

    try:
        for router, (slots, kept) in planned.items():
            for slot in slots:
                own = attrgetter(slot.tensor)(model)
                beside = slot.role is Role.PASS_THROUGH and slot.module != router
                if beside and own.is_floating_point():
                    before.append((own.detach(), own.detach().clone()))
                    gone = torch.tensor(_gone(slot.units, kept), device=own.device)
                    own.detach().index_fill_(slot.dim, gone, -torch.inf)
        with hooks(model, planned, after=reroute):
            yield
    finally:
        for own, values in reversed(before):
            own.copy_(values)


def _gone(count: int, kept: Sequence[int]) -> list[int]:
    return sorted({*range(count)} - {*kept})


def _without_logits(y: Any, count: int, gone: list[int]) -> Any:
    """Return what a gate returns, with the logits of experts that leave at minus infinity."""
    leaves, form = pytree.tree_flatten(y)
    (place,) = like_logits(leaves, count)
    leaves[place] = leaves[place].clone()
    leaves[place][..., gone] = -torch.inf
    return pytree.tree_unflatten(leaves, form)
