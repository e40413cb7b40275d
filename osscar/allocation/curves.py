"""What keeping k of a group's units costs in the outputs of the whole model, for every k."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.curvature import GroupCurvature, curvature
from osscar.base.timing import Stage, timed
from osscar.preparation.prepare import Prepared
from osscar.walk.regularization import DAMPS, DEFAULT_DAMP
from solvers import SubsetProblem
from solvers.closed_forms.elimination import Removals, eliminate, support_after

_TOKENS = 4096
_SAMPLES = 128
"""Tokens of a language model, or samples of any other, that curvature is measured on at most."""

_LEAST_DAMP = 1e-4
"""Of refits that held-out samples look at, so that none is singular."""


MOST = 10.0
"""How many times as much as was predicted, or what part of it, a measurement is believed at most:
of SmolLM2-135M's groups it was 0.8 to 4.4 times, but for the neurons of the last layer."""

LEAST_NATS = 1e-7
"""What is measured below this is rounding of logits."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The divergence of a model of which one group has lost units.

    `predicted`, (units + 1,), does not increase with the k units that are left, and ends with 0:
    the Kullback-Leibler divergence of the model's predictions from the dense ones, in nats a
    prediction.  Where it is not `comparable`, as no gradient reaches the group, it is the loss of
    the group's consumers relative to their own outputs.  `measured` is what predictions diverged by
    with so many units.
    """

    name: str
    predicted: NDArray[np.float64] = field(repr=False)
    comparable: bool = True
    measured: Mapping[int, float] = field(default_factory=dict)

    @property
    def in_nats(self) -> bool:
        """Whether the losses are divergences, which those of other groups compare with."""
        return self.comparable or bool(self.measured)

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """What was predicted, through what was measured.

        Between two widths that were measured it is a power of what was predicted, and beyond them a
        multiple.
        """
        losses = self.corrected(self.predicted)
        return np.maximum.accumulate(losses[::-1])[::-1]  # but for rounding, it is that

    def corrected(self, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what measurements make of predicted losses: a function that does not decrease."""
        measured = {k: nats for k, nats in self.measured.items() if self.predicted[k] > 0}
        points = self._points(measured)
        if not points:
            return predicted
        losses = predicted.copy()
        known = losses > 0  # units that do nothing do nothing
        x, y = np.log(np.array(sorted(points.items()))).T
        at = np.log(losses[known])
        inside = np.clip(at, x[0], x[-1])
        losses[known] = np.exp(np.interp(inside, x, y) + at - inside)
        return losses

    def through(self, kept: int, nats: float) -> Curve:
        """Return a curve that also goes through what was measured with so many units."""
        return dataclasses.replace(self, measured={**self.measured, kept: nats})

    def _points(self, measured: Mapping[int, float]) -> dict[float, float]:
        """Return what is believed at some of the predicted losses; neither decreases.

        Where these are of something else than nats, any multiple will do; otherwise one within
        `MOST`, since what is measured of nearly nothing is noise.
        """
        points: dict[float, float] = {}
        least = LEAST_NATS
        for kept, nats in sorted(measured.items(), reverse=True):
            predicted = float(self.predicted[kept])
            if self.comparable:
                nats = min(max(nats, predicted / MOST), predicted * MOST)
            points[predicted] = least = max(nats, least)
        return points


def measure_curves(
    prepared: Prepared, groups: Sequence[CouplingGroup], *, damp: float | None, seed: int
) -> Iterator[Curve]:
    """Yield a curve for each group; see `osscar.allocation.curvature`.

    `damp` is relative to each entry on the Gram matrix's diagonal; without it, what serves held-out
    samples best, or the default where there are none.
    """
    for found in measure_curvatures(prepared, groups, seed=seed):
        with timed(Stage.CURVES):
            losses = Prediction.of(found, damp).losses
        yield Curve(found.group.name, losses, found.reached)


def measure_curvatures(
    prepared: Prepared, groups: Sequence[CouplingGroup], *, seed: int
) -> Iterator[GroupCurvature]:
    """Yield what curves are computed from; the same each time."""
    measured = curvature(prepared, groups, samples=curve_samples(prepared), seed=seed)
    while True:
        with timed(Stage.CURVATURE):  # not while others look at what is yielded
            found = next(measured, None)
        if found is None:
            return
        yield found


def curve_samples(prepared: Prepared) -> int:
    """Return on how many samples curvature is measured at most."""
    length = prepared.inputs.settings.get("seqlen")
    return _SAMPLES if length is None else max(1, _TOKENS // length)


def elimination_curve(problem: SubsetProblem) -> NDArray[np.float64]:
    """Return the loss with k units left, (units + 1,), as units leave one by one.

    Each step takes the unit that costs least; the last of them costs what is left.
    """
    return summed_losses(problem, _eliminated(problem))


def _eliminated(problem: SubsetProblem) -> Removals:
    return eliminate(problem, problem.units - 1) if problem.units > 1 else []


def summed_losses(problem: SubsetProblem, removals: Removals) -> NDArray[np.float64]:
    """Return the loss with k units left, (units + 1,), given how all but one left."""
    risen = np.maximum([risen for _, risen in removals], 0.0)
    losses = np.concatenate([[0.0], np.cumsum(risen)])
    whole = max(problem.empty_loss, float(losses[-1]))
    return np.concatenate([[whole], losses[::-1]])


# ---- on samples that were held out -------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prediction:
    """The divergence that is predicted of a choice of units: its loss in a problem, times a factor.

    `losses`, (units + 1,), are those of the choices in which units leave one by one.  The factor is
    1 unless samples were held out.  Damping counts as a loss, as if nothing made up for a unit, and
    samples that weights are fitted to are fitted the better the fewer they are: one errs where a
    layer reads samples at many positions, the other where at few.  So the damping is what serves
    held-out samples best, with half of the units, and losses are scaled to what they lose then.
    """

    problem: SubsetProblem
    losses: NDArray[np.float64] = field(repr=False)
    factor: float = 1.0

    @classmethod
    def of(cls, found: GroupCurvature, damp: float | None) -> Prediction:
        """Pose the problem of a group, and remove its units one by one."""
        half = found.group.units // 2
        if not found.holds_out or not half:
            problem = found.problem(DEFAULT_DAMP if damp is None else damp)
            return cls(problem, elimination_curve(problem))
        if damp is None:
            damp = _best_damp(found, half)
        problem = found.problem(damp)
        removals = _eliminated(problem)
        losses = summed_losses(problem, removals)
        kept = support_after(removals[: found.group.units - half], problem)
        held = found.held_loss(max(damp, _LEAST_DAMP), kept)
        factor = held / losses[half] if held > 0 and losses[half] > 0 else 1.0
        return cls(problem, losses * factor, factor)


def _best_damp(found: GroupCurvature, keep: int) -> float:
    """Return the damping whose refit serves held-out samples best.

    The units kept are those that the default leaves: what is best hardly depends on them.
    """
    problem = found.problem(DEFAULT_DAMP)
    kept = support_after(eliminate(problem, found.group.units - keep), problem)
    return min(DAMPS, key=lambda damp: found.held_loss(max(damp, _LEAST_DAMP), kept))
