"""A walk that stops where the experts of a mixture can be chosen, and goes on among those kept.

Each batch stops before it enters a mixture, as before any consumer.  The output of its router is
known then, and any expert can be run.  Once the experts that stay are chosen, the batches are
routed anew where they stand, and the last matrices are refitted on the tokens that they now get.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import solvers
from graph import CouplingGroup, UnitKind
from osscar.base.errors import ModelError, warn_of
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.printable import listed, pluralize
from osscar.base.timing import Stage, timed
from osscar.consumers.consumer import LinearMap
from osscar.consumers.layers import output_of
from osscar.network.hooks import hooks
from osscar.preparation.prepare import Prepared
from osscar.routing.declared import called_as_mixtures
from osscar.routing.find import ExpertMixture
from osscar.routing.routed import Routed
from osscar.routing.routers import Scores, misrouted
from osscar.walk.coroutines import running
from osscar.walk.gram import GramAccumulator
from osscar.walk.layer_step import LayerStep, Refits, Solved
from osscar.walk.walk import Waiting, Walk
from solvers import ExpertProblem, ProblemError, RoutedTokens, expert_candidates

MOST_TOKENS = 1 << 15
"""Tokens that choose who stays, drawn where there are more."""

_AT_ONCE = 1 << 22
"""Numbers that experts return at a time."""

_BLOCK = 4096
"""Tokens in a block of a problem, about."""


@dataclass(eq=False)
class ExpertStep:
    """A mixture that all batches have reached: it can be solved and refitted."""

    mixture: ExpertMixture
    consumers: tuple[LinearMap, ...] = field(repr=False)
    """The last matrices, one an expert."""
    _module: nn.Module = field(repr=False)
    """What is called with what is `Routed`."""
    _batches: tuple[Waiting, ...] = field(repr=False)
    _scores: dict[int, Scores] = field(repr=False)
    """By batch."""
    _kept: dict[str, tuple[int, ...]] = field(repr=False)
    """The experts that stay, by the name of the group, of mixtures that were solved."""

    @property
    def group(self) -> CouplingGroup:
        """The experts."""
        return self.mixture.group

    # ---- who stays -----------------------------------------------------------------------

    def solve(
        self, keep: int, backend: solvers.Backend, damp: float | None, weight: float | None
    ) -> Solved:
        """Choose the experts that stay, and commit their refit; what is None is chosen for it."""
        sent = {e for batch in self._batches for e in batch.x.experts.flatten().tolist()}
        unreached = [expert for expert in range(self.group.units) if expert not in sent]
        if unreached:
            warn_of(
                "no calibration token is sent to {}; give more samples",
                f"{pluralize(len(unreached), 'expert')} of {self.group.name!r} "
                f"({listed([*map(str, unreached)], 8)})",
            )
        with timed(Stage.GRAM):
            problem = self.problem(keep)
        measured = time.perf_counter()
        with timed(Stage.SOLVER):
            solution = solvers.solve_experts(problem, backend)
            record = solution.record(solution.verify())
        choosing = sum(len(block.energy) for block in problem.tokens)
        del problem, solution
        self.commit(record.support)
        with timed(Stage.WALK):
            before, layer = self.losses(), self._refitted()
        if weight is None and not any(gram.held_out_rows for gram in layer.known):
            weight = 1.0  # targets are what was lost with the experts
        with timed(Stage.DAMPING):
            damp, refits = _refits(layer, damp, weight)
        with timed(Stage.WALK), layer.tried(refits.weights, range(layer.group.units)):
            after = self.losses()
        # What is no worse for each expert can be for their sum.
        if after[-1] <= before[-1]:
            layer.commit(refits.weights)
        else:
            labels = tuple(gram.linear_map.label for gram in layer.known)
            refits, after = dataclasses.replace(refits, unrefitted=labels, growth=1.0), before
        record = dataclasses.replace(record, relative_loss=before[0])
        dead = len(unreached)
        return Solved(record, layer, refits, damp, dead, measured, after[0], choosing)

    @contextmanager
    def alone(self, keep: int, damp: float | None, shaped: bool) -> Iterator[NDArray[np.float64]]:
        """Route among the experts that stay, refitted, while the block runs.

        Yielded is the shape of the group's curve, if that is asked for: the loss with so many
        experts left, which with fewer than the router needs is that of the fewest.
        """
        with timed(Stage.MEASURED), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
            problem = self.problem(self.group.fewest if shaped else keep)
            shape = np.zeros(0)
            if shaped:
                history = solvers.solve_experts(problem, "greedy").history
                risen = np.maximum.accumulate([0.0, *history[1:]]) / problem.scale
                shape = np.concatenate([np.full(problem.keep, risen[-1]), risen[::-1]])
            support = solvers.solve_experts(problem.with_keep(keep), "greedy").support.tolist()
            with self._tried(support):
                layer = self._refitted()
                _, refits = _refits(layer, damp, None)
                with layer.tried(refits.weights, range(layer.group.units)):
                    yield shape

    @torch.no_grad()
    def problem(self, keep: int) -> ExpertProblem:
        """Pose the problem of which experts stay, on samples that are not held out."""
        rule, drawn = self.mixture.rule, self._drawn()
        tokens = sum(map(len, drawn.values()))
        bias = self._scores[min(drawn)].bias
        needed = ExpertProblem.memory(rule, self.group.units, keep, tokens, bias)
        what = f"the problem of {self.group.name!r} with {tokens} tokens ({needed:,} bytes)"
        with memory_for(what, FOR_MATRICES):
            blocks = tuple(_in_blocks(self._parts(drawn, keep)))
            try:
                return ExpertProblem(rule, blocks, keep, bias, self.group.name)
            except ProblemError as error:
                raise ModelError(
                    f"the experts of {self.group.name!r} cannot be chosen: {error}; leave the "
                    "mixture out (skip, `--skip`)"
                ) from error

    def _drawn(self) -> dict[int, Tensor]:
        """Return which tokens choose who stays, in order, by batch; all where they are few."""
        fitted = [batch for batch in self._batches if not batch.held_out]
        counts = [len(batch.x.hidden) for batch in fitted]
        chance = torch.Generator().manual_seed(0)
        chosen = torch.zeros(sum(counts), dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=chance)[:MOST_TOKENS]] = True
        own = zip(fitted, torch.split(chosen, counts), strict=True)
        return {batch.index: torch.nonzero(some).flatten() for batch, some in own if some.any()}

    def _parts(self, drawn: Mapping[int, Tensor], keep: int) -> Iterator[RoutedTokens]:
        """Yield what the drawn tokens of each batch say of the experts that they can reach."""
        for batch in self._batches:
            if batch.index not in drawn:
                continue
            x, y, scores = batch.x, batch.target(), self._scores[batch.index]
            rows = drawn[batch.index].to(y.device)
            reached = expert_candidates(self.mixture.rule, scores.logits[rows], keep, scores.bias)
            some = max(1, _AT_ONCE // (reached.shape[1] * y.shape[1]))
            given = scores.logits[rows], x.hidden[rows], reached, y[rows]
            for logits, hidden, experts, target in zip(
                *(torch.split(tensor, some) for tensor in given), strict=True
            ):
                yield RoutedTokens.from_outputs(logits, self._outputs(x, hidden, experts), target)

    def _outputs(self, x: Routed, hidden: Tensor, experts: Tensor) -> Tensor:
        """Return what experts, (tokens, r), return for tokens, (tokens, r, d)."""
        each = hidden.repeat_interleave(experts.shape[1], 0)
        one = torch.ones(len(each), 1, dtype=x.weights.dtype, device=each.device)
        y: Tensor = self._module.forward(each, experts.flatten()[:, None].to(x.experts), one)
        return y.view(*experts.shape, y.shape[1])

    # ---- among those that stay -----------------------------------------------------------

    @torch.no_grad()
    def commit(self, kept: Sequence[int]) -> None:
        """Route the batches among the experts that stay."""
        self._kept[self.group.name] = tuple(kept)
        for batch in self._batches:
            logits, bias = self._scores.pop(batch.index)
            experts, weights = self.mixture.rule.route(logits, kept, bias)
            x: Routed = batch.x
            batch.go_on_with(Routed(x.hidden, experts.to(x.experts), weights.to(x.weights)))

    @contextmanager
    def _tried(self, kept: Sequence[int]) -> Iterator[None]:
        """Route the batches among some experts while the block runs, and as before afterwards."""
        read, scores = [batch.x for batch in self._batches], dict(self._scores)
        self.commit(kept)
        try:
            yield
        finally:
            del self._kept[self.group.name]
            self._scores.update(scores)
            for batch, x in zip(self._batches, read, strict=True):
                batch.go_on_with(x)

    def losses(self) -> list[float]:
        """Return the relative errors of the mixture on fitted samples, and on any held out."""
        error, size = [0.0, 0.0], [0.0, 0.0]
        for batch in self._batches:
            y = batch.target()
            lost = y - output_of(self._module, batch.x).double()
            error[batch.held_out] += float(lost.square().sum())
            size[batch.held_out] += float(y.square().sum())
        found = [e / s if s else e for e, s in zip(error, size, strict=True)]
        return found if size[1] else found[:1]

    def _refitted(self) -> LayerStep:
        """Return what the last matrices of those that stay read of the tokens that they now get."""
        kept, held_out = self._kept[self.group.name], any(batch.held_out for batch in self._batches)
        maps = [one for expert, one in enumerate(self.consumers) if expert in kept]
        what = f"Gram matrices of {pluralize(len(maps), 'expert')} of {self.group.name!r}"
        with memory_for(what, FOR_MATRICES):
            grams = [GramAccumulator(one, held_out=held_out, corrections=True) for one in maps]
        for batch in self._batches:
            x = batch.x
            D = batch.target() - output_of(self._module, x).double()
            with timed(Stage.GRAM):
                for gram in grams:
                    gram.add_call(x, D, held_out=batch.held_out)
        name, count = f"{self.group.name}.neurons", len(self.consumers[0].owned)
        neurons = CouplingGroup(name, UnitKind.NEURONS, count, (), removable=0)
        return LayerStep(neurons, tuple(grams))


def _refits(layer: LayerStep, damp: float | None, weight: float | None) -> tuple[float, Refits]:
    """Return the damping of the last matrices, of which all units stay, and their refit."""
    units = range(layer.group.units)
    damp, layer.correction_weight = layer.regularization(len(units), damp, weight)
    refitted, _ = solvers.refit(layer.problem(len(units), damp), torch.tensor(units))
    return damp, layer.refits(refitted, units)


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


# ---- the walk -----------------------------------------------------------------------------


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
