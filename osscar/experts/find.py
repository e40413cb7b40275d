"""Whole experts of mixtures as groups: what belongs to each, and whether they can leave.

A mixture is a module that is called with tokens, their experts and weights (`routing.Routed`), and
a router, which put these out.  Of both, an expert owns its entry in every dimension that is as long
as there are experts.  Experts may leave where that is seen to be all: the router follows a rule
that is known (`osscar.experts.routers`), with all experts and with fewer; what the mixture puts
out is the sum over experts; and with fewer experts it is the sum over these.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.groups import CouplingGroup, Freeze, Role, Slot, UnitKind
from osscar.base.errors import ModelError, OsscarError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.experts.declared import (
    alike,
    calls_of,
    declared_in,
    expert_list,
    is_named,
    list_slots,
    plan_of,
    router_slots,
    slots_in,
    tensors_of,
    trial_experts,
    undeclared,
)
from osscar.experts.last_layers import last_layers
from osscar.experts.lists import ExpertList, joined
from osscar.experts.routers import (
    TOLERANCE,
    Call,
    Places,
    Router,
    by_expert,
    draw_tensors,
    drawn_call,
    in_double,
    router_of,
)
from osscar.network.double import InDouble
from osscar.network.hooks import hooks
from osscar.network.model_state import restored
from osscar.network.modules import count_parameters, forward
from osscar.preparation.prepare import Prepared
from osscar.preparation.routing import Routed
from osscar.proof.plan import PruningPlan
from osscar.proof.structural import DensePrograms
from osscar.shrinking.follow import is_list
from osscar.shrinking.shrink import rehearse
from osscar.shrinking.slice import slice_units

_NOT_ROUTED = (
    "module {!r} ({}) is not called with tokens, the experts of each, and their weights, so that "
    "no router is known that could do without some experts"
)
_NO_ROUTER = (
    "no module put out the experts and weights that {!r} is called with: code of the module around "
    "it routes, and only a router that is a module can be told which experts are left"
)
_NO_SUM = "module {!r} ({}) does not put out the sum over experts, times their weights"
_TOO_FEW = "every token is sent to all {} experts of {!r}, so that none can leave"
_DIFFERENT = (
    "{!r} ({}) does not compute with fewer experts what it computes among these: it keeps more of "
    "them than tensors with an entry for each"
)

_SHARED = "{!r} or its router has tensors in common with another mixture"
_TWICE = (
    "{!r} is called {} times in a pass, each with other tokens: only one that is called once can "
    "do without some experts; give each call a block of its own"
)


@dataclass(frozen=True, eq=False)
class ExpertMixture:
    """The experts of a mixture as a group, and how tokens are sent to them.

    Parameters
    ----------
    group
        Of kind experts; frozen where they cannot leave.
    experts
        The name of the module that is called with what is `Routed`.
    router
        The name of the module that routes; empty where none is known.
    routing
        How it does; None where the group is frozen.
    listed
        Where the experts are a list of modules that the code of a block calls: how it does.
        `experts` and `router` are called while it is `called_as_mixtures`.
    last_layer
        Where the experts are a list of modules: the name in each of them of the linear layer that
        puts out what the expert does, if there is one.
    """

    group: CouplingGroup
    experts: str
    router: str = ""
    routing: Router | None = None
    listed: ExpertList | None = None
    last_layer: str | None = None

    @property
    def holders(self) -> tuple[str, ...]:
        """The names of the modules that hold its tensors."""
        router = self.router if self.listed is None else self.listed.gate
        return tuple(filter(None, (self.experts, router)))


@dataclass(frozen=True, eq=False)
class _Found:
    """A call of a mixture, and the last call before it that put out its experts and weights."""

    experts: str
    x: Routed
    y: Tensor
    router: str | None
    call: Call = ((), {})
    leaves: Sequence[Any] = ()
    calls: int = 1


@torch.no_grad()
def mixtures_in(model: nn.Module, example: Mapping[str, Any]) -> tuple[ExpertMixture, ...]:
    """Run a model in evaluation mode, and return its mixtures of experts, in its own order.

    Raises
    ------
    ModelError
        If a block that is declared to send tokens to a list of modules does not.
    """
    declared = declared_in(model)
    lists = {joined(block, told.experts): block for block, told in declared.items()}
    names = [
        name
        for name, module in model.named_modules()
        if name in lists or _may_be_mixture(name, module)
    ]
    names += [name for name in lists if name not in names]  # which their blocks do not have
    found = _calls(model, example, names) if names else {}
    calls = calls_of(model, example, list(declared)) if lists.keys() - found.keys() else {}
    each = []
    for order, name in enumerate(names):
        if name in found:
            each.append(_mixture(model, name, found[name], order))
        elif name in lists:
            one, tokens = expert_list(model, lists[name], declared[lists[name]], calls[lists[name]])
            each.append(_listed(model, one, tokens, order))
        elif is_named(name):
            reason = _NOT_ROUTED.format(name, _kind(model, name))
            each.append(_frozen(model, name, reason + undeclared(model, name)))
    mixtures = _unshared(model, each)
    plans = [
        plan_of(one.group.slots, trial_experts(one.listed.rule, one.group.units), one.group.name)
        for one in mixtures
        if one.listed is not None
    ]
    if plans:
        try:
            rehearse(model, PruningPlan(tuple(plans)), [example], DensePrograms((), "experts"))
        except OsscarError as error:
            raise ModelError(
                "a model that is declared to have mixtures (osscar.mixture) cannot do without some "
                f"of their experts: {first_line(error)}"
            ) from error
    return mixtures


def mixtures_of(prepared: Prepared) -> tuple[ExpertMixture, ...]:
    """Return the mixtures of a model that is prepared."""
    return tuple(one for one in prepared.routed if isinstance(one, ExpertMixture))


def _unshared(model: nn.Module, mixtures: Sequence[ExpertMixture]) -> tuple[ExpertMixture, ...]:
    """Freeze the mixtures that have a tensor in common with another one."""
    tensors = {
        one.experts: {
            id(tensor)
            for name in one.holders
            for tensor in model.get_submodule(name).state_dict(keep_vars=True).values()
        }
        for one in mixtures
    }
    owners = Counter(tensor for own in tensors.values() for tensor in own)
    return tuple(
        one
        if one.group.frozen or all(owners[tensor] == 1 for tensor in tensors[one.experts])
        else _frozen(model, one.experts, _SHARED.format(one.experts), one.holders[-1])
        for one in mixtures
    )


def _may_be_mixture(name: str, module: nn.Module) -> bool:
    """Whether a module is called like experts, has a matrix for each of several, or lists them."""
    own = module.parameters(recurse=False)
    stacked = any(p.ndim == 3 and len(p) > 1 for p in own)
    return is_named(name) or alike(module) or stacked


def _kind(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__


def _calls(model: nn.Module, example: Mapping[str, Any], names: Sequence[str]) -> dict[str, _Found]:
    """Return the first call of each of some modules that is one of a mixture."""
    found: dict[str, _Found] = {}
    # Of what lies further back, no mixture is called; it would stay in memory.
    routed: deque[tuple[str, Call, list[Any]]] = deque(maxlen=8)

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        x = Routed.of(module, args, kwargs) if name in names else None
        if name in found:
            found[name] = replace(found[name], calls=found[name].calls + 1)
        elif x is not None and isinstance(y, Tensor):
            known = (one for one in reversed(routed) if _put_out(one[2], x))
            found[name] = _Found(name, x, y, *next(known, (None,)))
        leaves = [leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor)]
        if any(leaf.dtype in (torch.int64, torch.int32) for leaf in leaves):
            routed.append((name, (args, kwargs), leaves))

    with hooks(model, after=look):
        forward(model, example)
    return found


def _put_out(leaves: Sequence[Tensor], x: Routed) -> bool:
    """Whether what a module put out are the experts and weights that a mixture was called with."""
    return all(
        any(leaf.shape == given.shape and torch.equal(leaf.to(given), given) for leaf in leaves)
        for given in (x.experts, x.weights)
    )


def _mixture(model: nn.Module, name: str, found: _Found, order: int) -> ExpertMixture:
    """Return the mixture that was called, its group frozen where experts cannot leave."""
    try:
        return _prunable(model, name, found, order)
    except ModelError as error:
        reason = str(error)
    except OsscarError:
        raise
    except Exception as error:  # code of anyone's, which may not take other tokens
        let_shortage_pass(error)
        said = first_line(error)
        reason = f"{name!r} or its router fails on drawn tokens, or with fewer experts: {said}"
    return _frozen(model, name, reason, found.router or "")


def _prunable(model: nn.Module, name: str, found: _Found, order: int) -> ExpertMixture:
    if found.calls > 1:
        raise ModelError(_TWICE.format(name, found.calls))
    if found.router is None:
        raise ModelError(_NO_ROUTER.format(name))
    experts, router = model.get_submodule(name), model.get_submodule(found.router)
    count = _count(name, experts)
    if found.x.experts.shape[1] >= count:
        raise ModelError(_TOO_FEW.format(count, name))
    try:
        routing = router_of(router, found.call, count)
    except ModelError as error:
        raise ModelError(f"the router {found.router!r} {error}") from error
    kept = trial_experts(routing.rule, count)
    slots = [
        *router_slots(model, found.router, count, order),
        *_router_arguments(model, found, count, order),
        *slots_in(model, name, count, Role.CONSUMER, order=order),
    ]
    _check_router(found.router, router, found.call, routing, kept, count)
    _check_sum(name, experts, found, count)
    _check_experts(name, experts, found, count)
    group = CouplingGroup(
        _called(name), UnitKind.EXPERTS, count, tuple(slots), _removable(model, slots),
        step=routing.rule.groups, fewest=routing.rule.fewest,
    )  # fmt: skip
    last = _last_layer(experts, found.x.hidden) if isinstance(experts, nn.ModuleList) else None
    return ExpertMixture(group, name, found.router, routing, last_layer=last)


def _listed(model: nn.Module, one: ExpertList, tokens: Tensor, order: int) -> ExpertMixture:
    """Return the mixture of a list of modules, given the tokens of a call of its block."""
    slots = list_slots(model, one, order)
    group = CouplingGroup(
        _called(one.experts), UnitKind.EXPERTS, one.count, tuple(slots), _removable(model, slots),
        step=one.rule.groups, fewest=one.rule.fewest,
    )  # fmt: skip
    routing = Router(one.rule, Places(1, 2), None if one.bias is None else "argument 1")
    last = _last_layer(model.get_submodule(one.experts).children(), tokens)
    return ExpertMixture(group, one.experts, one.router, routing, one, last)


def _last_layer(experts: Iterable[nn.Module], hidden: Tensor) -> str | None:
    """Return the name of the linear layer that puts out what each expert of a list does, if any."""
    found = [list(last_layers(expert, hidden.clone())) for expert in experts]
    return next((name for name in found[0] if all(name in names for names in found)), None)


def _frozen(model: nn.Module, name: str, reason: str, router: str = "") -> ExpertMixture:
    """Return a mixture whose experts cannot leave, and why."""
    module = model.get_submodule(name)
    units = next((len(p) for p in module.parameters(recurse=False) if p.ndim == 3), 0)
    units = units or max(1, len(list(module.children())))
    freeze = Freeze(reason, "", name)
    group = CouplingGroup(_called(name), UnitKind.EXPERTS, units, (), 0, (freeze,))
    return ExpertMixture(group, name, router)


def _called(name: str) -> str:
    return name if is_named(name) else f"{name}.experts".removeprefix(".")


# ---- what belongs to an expert -----------------------------------------------------------


def _count(name: str, experts: nn.Module) -> int:
    """Return how many experts a mixture has, by its matrices."""
    if alike(experts):
        return len(experts)  # type: ignore[arg-type]
    counts = {len(p) for p in experts.parameters(recurse=False) if p.ndim == 3}
    if len(counts) != 1:
        raise ModelError(
            f"module {name!r} ({type(experts).__name__}) has no parameter with a matrix for each "
            "expert, and is no list of modules that are alike"
        )
    return counts.pop()


def _router_arguments(model: nn.Module, found: _Found, count: int, order: int) -> Iterator[Slot]:
    """Yield those tensors of the module around with a number for each expert that a router gets."""
    assert found.router is not None
    around = found.experts.rpartition(".")[0]
    leaves = {id(leaf) for leaf in pytree.tree_leaves(found.call)}
    own = tensors_of(model.get_submodule(around), count, recurse=False)
    given = {joined(around, name) for name, tensor in own.items() if id(tensor) in leaves}
    for slot in slots_in(model, around, count, Role.PRODUCER, recurse=False, order=order):
        if slot.role is Role.PASS_THROUGH and slot.tensor in given:
            yield replace(slot, module=found.router)


def _removable(model: nn.Module, slots: Sequence[Slot]) -> int:
    """Return how many parameters leave with an expert."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    entries = sum(parameters[s.tensor].numel() // s.units for s in slots if s.tensor in parameters)
    members = (model.get_submodule(s.tensor) for s in slots if is_list(s))
    return entries + sum(count_parameters(own) // slots[0].units for own in members)


# ---- whether it is all -------------------------------------------------------------------


def _without(module: nn.Module, role: Role, kept: Sequence[int], count: int) -> None:
    """Let a module, the router or the experts, have some of these alone, in place."""
    slice_units(module, PruningPlan((plan_of(slots_in(module, "", count, role), kept),)))


def _check_router(
    name: str,
    router: nn.Module,
    call: Call,
    routing: Router,
    kept: Sequence[int],
    count: int,
) -> None:
    """Refuse a router whose code does not, with fewer experts, follow its rule among these."""
    copy = in_double(router)
    draw_tensors(copy, count)
    args, kwargs = drawn_call(call, count, seed=len(kept))
    with InDouble():
        y = copy.forward(*args, **kwargs)
        expected = pytree.tree_leaves(routing.among(kept, count, copy, (args, kwargs), y))
        _without(copy, Role.PRODUCER, kept, count)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: _entries(t, kept, count), (args, kwargs)
        )
        found = pytree.tree_leaves(copy.forward(*args, **kwargs))
    chosen, weights = found[routing.places.experts], found[routing.places.weights]
    known = (chosen >= 0) & (chosen < len(kept))
    staying = torch.tensor(kept, device=chosen.device)[chosen.clamp(0, len(kept) - 1)]
    ours = by_expert(expected[routing.places.experts], expected[routing.places.weights])
    theirs = by_expert(staying, weights)
    error = (ours[1] - theirs[1]).abs().max()
    same = bool(known.all()) and torch.equal(ours[0], theirs[0])
    if not same or not bool(error <= TOLERANCE * ours[1].abs().max()):
        raise ModelError(_DIFFERENT.format(name, type(router).__name__))


