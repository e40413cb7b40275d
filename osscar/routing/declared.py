"""Mixtures whose experts are a list of modules: declared, traced around, and called as mixtures.

While a declared block is `called_as_mixtures`, its code runs with experts that return zeros, which
leaves what else is in its outputs.  Its list of experts is then called with tokens, experts and
weights, by the routes of its declaration, which is compared with what the block returns by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree as pytree

import graph
from graph import CouplingGroup, Freeze, UnitKind
from osscar.base.errors import ModelError, OptionError, first_line
from osscar.base.memory import attempt
from osscar.network.hooks import hooks, other_forwards
from osscar.network.modules import class_name, forward, full_name, known_of_class, tensors_in
from osscar.offload.on_disk import is_on_disk
from osscar.routing.routers import (
    Call,
    Router,
    beyond_ties,
    router_of,
    rule_of_function,
    sends_tokens,
)
from solvers import RouterScores, RoutingRule

_Class = TypeVar("_Class", bound=type[nn.Module])


Route: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Makes logits, (tokens, experts), into experts and weights, (tokens, k)."""


@dataclass(frozen=True)
class Declaration:
    """What a user says of a class of blocks: its gate, its list, and how logits become routes."""

    kind: str
    gate: str
    experts: str
    rule: RoutingRule | None = None
    bias: str | None = None
    """What the rule adds to the scores for the choice: the name of a tensor of the block."""
    route: Route | None = None

    def __str__(self) -> str:
        return f"osscar.mixture({self.kind!r}, gate={self.gate!r}, experts={self.experts!r}, ...)"


_DECLARED: dict[str, Declaration] = {}


def mixture(
    *classes: type[nn.Module] | str,
    gate: str,
    experts: str,
    top_k: int | None = None,
    normalize: bool = False,
    scores: str = "softmax",
    scale: float = 1.0,
    bias: str | None = None,
    route: Route | None = None,
) -> Callable[[_Class], _Class]:
    """Declare classes of mixture blocks whose experts are a list of modules.

    A block asks its gate for the logits of all experts, calls some of them with rows of tokens,
    and returns the sum of what they make of these, times weights; the sum may stand in other
    terms, and it is the first tensor that is returned.  A declaration is compared with what blocks
    return, on an example when experts are looked for and on all calibration data when some are to
    leave.  Experts whose matrices are stacked in one parameter, as in transformers, need none.

    Parameters
    ----------
    classes
        Classes, or their full names such as ``"package.module.Block"``, which spare an import.
        Subclasses are covered too.
    gate, experts
        What a block calls the module that returns logits, and the `torch.nn.ModuleList`.
    top_k
        To how many experts a token is sent: those with the largest scores, which are their weights.
        A gate that returns numbers and weights of experts itself needs neither this nor what
        follows.
    normalize
        Whether weights are divided by their sum.
    scores
        What logits are made into, a value of `solvers.RouterScores`: ``"softmax"``, ``"sigmoid"``,
        or ``"softmax of chosen"``, of the largest logits alone.
    scale
        What weights are multiplied by, last.
    bias
        The name of a tensor of the block, (experts,), that is added to scores for the choice alone.
    route
        In the place of `top_k` and what follows: a function of the logits, (tokens, experts), that
        returns the numbers of experts and their weights, (tokens, k) each.  It is tried on drawn
        logits, and has to follow a `solvers.RoutingRule`, as which experts are missed least is
        computed by its formula.

    Returns
    -------
    A decorator of a class, which is declared as well.

    Raises
    ------
    OptionError
        If a class is not one of modules, or both `top_k` and `route` are given.
    ValueError
        If `scores` is none of these.

    Examples
    --------
    >>> import osscar
    >>> _ = osscar.mixture("mylib.Block", gate="router", experts="ffns", top_k=2, normalize=True)
    """
    if route is not None and top_k is not None:
        raise OptionError(f"top_k is {top_k}, and route is given, too; give one of them")
    rule = None
    if top_k is not None:
        rule = RoutingRule(top_k, RouterScores(scores), normalize, scale)

    def declare(kind: _Class | str) -> _Class | str:
        name = class_name(kind, "a mixture is")
        _DECLARED[name] = Declaration(name, gate, experts, rule, bias, route)
        return kind

    for one in classes:
        declare(one)
    return cast("Callable[[_Class], _Class]", declare)


