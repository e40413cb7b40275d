"""What keeping k of a group's units costs in the outputs of the whole model, for every k."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.capture.curvature import curvature
from osscar.capture.opened import Opened
from osscar.core.json_files import parse_json
from osscar.core.phases import Phase, phase
from osscar.core.ranks import Message, Ranks
from solvers import SubsetProblem
from solvers.elimination import eliminate

_TOKENS = 8192
_SAMPLES = 128
"""Tokens of a language model, or samples of any other, that curvature is measured on at most."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The predicted divergence of a model of which one group has lost units.

    Parameters
    ----------
    name
        The group.
    losses
        (units + 1,): with k units left, the Kullback-Leibler divergence of the model's predictions
        from the dense ones, in nats a prediction; does not increase with k, and ends with 0.
    comparable
        Whether it is that, or, as no gradient reaches the group, the loss of its consumers relative
        to their own outputs.
    """

    name: str
    losses: NDArray[np.float64] = field(repr=False)
    comparable: bool = True


def measure_curves(
    ready: Opened, groups: Sequence[CouplingGroup], *, damp: float, seed: int
) -> Iterator[Curve]:
    """Yield a curve for each group; see `osscar.capture.curvature`.

    Parameters
    ----------
    ready
        The dense model with its data.
    groups
        The groups.
    damp
        Weight of the proximal term, relative to each entry on the Gram matrix's diagonal.
    seed
        Of the labels that are sampled.

    Raises
    ------
    NonFiniteError
        If gradients are not finite.
    """
    measured = curvature(ready, groups, samples=curve_samples(ready), seed=seed)
    while True:
        with phase(Phase.CURVATURE):  # not while others look at what is yielded
            found = next(measured, None)
        if found is None:
            return
        with phase(Phase.CURVES):
            losses = elimination_curve(found.problem(damp))
        yield Curve(found.group.name, losses, found.reached)


def curve_samples(ready: Opened) -> int:
    """Return on how many samples curvature is measured at most."""
    length = ready.inputs.settings.get("seqlen")
    return _SAMPLES if length is None else max(1, _TOKENS // length)


def told_curves(ranks: Ranks, mine: Sequence[Curve]) -> dict[str, Curve]:
    """Return the curves of all ranks, by group.

    Parameters
    ----------
    ranks
        Among which the groups are shared out.
    mine
        Those of this rank's groups.
    """
    words = json.dumps({curve.name: curve.comparable for curve in mine})
    losses = {curve.name: torch.from_numpy(curve.losses) for curve in mine}
    return {
        name: Curve(name, told.tensors[name].numpy(), comparable)
        for told in ranks.from_all("curves", Message(words, losses))
        for name, comparable in parse_json(told.text, dict[str, bool], "curves").items()
    }


def elimination_curve(problem: SubsetProblem) -> NDArray[np.float64]:
    """Return the loss with k units left, (units + 1,), as units leave one by one.

    Each step takes the unit that costs least; the last of them costs what is left.
    """
    removals = eliminate(problem, problem.units - 1) if problem.units > 1 else []
    risen = np.maximum([removal.loss for removal in removals], 0.0)
    losses = np.concatenate([[0.0], np.cumsum(risen)])
    whole = max(problem.scale, float(losses[-1]))
    return np.concatenate([[whole], losses[::-1]])
