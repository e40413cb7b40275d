"""Whole experts of mixtures as groups: what belongs to each, and which ones cannot leave.

A mixture is a module that is called with tokens, their experts and weights (`Routed`), and a
router, which chooses these.  An expert owns its entry in every dimension of both that is as long as
there are experts.  Experts may leave where the router follows a known rule (`routers`), and their
last matrices can be refitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.groups import CouplingGroup, Freeze, Role, Slot, UnitKind
from osscar.base.errors import ModelError, first_line
from osscar.base.memory import attempt
from osscar.network.hooks import hooks
from osscar.network.modules import count_parameters, forward, tensors_in
from osscar.routing.declared import (
    ExpertList,
    alike,
    calls_of,
    check_called_once,
    declared_in,
    expert_list,
    is_named,
    joined,
    undeclared,
)
from osscar.routing.routed import Routed, last_layers
from osscar.routing.routers import Call, Router, router_of, sends_tokens
from solvers import RoutingRule


@dataclass(frozen=True, eq=False)
class ExpertMixture:
    """The experts of a mixture as a group, and how tokens are sent to them."""

    group: CouplingGroup
    experts: str
    """The module that is called with what is `Routed`."""
    router: str
    """The module that routes."""
    routing: Router
    listed: ExpertList | None = None
    """How the code of a block calls a list of modules: `experts` and `router` are called while the
    block is `called_as_mixtures`."""
    last_layer: str | None = None
    """The linear layer, in each module of a list, that returns what the expert does, if any."""

    @property
    def rule(self) -> RoutingRule:
        """By which tokens are sent to experts."""
        return self.routing.rule


@dataclass(frozen=True, eq=False)
class WholeMixture:
    """Experts that cannot leave: a frozen group."""

    group: CouplingGroup


@dataclass(frozen=True, eq=False)
class _Seen:
    """A call of a mixture, and the last call before it that returned its experts and weights."""

    x: Routed
    router: str | None = None
    call: Call = ((), {})
    calls: int = 1


@torch.no_grad()
def mixtures_in(
    model: nn.Module, example: Mapping[str, Any]
) -> tuple[ExpertMixture | WholeMixture, ...]:
    """Run a model in evaluation mode, and return its mixtures of experts, whatever is refitted."""
    declared = declared_in(model)
    lists = {joined(block, one.experts): block for block, one in declared.items()}
    names = [
        name
        for name, module in model.named_modules()
        if name in lists
        or is_named(name)
        or alike(module)
        or any(p.ndim == 3 and len(p) > 1 for p in module.parameters(recurse=False))
    ]
    names += [name for name in lists if name not in names]  # which their blocks do not have
    seen = _calls(model, example, names) if names else {}
    calls = calls_of(model, example, list(declared)) if lists.keys() - seen.keys() else {}
    found: list[ExpertMixture | WholeMixture] = []
    for order, name in enumerate(names):
        if name in seen:
            found.append(_mixture(model, name, seen[name], order))
        elif name in lists:
            one, tokens = expert_list(model, lists[name], declared[lists[name]], calls[lists[name]])
            found.append(_listed(model, one, tokens, order))
        elif is_named(name):
            reason = (
                f"the router of {name!r} ({type(model.get_submodule(name)).__name__}) is not "
                "known, since the module is not called with tokens, their experts, and their "
                f"weights{undeclared(model, name)}"
            )
            found.append(whole_mixture(model, name, reason))
    return tuple(found)


def _calls(model: nn.Module, example: Mapping[str, Any], names: Sequence[str]) -> dict[str, _Seen]:
    """Return the first call of each of some modules that is one of a mixture."""
    found: dict[str, _Seen] = {}
    # Of what lies further back, no mixture is called; it would stay in memory.
    routed: deque[tuple[str, Call, list[Any]]] = deque(maxlen=8)

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        x = Routed.of(module, args, kwargs) if name in names else None
        if name in found:
            found[name] = replace(found[name], calls=found[name].calls + 1)
        elif x is not None and isinstance(y, Tensor):
            known = (one[:2] for one in reversed(routed) if _put_out(one[2], x))
            found[name] = _Seen(x, *next(known, ()))
        leaves = tensors_in(y)
        if sends_tokens(leaves):
            routed.append((name, (args, kwargs), leaves))

    with hooks(model, after=look):
        forward(model, example)
    return found


def _put_out(leaves: Sequence[Tensor], x: Routed) -> bool:
    """Whether what a module returned are the experts and weights that a mixture was called with."""
    return all(
        any(leaf.shape == given.shape and torch.equal(leaf.to(given), given) for leaf in leaves)
        for given in (x.experts, x.weights)
    )


def _mixture(model: nn.Module, name: str, seen: _Seen, order: int) -> ExpertMixture | WholeMixture:
    """Return the mixture that was called, its group frozen where experts cannot leave."""
    with attempt() as tried:  # code of anyone's, which may not take other tokens
        return _prunable(model, name, seen, order)
    reason = str(tried.error)
    if not isinstance(tried.error, ModelError):
        reason = f"the router of {name!r} fails on drawn tokens: {first_line(tried.error)}"
    return whole_mixture(model, name, reason)


def _prunable(model: nn.Module, name: str, seen: _Seen, order: int) -> ExpertMixture:
    check_called_once(repr(name), seen.calls)
    if seen.router is None:
        raise ModelError(
            f"no module returns the experts and weights that {name!r} is called with; let a module "
            "of its own route, not code of the module around it"
        )
    experts = model.get_submodule(name)
    count = _count(name, experts)
    if seen.x.experts.shape[1] >= count:
        raise ModelError(
            f"every token is sent to all {count} experts of {name!r}, so no expert can be removed"
        )
    try:
        routing = router_of(model.get_submodule(seen.router), seen.call, count)
    except ModelError as error:
        raise ModelError(f"the router {seen.router!r} {error}") from error
    arguments = {id(leaf) for leaf in pytree.tree_leaves(seen.call)}
    around = name.rpartition(".")[0]  # the module that may give its router numbers of each expert
    slots = [
        *_router_slots(model, seen.router, count, order),
        *(
            replace(slot, module=seen.router)
            for slot in _slots(model, around, count, Role.PRODUCER, order, recurse=False)
            if slot.role is Role.PASS_THROUGH and id(attrgetter(slot.tensor)(model)) in arguments
        ),
        *_slots(model, name, count, Role.CONSUMER, order),
    ]
    last = _last_layer(experts, seen.x.hidden) if isinstance(experts, nn.ModuleList) else None
    group = _group(model, name, slots, routing.rule)
    return ExpertMixture(group, name, seen.router, routing, last_layer=last)


def _listed(model: nn.Module, one: ExpertList, tokens: Tensor, order: int) -> ExpertMixture:
    """Return the mixture of a list of modules, given the tokens of a call of its block."""
    gate, name = joined(one.block, one.declared.gate), joined(one.block, one.declared.experts)
    last = _last_layer(model.get_submodule(name).children(), tokens)
    slots = [
        *_router_slots(model, gate, one.count, order),
        *_slots(model, one.block, one.count, Role.PRODUCER, order, recurse=False),
        *_slots(model, name, one.count, Role.CONSUMER, order),
    ]
    group = _group(model, name, slots, one.routing.rule)
    return ExpertMixture(group, name, one.router, one.routing, one, last)


def _group(model: nn.Module, name: str, slots: Sequence[Slot], rule: RoutingRule) -> CouplingGroup:
    count, parameters = slots[0].units, dict(model.named_parameters(remove_duplicate=False))
    own = [parameters[slot.tensor].numel() for slot in slots if slot.tensor in parameters]
    lists = [model.get_submodule(slot.tensor) for slot in slots if slot.tensor == slot.module]
    own += map(count_parameters, lists)
    removable = sum(number // count for number in own)
    return CouplingGroup(
        _called(name), UnitKind.EXPERTS, count, tuple(slots), removable,
        step=rule.groups, fewest=rule.fewest,
    )  # fmt: skip


def _last_layer(experts: Iterable[nn.Module], hidden: Tensor) -> str | None:
    """Return the name of the linear layer that returns what each expert of a list does, if any."""
    found = [list(last_layers(expert, hidden.clone())) for expert in experts]
    return next((name for name in found[0] if all(name in names for names in found)), None)


def whole_mixture(model: nn.Module, name: str, reason: str) -> WholeMixture:
    """Return a mixture whose experts cannot leave, and why."""
    module = model.get_submodule(name)
    units = next((len(p) for p in module.parameters(recurse=False) if p.ndim == 3), 0)
    units = units or max(1, len(list(module.children())))
    freeze = Freeze(reason, "", name)
    return WholeMixture(CouplingGroup(_called(name), UnitKind.EXPERTS, units, (), 0, (freeze,)))


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
            f"module {name!r} ({type(experts).__name__}) is neither a list of equal modules nor "
            "has it a parameter with a matrix for each expert"
        )
    return counts.pop()


def _slots(
    model: nn.Module, name: str, count: int, role: Role, order: int, *, recurse: bool = True
) -> list[Slot]:
    """Return where tensors of a module have entries an expert; matrices have the role given."""
    module = model.get_submodule(name)
    if isinstance(module, nn.ModuleList):
        return [Slot(name, 0, role, name, count, order=order)]
    tensors = (*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse))
    return [
        Slot(
            joined(name, tensor), tuple(t.shape).index(count),
            Role.PASS_THROUGH if t.numel() == count else role, name, count, order=order,
        )
        for tensor, t in tensors
        if count in t.shape
    ]  # fmt: skip


def _router_slots(model: nn.Module, router: str, count: int, order: int) -> list[Slot]:
    slots = _slots(model, router, count, Role.PRODUCER, order)
    if not any(slot.role is Role.PRODUCER for slot in slots):
        raise ModelError(
            f"the router {router!r} has no tensor with a row for each of {count} experts"
        )
    return slots
