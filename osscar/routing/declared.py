"""Which blocks send tokens to a list of modules: declared by the user, and traced around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graph
from graph import CouplingGroup, Freeze, UnitKind
from osscar.base.errors import OptionError
from osscar.network.hooks import hooks, other_forwards
from osscar.network.modules import class_name, forward, full_name, known_of_class
from osscar.offload.on_disk import is_on_disk
from osscar.routing.routers import Call
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
