"""What keeping some experts of a mixture costs in the outputs of the whole model: measured alone.

Nothing predicts it: experts that leave hand their tokens to others, of which the gradients of the
dense model know nothing.  So each mixture by itself loses experts on the dense stream, one after
the other, is refitted at a few counts, and samples that no refit has seen tell how far predictions
move.  Between these counts, and beyond them, a curve has the form of the mixture's own loss.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import solvers
from graph import CouplingGroup
from osscar.allocation.curves import Curve, curve_samples
from osscar.allocation.measured import FEWEST, Compared, compared_samples
from osscar.allocation.widths import possible_widths
from osscar.base.errors import RequestError
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.preparation.expert_lists import called_as_mixtures
from osscar.preparation.experts import ExpertMixture
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest
from osscar.walk.expert_walk import ExpertStep, ExpertWalk
from osscar.walk.targets import Target

_COUNTS = 4
"""At how many counts of experts a mixture is measured, at most."""


def expert_curves(
    prepared: Prepared, groups: Sequence[CouplingGroup], request: PruningRequest
) -> dict[str, Curve]:
    """Return the curve of each mixture that shares a budget, by the name of its group.

    The model is as it was afterwards.

    Raises
    ------
    RequestError
        If predictions cannot be compared.
    """
    names = {group.name for group in groups}
    mixtures = [one for one in prepared.mixtures if one.group.name in names]
    if not mixtures:
        return {}
    samples = compared_samples(prepared)
    with called_as_mixtures(prepared.model, [one.listed for one in mixtures if one.listed]):
        return _measured(prepared, mixtures, samples, request)


def _measured(
    prepared: Prepared, mixtures: Sequence[ExpertMixture], samples: int, request: PruningRequest
) -> dict[str, Curve]:
    """Measure the curve of each mixture, in the order of the model."""
    stations = {name for one in mixtures for name in (one.router, one.experts)}
    compared = Compared.of(prepared, stations, samples) if samples else None
    if compared is None:
        why = f"no output of {type(prepared.model).__name__} is known to be scores of classes"
        if not samples:
            count = prepared.inputs.samples
            why = f"there are {count} samples in all, too few to keep some apart; give {FEWEST}"
        raise RequestError(
            f"what experts are worth is measured by predictions, and {why}; or say what each "
            "mixture keeps (--experts 0.75)"
        )
    rest = prepared.inputs.samples - compared.reference.inputs.samples
    few = dataclasses.replace(
        prepared, inputs=prepared.inputs.part(0, min(rest, curve_samples(prepared)))
    )
    held = max(1, few.inputs.samples // FEWEST)
    found: dict[str, Curve] = {}
    with stage("measuring curves of experts", total=len(mixtures)) as bar:
        for step in ExpertWalk(few, mixtures, Target.WEIGHTS, held, {}, {}):
            with timed(Stage.MEASURED), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
                found[step.group.name] = _curve(step, compared, request)
            bar.advance()
    return found


def _curve(step: ExpertStep, compared: Compared, request: PruningRequest) -> Curve:
    """Remove experts of a mixture, one after the other, and measure at some counts."""
    group, mixture = step.group, step.mixture
    options = possible_widths(group, request.widths)
    fewer = options[options < group.units]
    if not len(fewer):
        return Curve(group.name, np.zeros(group.units + 1))
    problem = step.problem(int(fewer[0]))
    curve = Curve(group.name, _losses(problem), comparable=False)
    measured = fewer[np.unique(np.linspace(0, len(fewer) - 1, _COUNTS).round().astype(int))]
    for keep in measured.tolist():
        support = solvers.solve_experts(problem.with_keep(keep), "greedy").support.tolist()
        with step.tried(support):
            refitted = step.refit()
            damp, refitted.correction_weight = refitted.regularization(
                refitted.group.units, request.damp
            )
            units = range(refitted.group.units)
            fit = refitted.problem(len(units), damp)
            weights, _ = solvers.refit(fit, torch.tensor(units))
            weights = refitted.refits(weights, units).weights
            with refitted.tried(weights, units):
                nats = compared.divergence({mixture.router, mixture.experts})
        curve = curve.through(keep, nats)
    return curve


def _losses(problem: solvers.ExpertProblem) -> NDArray[np.float64]:
    """Return the relative loss with k experts, (experts + 1,), as they leave one by one.

    With fewer than the router needs it is that of the fewest.
    """
    history = solvers.solve_experts(problem, "greedy").history
    risen = np.maximum.accumulate([0.0, *history[1:]]) / problem.scale
    return np.concatenate([np.full(problem.keep, risen[-1]), risen[::-1]])
