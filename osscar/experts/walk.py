"""A walk that stops where the experts of a mixture can be chosen, and goes on among those kept.

Each batch stops before it enters a mixture, as before any consumer.  What the router said of it is
known then, and any expert can be asked for its output.  Once it is chosen who stays, the batches
are routed anew where they stand.  The last matrices of those that stay can then be refitted on the
tokens that they now get.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from graph import CouplingGroup
from osscar.base.errors import ModelError
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.printable import pluralize
from osscar.base.timing import Stage, timed
from osscar.experts.find import ExpertMixture, mixtures_of
from osscar.experts.last_layers import last_matrices
from osscar.experts.lists import MOST_TIED, called_as_mixtures
from osscar.experts.routers import Call, tied
from osscar.network.hooks import hooks
from osscar.preparation.prepare import Prepared
from osscar.preparation.routing import Routed, afresh, output_of
from osscar.walk.coroutines import Coroutine, running
from osscar.walk.gram import GramAccumulator
from osscar.walk.layer_step import DenseTensors, LayerStep
from osscar.walk.targets import Target, correction
from osscar.walk.walk import Walk
from solvers import ExpertProblem, ProblemError, RoutedTokens, expert_candidates

MOST_TOKENS = 1 << 15
"""Tokens that choose who stays, drawn where there are more."""

_AT_ONCE = 1 << 22
"""Numbers that experts put out at a time."""

_BLOCK = 4096
"""Tokens in a block of a problem, about."""


@contextmanager
def routed(
    model: nn.Module, mixtures: Iterable[ExpertMixture], kept: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """Let a model send tokens to the experts that stay while the block runs.

    Passes of a walk that are to be as in the dense model send them to all, and so do mixtures that
    `kept`, by the name of the group, does not have when they are called.
    """
    routers = {one.router: one for one in mixtures}
    lists = [one.listed for one in routers.values() if one.listed is not None]

    def reroute(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        run, mixture = running(), routers[name]
        staying = kept.get(mixture.group.name)
        if staying is None or (run is not None and run.dense):
            return None
        assert mixture.routing is not None
        return mixture.routing.among(staying, mixture.group.units, module, (args, kwargs), y)

    with called_as_mixtures(model, lists), hooks(model, routers, after=reroute):
        yield


@dataclass(frozen=True, eq=False)
class _Routes:
    """What a router has said of a batch.

    Logits are (tokens, experts), the bias of the choice (experts,), experts and weights
    (tokens, k).
    """

    logits: Tensor
    bias: Tensor | None
    experts: Tensor
    weights: Tensor


class ExpertWalk(Walk):
    """An iterator over the mixtures of a model; it yields an `ExpertStep` for each.

    Parameters
    ----------
    prepared, target, held
        As of `osscar.walk.walk.walk`.
    mixtures
        Those that lose experts, each of which has `last_matrices`.
    kept, committed
        Of those that an earlier walk has done: which experts stay, by the name of the group, and
        dense tensors, by the name of the module.
    """

    def __init__(
        self,
        prepared: Prepared,
        mixtures: Sequence[ExpertMixture],
        target: Target,
        held: int,
        kept: Mapping[str, Sequence[int]],
        committed: Mapping[str, DenseTensors],
    ) -> None:
        self._mixtures = {one.group.name: one for one in mixtures}
        names = {*kept, *self._mixtures}
        self._routed = [one for one in mixtures_of(prepared) if one.group.name in names]
        self._kept = dict(kept)
        self._routes: dict[tuple[str, int], _Routes] = {}
        """By router and batch."""
        found = {one.group.name: last_matrices(prepared, one) for one in mixtures}
        read = {name: one for name, one in found.items() if one is not None}
        self._neurons = {name: neurons for name, (neurons, _) in read.items()}
        maps = {name: own for name, (_, own) in read.items()}
        groups = [one.group for one in mixtures]
        with routed(prepared.model, self._routed, {}):
            super().__init__(prepared, groups, True, target, held, committed, maps)

    def __iter__(self) -> Iterator[ExpertStep]:  # type: ignore[override]
        """Walk from mixture to mixture; each has to be committed."""
        yield from cast("Iterator[ExpertStep]", super().__iter__())

    def _steps_of(self, groups: tuple[CouplingGroup, ...]) -> Iterator[Any]:
        (group,) = groups
        call, *more = self._schedule.measured[group.name]
        if more:
            raise ModelError(
                f"{self.calls[call]!r} is called {1 + len(more)} times in a pass, each with other "
                "tokens, so that its experts cannot be chosen; leave it out (--skip)"
            )
        if self._at < 0:
            self._start()
        self._measure(call, ())
        self._check_routes(self._mixtures[group.name])
        for run in self._runs:
            arrived = run.arrived
            assert arrived is not None
            if arrived.output is None:  # as the dense stream is not asked
                y = output_of(self._model.get_submodule(arrived.module), arrived.x)
                run.arrived = dataclasses.replace(arrived, output=y)
        yield ExpertStep(self, self._mixtures[group.name], self._neurons[group.name])

    @contextmanager
    def _watched(self) -> Iterator[None]:
        routers = {one.router: one for one in self._mixtures.values()}
        mixtures = [one.experts for one in self._mixtures.values()]

        def note(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            if routers[name].group.name not in self._kept:
                self._note_routes(routers[name], module, (args, kwargs), y)

        with (
            routed(self._model, self._routed, self._kept),
            hooks(self._model, routers, after=note),
            super()._watched(),
            hooks(self._model, mixtures, before=self._into_mixture),  # once it is suspended there
        ):
            yield

    def _note_routes(self, mixture: ExpertMixture, router: nn.Module, call: Call, y: Any) -> None:
        """Note what a router says of a batch."""
        run, count, routing = running(), mixture.group.units, mixture.routing
        if run is None or run.dense:
            return
        assert routing is not None
        bias = routing.choice_bias(router, call, count)
        logits = routing.logits(router, call, y, count).double()
        bias = None if bias is None else bias.double()
        self._routes[mixture.router, run.index] = _Routes(logits, bias, *routing.routes(y))

    def _check_routes(self, mixture: ExpertMixture) -> None:
        """Refuse tokens that are not sent as the router said last, or as its logits say.

        Code around a router may change what it says of some tokens; and scores that saturate may be
        equal where the logits are not.
        """
        assert mixture.routing is not None
        for run in self._runs:
            routes, x = self._routes[mixture.router, run.index], cast("Any", run.arrived).x
            given = (routes.experts, x.experts), (routes.weights, x.weights)
            if not all(torch.equal(said.to(got), got) for said, got in given):
                raise ModelError(
                    f"{mixture.experts!r} gets calibration batch {run.index} with other experts or "
                    f"weights than its router {mixture.router!r} put out: what changes them cannot "
                    "be told without some experts; leave it out (--skip)"
                )
            ours, _ = mixture.routing.rule.route(routes.logits, None, routes.bias)
            differ = (ours.sort(1).values != routes.experts.sort(1).values).any(1)
            differ &= ~tied(routes.logits)  # as those of padding may be, which is all zero
            if int(differ.sum()) > MOST_TIED * len(differ):
                raise ModelError(
                    f"the router {mixture.router!r} sends {int(differ.sum())} of {len(differ)} "
                    f"tokens of calibration batch {run.index} to other experts than its logits "
                    "say: its scores are equal where these are not; use --dtype float32, or "
                    "leave it out (--skip)"
                )

    def _into_mixture(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Let a batch go on with what it was routed to where it stood."""
        run = running()
        if run is None or run.dense or run.arrived is None or run.arrived.module != name:
            return None
        return run.arrived.x.tensors, {}

    def _here(self) -> Iterator[tuple[Coroutine, Routed, Tensor]]:
        """Yield the batches that stand before a mixture, with what it is to put out, in float64."""
        for place, run in enumerate(self._runs):
            arrival = run.arrived
            assert arrival is not None
            assert arrival.output is not None
            y = arrival.output.double()
            if self._target.needs_dense:
                dense = self._dense[place].arrived
                assert dense is not None
                assert dense.output is not None
                y = y + correction(dense.output, arrival.output, dense.stream, arrival.stream)
            yield run, afresh(arrival.x), y


