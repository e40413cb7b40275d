"""A layer of each sort, summed up, solved and refitted by the run's own code.

It is taken whole where there are many such layers, else a part of its units and outputs at two
sizes, from which the time of all of it follows as ``a p^2 + b p^3``: all that a solver does is
products, factorizations and sweeps of matrices with p rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import solvers
from graph import CouplingGroup, Role, Slot
from osscar.allocation.curvature import Factors, one_pass, small_batches
from osscar.allocation.curves import curve_samples, elimination_curve
from osscar.base.timing import Clock, Stage, profiled
from osscar.data.batches import TensorInputs
from osscar.estimation.forward_probe import Seen, TimedPass
from osscar.estimation.scaled import Scaled
from osscar.network.modules import device_of
from osscar.preparation.consumer import LinearMap
from osscar.preparation.linear_maps import FeatureMap, linear_maps
from osscar.preparation.opened import Opened
from osscar.preparation.routing import afresh
from osscar.pruning.certify import EXACT_UNITS
from osscar.pruning.groups import solved
from osscar.request import PruningRequest
from osscar.walk.gram import GramAccumulator
from osscar.walk.site import Site
from osscar.walk.targets import Target
from osscar.walk.walk import add_call

_SHARE = 0.04
"""What a probe may take of the time of all layers of its sort."""

_SMALL_ROWS = 192
"""Layers with fewer inputs are probed whole: their time is that of calls, not of products."""

_MOST_ROWS = 2048
"""Of a layer that is probed."""

_POSITIONS = 4096
"""What a layer is probed on at most."""

_NOISE = 0.1
"""Of an input's deviation, which is added so that few positions have the rank of many."""


@dataclass(frozen=True, eq=False)
class Sort:
    """Groups that cost the same.

    Parameters
    ----------
    groups
        The groups, in the order of the model.
    maps
        The consumers of the first of them.
    keep
        How many units the first of them keeps.
    """

    groups: tuple[CouplingGroup, ...]
    maps: tuple[LinearMap, ...] = field(repr=False)
    keep: int

    @property
    def rows(self) -> int:
        """How much the consumer that reads most reads."""
        return max(found.rows for found in self.maps)

    @property
    def weight_bytes(self) -> int:
        """What the weights that one group refits take."""
        shapes = [(found.read_weight().numel(), found.number_format) for found in self.maps]
        return sum(count * form.itemsize for count, form in shapes)


def sorts(
    ready: Opened, groups: Sequence[CouplingGroup], keep: Mapping[str, int], ran: TimedPass
) -> list[Sort]:
    """Part groups by all that their cost depends on."""
    found: dict[tuple[Any, ...], list[CouplingGroup]] = {}
    maps = {group.name: linear_maps(ready.model, group) for group in groups}
    for group in groups:
        forms = tuple(
            (
                type(one).__name__,
                one.rows,
                _weight_shape(one),
                one.number_format,
                one.has_bias,
                tuple(ran.shapes[one.name]),
            )
            for one in maps[group.name]
        )
        found.setdefault((group.units, forms), []).append(group)
    return [
        Sort(tuple(some), maps[some[0].name], round(sum(keep[g.name] for g in some) / len(some)))
        for some in found.values()
    ]


def _weight_shape(one: LinearMap) -> torch.Size:
    weight = getattr(one.module, one.parameters[0])
    assert isinstance(weight, Tensor)
    return weight.shape


@dataclass(frozen=True)
class LayerCosts:
    """What one group of a sort takes.

    Parameters
    ----------
    gram
        Seconds to sum up all positions.
    damping, solver
        To choose the damping; to solve and refit.
    factors
        To sum up what curvature needs of one sample; 0 if nothing does.
    curve
        To eliminate all units.
    """

    gram: float
    damping: Scaled
    solver: Scaled
    factors: float
    curve: Scaled


