"""A walk that stops where the experts of a mixture can be chosen, and goes on among those kept.

Each batch stops before it enters a mixture, as before any consumer.  The output of its router is
known then, and any expert can be run.  Once the experts that stay are chosen, the batches are
routed anew where they stand, and the last matrices are refitted on the tokens that they now get.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graph import CouplingGroup
from osscar.base.errors import ModelError
from osscar.network.hooks import hooks
from osscar.preparation.prepare import Prepared
from osscar.routing.find import ExpertMixture
from osscar.routing.lists import called_as_mixtures
from osscar.routing.routers import Scores, misrouted
from osscar.walk.coroutines import running
from osscar.walk.expert_step import ExpertStep
from osscar.walk.walk import Waiting, Walk


@contextmanager
def without(prepared: Prepared, kept: Mapping[str, Sequence[int]]) -> Iterator[Prepared]:
    """Let a model send tokens to the experts that stay, by name of the group, in the block."""
    mixtures = [prepared.mixtures[name] for name in kept]
    idle = {
        f"{one.experts}[{expert}]"
        for one in mixtures
        for expert in {*range(one.group.units)} - {*kept[one.group.name]}
    }
    with _routed(prepared.model, mixtures, kept):
        yield dataclasses.replace(prepared, idle=prepared.idle | idle)


@contextmanager
def _routed(
    model: nn.Module,
    mixtures: Iterable[ExpertMixture],
    kept: Mapping[str, Sequence[int]],
    *,
    checked: bool = False,
) -> Iterator[None]:
    """Let a model send tokens to the experts that stay while the block runs.

    Dense passes send them to all, and so do mixtures that `kept` lacks when they are called.  With
    `checked`, declared blocks are compared with what they return by themselves.
    """
    routers = {one.router: one for one in mixtures}
    lists = [one.listed for one in routers.values() if one.listed is not None]

    def reroute(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        run, mixture = running(), routers[name]
        staying = kept.get(mixture.group.name)
        if staying is None or (run is not None and run.dense):
            return None
        return mixture.routing.among(staying, mixture.group.units, module, (args, kwargs), y)

    with called_as_mixtures(model, lists, checked=checked), hooks(model, routers, after=reroute):
        yield


class ExpertWalk:
    """An iterator over the mixtures of a model; it yields an `ExpertStep` for each.

    Each is to be committed or tried.  The arguments are those of `osscar.walk.walk.Walk`.
    """

    def __init__(self, prepared: Prepared, groups: Sequence[CouplingGroup], **options: Any) -> None:
        self._model = prepared.model
        self._mixtures = {group.name: prepared.mixtures[group.name] for group in groups}
        self._consumers = {
            name: prepared.linear_maps(one.group) for name, one in self._mixtures.items()
        }
        with _routed(self._model, self._mixtures.values(), {}):
            self._walk = Walk(prepared, groups, **options)

    def __iter__(self) -> Iterator[ExpertStep]:
        kept: dict[str, tuple[int, ...]] = {}
        routers = {one.router: one for one in self._mixtures.values()}
        scores: dict[str, dict[int, Scores]] = {name: {} for name in self._mixtures}

        def note(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            run, mixture = running(), routers[name]
            group = mixture.group
            if run is not None and not run.dense and group.name not in kept:
                found = mixture.routing.scores(module, (args, kwargs), y, group.units)
                scores[group.name][run.index] = found

        with (
            _routed(self._model, self._mixtures.values(), kept, checked=True),
            hooks(self._model, routers, after=note),
        ):
            for group, batches in self._walk.arrivals():
                mixture = self._mixtures[group.name]
                _check_routes(mixture, batches, scores[group.name])
                yield ExpertStep(
                    mixture,
                    self._consumers[group.name],
                    self._model.get_submodule(mixture.experts),
                    batches,
                    scores[group.name],
                    kept,
                )


def _check_routes(
    mixture: ExpertMixture, batches: Sequence[Waiting], known: Mapping[int, Scores]
) -> None:
    """Refuse tokens that are not sent as the logits of the router say.

    Code around a router may change what it says of some tokens; and scores that saturate may be
    equal where the logits are not.
    """
    for batch in batches:
        scores, x = known[batch.index], batch.x
        routes = mixture.rule.route(scores.logits, None, scores.bias)
        sent, weighed = torch.zeros_like(scores.logits), torch.zeros_like(scores.logits)
        token, expert, weight = x.taken(mixture.group.units)
        sent[token, expert.long()], weighed[token, expert.long()] = 1.0, weight.double()
        chosen = routes[0], torch.ones_like(routes[1])
        off = max(
            misrouted(ours, theirs, scores.logits, x.weights.dtype)
            for ours, theirs in ((chosen, sent), (routes, weighed))
        )
        if off:
            raise ModelError(
                f"{mixture.experts!r} gets {off} of {len(weighed)} tokens of "
                f"calibration batch {batch.index} with other experts or weights than follow from "
                f"the logits of its router {mixture.router!r}; use dtype float32 "
                "(`--dtype float32`) if scores are tied by rounding, or leave the mixture out "
                "(skip, `--skip`)"
            )