# ---- declared blocks of a model ----------------------------------------------------------


def declared_in(model: nn.Module) -> dict[str, Declaration]:
    """Return the declarations of those modules that have one, by name."""
    found = ((name, known_of_class(module, _DECLARED)) for name, module in model.named_modules())
    return {name: declared for name, declared in found if declared is not None}


def undeclared(model: nn.Module, experts: str) -> str:
    """Return how to declare the block that a list of modules lies in, as the end of a sentence."""
    if not isinstance(model.get_submodule(experts), nn.ModuleList):
        return ""
    block, _, attribute = experts.rpartition(".")
    declared = Declaration(full_name(type(model.get_submodule(block))), "...", attribute)
    return f"; if code sends tokens to the modules of {experts!r}, declare it: {declared}"


def joined(outer: str, inner: str) -> str:
    """Return the name of what lies in a module, either of which may be the whole model."""
    return ".".join(filter(None, (outer, inner)))


def is_named(name: str) -> bool:
    """Whether a module has the name of a mixture; others are found by how they are called."""
    return name.rpartition(".")[2] == "experts"


def calls_of(
    model: nn.Module, example: Mapping[str, Any], names: Sequence[str]
) -> dict[str, list[tuple[Call, Any]]]:
    """Run a model, and return the calls of some modules, with what they return."""
    found: dict[str, list[tuple[Call, Any]]] = {name: [] for name in names}

    def look(name: str, _: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        found[name].append(((args, kwargs), y))

    with hooks(model, names, after=look):
        forward(model, example)
    return found


# ---- traced around -----------------------------------------------------------------------

_OPAQUE = (
    "it enters {!r}, whose code gives experts the tokens that are sent to them: shapes depend on "
    "values there, so that it cannot be traced"
)
_SENT = (
    "belongs to experts that the code of {!r} gives the tokens that are sent to them: shapes "
    "depend on values there, so that it cannot be traced; whole experts may leave (experts=)"
)


def traced_around(
    model: nn.Module, example: Mapping[str, Any], small: Mapping[str, Any], error: graph.TraceError
) -> tuple[graph.DependencyGraph, tuple[CouplingGroup, ...]]:
    """Trace a model around its declared blocks, or raise the error of the plain trace."""
    blocks = {} if is_on_disk(model) else declared_in(model)
    if not blocks:
        lists = [name for name, _ in model.named_modules() if is_named(name)]
        advice = "".join(undeclared(model, name) for name in lists[:1])
        raise graph.TraceError(error.reason, error.module, error.hint + advice) from error

    def depends_on_inputs(y: Any, *args: Any, **kwargs: Any) -> Any:
        """Put out the shapes of y; the numbers depend on all inputs of the block."""
        leaves = pytree.tree_leaves((args, kwargs))
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        total = sum(leaf.sum() for leaf in read)
        return pytree.tree_map_only(
            Tensor, lambda leaf: (read[0].new_zeros(leaf.shape) + total).to(leaf.dtype), y
        )

    calls = calls_of(model, example, list(blocks))
    with other_forwards(
        (model.get_submodule(name), partial(depends_on_inputs, y))
        for name, [(_, y), *_] in calls.items()
    ):
        traced = graph.trace(model, small, opaque=list(blocks))
    groups = tuple(
        replace(
            group,
            frozen=tuple(
                replace(freeze, reason=_OPAQUE.format(freeze.module or "the model"))
                if freeze.module in blocks
                else freeze
                for freeze in group.frozen
            ),
        )
        for group in traced.groups
    )
    untraced = (
        CouplingGroup(
            f"{joined(block, declared.experts)}.neurons", UnitKind.NEURONS, 1, (), 0,
            (Freeze(_SENT.format(block or "the model"), "", block),),
        )
        for block, declared in blocks.items()
    )  # fmt: skip
    return replace(traced, groups=groups), tuple(untraced)


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
        check_called_once("the block", len(calls))
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


def check_called_once(what: str, calls: int) -> None:
    """Refuse experts that several calls share (ModelError)."""
    if calls != 1:
        raise ModelError(
            f"{what} is called {calls} times in a forward pass, so its experts cannot be removed; "
            "give each call a block of its own"
        )


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