def _entries(given: Tensor, kept: Sequence[int], count: int) -> Tensor:
    """Return what is left of an argument that may have a number for each expert."""
    return given.flatten()[list(kept)] if given.numel() == count else given


def _check_sum(name: str, experts: nn.Module, found: _Found, count: int) -> None:
    """Refuse a mixture that does not put out the sum over experts, on drawn tokens, too."""
    drawn = found.x.elsewhere()
    for x, y in ((found.x, found.y), (drawn, drawn.output(experts))):
        token, chosen, weights = x.taken(count)
        alone = Routed(x.hidden[token], chosen[:, None], torch.ones_like(weights)[:, None])
        parts = alone.output(experts)
        if len(parts) != len(token) or not x.adds_up(token, parts * weights[:, None], y):
            raise ModelError(_NO_SUM.format(name, type(experts).__name__))


def _check_experts(name: str, experts: nn.Module, found: _Found, count: int) -> None:
    """Refuse a mixture that does not, with two experts, compute what these did."""
    kept = [*range(count)][-2:] if count > 2 else [1]
    x = found.x
    numbers = torch.arange(len(x.hidden), device=x.experts.device)[:, None] % len(kept)
    numbers, ones = numbers.to(x.experts.dtype), torch.ones_like(x.weights[:, :1])
    y = experts.forward(x.hidden, numbers + kept[0], ones)
    with restored(experts):
        _without(experts, Role.CONSUMER, kept, count)
        smaller = experts.forward(x.hidden, numbers, ones)
    if not x.alike(smaller, y):
        raise ModelError(_DIFFERENT.format(name, type(experts).__name__))
