"""A model among some of its experts alone, which a smaller model is proved against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.groups import Role, Slot
from osscar.base.errors import ModelError
from osscar.network.hooks import hooks
from osscar.routing.routers import Router, like_logits, router_of, sends_tokens
from solvers import SolverError


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