def layer_costs(
    ready: Opened,
    request: PruningRequest,
    sort: Sort,
    seen: Seen,
    *,
    samples: int,
    held: bool,
    curves: bool,
    clock: Clock,
) -> LayerCosts:
    """Sum up, solve and refit what one group of a sort read, or a part of it.

    Parameters
    ----------
    ready, request
        The model with its data, and what is asked for.
    sort
        The sort; what its first group read is in `seen`.
    seen
        What the consumers read and put out.
    samples
        Of how many samples that was.
    held
        Whether some samples are held out.
    curves
        Whether its curve is measured, too.
    clock
        What time is.
    """
    corrected = Target(request.target).needs_dense
    gram = _gram_seconds(sort, seen, ready.inputs.samples / samples, corrected, held, clock)
    layers = [read for one in sort.maps if len((read := _Read.of(one, seen[one.name])).X)]
    scales = _scales(sort, request)
    _solve(layers, sort, request, 0.0, corrected=corrected, held=held, clock=clock)  # to warm up
    found = [
        _solve(layers, sort, request, scale, corrected=corrected, held=held, clock=clock)
        for scale in scales
    ]
    exact = request.chosen_backend().kind is solvers.BackendKind.EXACT
    solver = _along(sort.rows, [(rows, s.get(Stage.SOLVER, 0.0)) for rows, s in found])
    if exact and scales[-1] < 1:  # no power of p bounds it
        solver = Scaled(solver.seconds, 0.0, float("inf"))
    factors, curve = 0.0, Scaled.certain(0.0)
    if curves:
        factors = _factor_seconds(ready, sort, seen, samples, clock)
        of_curve = [_curve(layers, sort, scale, clock) for scale in scales]
        curve = _along(sort.rows, of_curve)
    damping = _along(sort.rows, [(rows, s.get(Stage.DAMPING, 0.0)) for rows, s in found])
    return LayerCosts(gram, damping, solver, factors, curve)


def _along(rows: int, found: Sequence[tuple[int, float]]) -> Scaled:
    return Scaled.along(rows, found, spread=0.2)


def _scales(sort: Sort, request: PruningRequest) -> list[float]:
    """Return which shares of a layer to probe: all of it, or two parts."""
    whole = sort.rows <= _SMALL_ROWS or (request.certify and sort.groups[0].units <= EXACT_UNITS)
    scale = 1.0 if whole else min((_SHARE * len(sort.groups)) ** (1 / 3), 1.0)
    if not whole:
        scale = min(scale, _MOST_ROWS / sort.rows)
    return [scale] if scale == 1 else [scale / 2, scale]


def _gram_seconds(
    sort: Sort, seen: Seen, times: float, corrected: bool, held: bool, clock: Clock
) -> float:
    """Return what it takes to sum up all positions of one group, `times` as many as were seen."""
    seconds = 0.0
    for own in _by_module(sort.maps):
        grams = [GramAccumulator(one) for one in own]
        for x, y in seen[own[0].name]:
            took = []
            for _ in range(2):
                once = afresh(x)  # what is found out about a call is shared by its readers
                began = clock()
                for gram in grams:
                    add_call(gram, once, 0.1 * y if corrected else None, held=False)
                took.append(clock() - began)
            first, more = took
            seconds += times * more + (1 + held) * max(first - more, 0.0)
    return seconds


def _by_module(maps: Sequence[LinearMap]) -> list[list[LinearMap]]:
    """Part consumers by the module whose calls they read."""
    found: dict[str, list[LinearMap]] = {}
    for one in maps:
        found.setdefault(one.name, []).append(one)
    return list(found.values())