@dataclass(frozen=True)
class Losses:
    """Relative errors of what a mixture puts out."""

    fitted: float
    """On the samples that weights are fitted to."""
    held_out: float | None
    """On the others, if there are any."""

    @property
    def telling(self) -> float:
        """The one by which weights are judged."""
        return self.fitted if self.held_out is None else self.held_out


@dataclass(eq=False)
class ExpertStep:
    """A mixture that all batches have reached: it can be solved, committed, and refitted."""

    _walk: ExpertWalk = field(repr=False)
    mixture: ExpertMixture
    neurons: CouplingGroup = field(repr=False)
    """The units of the experts' last matrices."""

    @property
    def group(self) -> CouplingGroup:
        """The experts."""
        return self.mixture.group

    @property
    def _module(self) -> nn.Module:
        return self._walk._model.get_submodule(self.mixture.experts)

    @property
    def unreached(self) -> list[int]:
        """The experts to which no calibration token is sent; asked before others are gone."""
        arrivals = (run.arrived for run in self._walk._runs)
        sent = {e for one in arrivals if one is not None for e in one.x.experts.flatten().tolist()}
        return [expert for expert in range(self.group.units) if expert not in sent]

    @torch.no_grad()
    def problem(self, keep: int) -> ExpertProblem:
        """Pose the problem of which experts stay, on samples that are not held out."""
        assert self.mixture.routing is not None
        rule, walk = self.mixture.routing.rule, self._walk
        drawn = self._drawn()
        tokens = sum(map(len, drawn.values()))
        bias = walk._routes[self.mixture.router, min(drawn)].bias
        needed = ExpertProblem.memory(rule, self.group.units, keep, tokens, bias)
        what = f"the problem of {self.group.name!r} with {tokens} tokens ({needed:,} bytes)"
        with memory_for(what, FOR_MATRICES):
            blocks = tuple(_in_blocks(self._parts(drawn, keep)))
            try:
                return ExpertProblem(rule, blocks, keep, bias, self.group.name)
            except ProblemError as error:
                raise ModelError(
                    f"the experts of {self.group.name!r} cannot be chosen: {error}; leave the "
                    "mixture out (--skip)"
                ) from error

    def _drawn(self) -> dict[int, Tensor]:
        """Return which tokens choose who stays, in order, by batch; all where they are few."""
        walk = self._walk
        fitted = [run for run in walk._runs if run.index < walk._held_from]
        counts = [len(run.arrived.x.hidden) for run in fitted if run.arrived is not None]
        chance = torch.Generator().manual_seed(0)
        chosen = torch.zeros(sum(counts), dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=chance)[:MOST_TOKENS]] = True
        own = zip(fitted, torch.split(chosen, counts), strict=True)
        return {run.index: torch.nonzero(some).flatten() for run, some in own if some.any()}

    def _parts(self, drawn: Mapping[int, Tensor], keep: int) -> Iterator[RoutedTokens]:
        """Yield what the drawn tokens of each batch say of the experts that they can reach."""
        assert self.mixture.routing is not None
        for run, x, y in self._walk._here():
            if run.index not in drawn:
                continue
            routes = self._walk._routes[self.mixture.router, run.index]
            logits, bias = routes.logits, routes.bias
            rows = drawn[run.index].to(y.device)
            reached = expert_candidates(self.mixture.routing.rule, logits[rows], keep, bias)
            some = max(1, _AT_ONCE // (reached.shape[1] * y.shape[1]))
            given = logits[rows], x.hidden[rows], reached, y[rows]
            for own, hidden, experts, target in zip(
                *(torch.split(tensor, some) for tensor in given), strict=True
            ):
                outputs = self._outputs(x, hidden, experts)
                yield RoutedTokens.from_outputs(own, outputs, target)

    def _outputs(self, x: Routed, hidden: Tensor, experts: Tensor) -> Tensor:
        """Return what experts, (tokens, r), put out for tokens, (tokens, r, d)."""
        each = hidden.repeat_interleave(experts.shape[1], 0)
        one = torch.ones(len(each), 1, dtype=x.weights.dtype, device=each.device)
        y: Tensor = self._module.forward(each, experts.flatten()[:, None].to(x.experts), one)
        return y.view(*experts.shape, y.shape[1])

    @torch.no_grad()
    def commit(self, kept: Sequence[int]) -> None:
        """Route the batches among the experts that stay."""
        walk, routing = self._walk, self.mixture.routing
        assert routing is not None
        walk._kept[self.group.name] = tuple(kept)
        for run in walk._runs:
            assert run.arrived is not None
            routes = walk._routes.pop((self.mixture.router, run.index))
            experts, weights = routing.rule.route(routes.logits, kept, routes.bias)
            x: Routed = run.arrived.x
            there = Routed(x.hidden, experts.to(x.experts), weights.to(x.weights))
            run.arrived = dataclasses.replace(run.arrived, x=there)

    @contextmanager
    def tried(self, kept: Sequence[int]) -> Iterator[None]:
        """Route the batches among some experts while the block runs, and as before afterwards."""
        walk = self._walk
        arrived, routes = [run.arrived for run in walk._runs], dict(walk._routes)
        self.commit(kept)
        try:
            yield
        finally:
            del walk._kept[self.group.name]
            walk._routes.update(routes)
            for run, one in zip(walk._runs, arrived, strict=True):
                run.arrived = one

    def losses(self) -> Losses:
        """Return the error of what the mixture puts out now, relative to what it is to put out."""
        error, size = [0.0, 0.0], [0.0, 0.0]
        for run, x, y in self._walk._here():
            held = run.index >= self._walk._held_from
            error[held] += float((y - output_of(self._module, x).double()).square().sum())
            size[held] += float(y.square().sum())
        fitted, held_out = (e / s if s else e for e, s in zip(error, size, strict=True))
        return Losses(fitted, held_out if size[1] else None)

    def refit(self) -> LayerStep:
        """Return what the last matrices of those that stay read of the tokens that they now get."""
        walk = self._walk
        held, kept = walk._held_from < len(walk._batches), set(walk._kept[self.group.name])
        maps = [m for e, m in enumerate(walk._consumers[self.group.name]) if e in kept]
        what = f"Gram matrices of {pluralize(len(maps), 'expert')} of {self.group.name!r}"
        with memory_for(what, FOR_MATRICES):
            grams = [GramAccumulator(one, held=held, corrections=True) for one in maps]
        for run, x, y in walk._here():
            D = y - output_of(self._module, x).double()
            with timed(Stage.GRAM):
                for gram in grams:
                    gram.add_call(x, D, held=run.index >= walk._held_from)
        return LayerStep(self.neurons, tuple(grams))


def _in_blocks(parts: Iterable[RoutedTokens]) -> Iterator[RoutedTokens]:
    """Join tokens of a problem to blocks of some thousands."""
    block: list[RoutedTokens] = []
    for part in parts:
        block.append(part)
        if sum(len(one.energy) for one in block) >= _BLOCK:
            yield RoutedTokens.joined(block)
            block = []
    if block:
        yield RoutedTokens.joined(block)