@dataclass(frozen=True, eq=False)
class _Read:
    """What a consumer read, as a matrix.

    Parameters
    ----------
    X
        Some positions, (n, p).
    Y
        What it put out there, (n, m).
    map
        The consumer.
    """

    X: Tensor = field(repr=False)
    Y: Tensor = field(repr=False)
    map: LinearMap

    @classmethod
    def of(cls, one: LinearMap, calls: Sequence[tuple[Any, Tensor]]) -> _Read:
        """Take the first positions of what was seen."""
        parts: list[Tensor] = []
        for part in one.read_inputs(calls[0][0]):
            parts.append(part[:_POSITIONS])
            if sum(map(len, parts)) >= _POSITIONS:
                break
        X = torch.cat(parts)[:_POSITIONS]
        return cls(X, one.read_outputs(calls[0][1], calls[0][0])[: len(X)], one)

    def part(self, units: int, share: float) -> tuple[FeatureMap, Tensor, Tensor]:
        """Return a linear layer that reads the first units and has a share of the outputs.

        With what it reads and puts out, of which there are twice as many positions as inputs: the
        first ones again, with noise.
        """
        own = self.map.unit_rows
        rows = [row for unit in own[:units] for row in unit]
        width = max(1, len(rows) // units)
        X = self.X[:, rows[: units * width]].float()
        outputs = max(1, round(self.Y.shape[1] * share))
        again = -(-2 * X.shape[1] // len(X))
        X, Y = X.repeat(again, 1), self.Y[:, :outputs].float().repeat(again, 1)
        X, Y = X[:_POSITIONS], Y[:_POSITIONS]
        generator = torch.Generator(X.device).manual_seed(0)
        X = X + _NOISE * X.std(0, correction=0) * torch.randn(
            X.shape, generator=generator, device=X.device
        )
        layer = nn.Linear(X.shape[1], outputs, bias=self.map.has_bias, device=X.device)
        layer.weight.detach().copy_(self.map.read_weight()[rows[: units * width], :outputs].T)
        slot = Slot("weight", 1, Role.CONSUMER, "probe", units, inner=width)
        every = torch.arange(X.shape[1])
        return FeatureMap("probe", layer, (slot,), every, self.map.has_bias), X, Y


def _part(sort: Sort, scale: float) -> tuple[int, int]:
    """Return how many units a part of a layer has, and how many it keeps."""
    units = sort.groups[0].units
    some = min(units, max(2, round(units * scale)))
    return some, min(max(1, round(some * sort.keep / units)), some - 1)


def _solve(
    layers: Sequence[_Read],
    sort: Sort,
    request: PruningRequest,
    scale: float,
    *,
    corrected: bool,
    held: bool,
    clock: Clock,
) -> tuple[int, dict[Stage, float]]:
    """Solve a part of a layer; return its rows, and the seconds by phase."""
    units, keep = _part(sort, scale)
    grams = []
    for read in layers:
        linear, X, Y = read.part(units, units / sort.groups[0].units)
        gram = GramAccumulator(linear)
        fitted = max(1, len(X) * 7 // 8)
        D = 0.1 * Y if corrected else None
        gram.add(X[:fitted], None if D is None else D[:fitted])
        if held:
            gram.add(X[fitted:], None if D is None else D[fitted:], held=True)
        grams.append(gram)
    group = CouplingGroup("probe", sort.groups[0].kind, units, grams[0].linear_map.slots, 0)
    with warnings.catch_warnings(), profiled(clock) as spent:
        warnings.simplefilter("ignore", UserWarning)
        solved(Site(group, tuple(grams)), keep, request, 0.0)
    return max(gram.linear_map.rows for gram in grams), spent.seconds


# ---- curvature ---------------------------------------------------------------------------


def backward_seconds(
    ready: Opened, sort: Sort, samples: int, factor_seconds: float, clock: Clock
) -> float:
    """Return what a forward and a backward pass of one sample take, without the sums.

    Parameters
    ----------
    ready
        The model.
    sort
        That of the layer which is read first, so that gradients flow through all others.
    samples
        How many to run.
    factor_seconds
        What the sums of one of its groups take a sample.
    clock
        What time is.
    """
    [batch, *_] = small_batches(ready, curve_samples(ready))
    batch = ready.inputs.rows(batch, 0, samples)
    factors = [_factors(ready, one) for one in sort.maps]
    generator = torch.Generator(device_of(ready.model)).manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        began = clock()
        one_pass(ready, batch, factors, generator)
        seconds = clock() - began
    count = ready.inputs.count(batch)
    return max(seconds / count - factor_seconds, 0.0)


def _factors(ready: Opened, one: LinearMap) -> Factors:
    found = Factors.of(one)
    found.axis = 0 if isinstance(ready.inputs, TensorInputs) else None
    return found


def _factor_seconds(ready: Opened, sort: Sort, seen: Seen, samples: int, clock: Clock) -> float:
    """Return what the sums of one group take a sample."""
    seconds = 0.0
    for own in _by_module(sort.maps):
        factors = [_factors(ready, one) for one in own]
        for x, y in seen[own[0].name]:
            axis = factors[0].axis
            apart = axis is not None and isinstance(x, Tensor) and len(x) == samples
            for once in (afresh(x), afresh(x)):  # the first to warm up
                began = clock()
                for one in factors:
                    one.add(once, y, samples if apart else None)
                took = clock() - began
            seconds += took / samples
    return seconds


def _curve(layers: Sequence[_Read], sort: Sort, scale: float, clock: Clock) -> tuple[int, float]:
    """Eliminate all units of a part of a layer; return its rows and seconds."""
    units, _ = _part(sort, scale)
    consumers, spent = [], 0.0
    for read in layers:
        linear, X, Y = read.part(units, units / sort.groups[0].units)
        factors = Factors.of(linear)
        factors.add(X, Y + torch.randn_like(Y) * Y.std(), None)
        began = clock()
        consumers.append(factors.consumer(factors.weights(len(X)), 0.3))
        spent += clock() - began
    began = clock()
    elimination_curve(solvers.SubsetProblem(tuple(consumers), units, "probe"))
    return max(len(c.hessian) for c in consumers), spent + clock() - began
