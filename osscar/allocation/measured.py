"""Curves of groups, measured by forward passes, at about the widths that groups come to keep.

Widths are chosen, with equal shares at first.  A group by itself then loses as many units: it is
refitted on the dense stream, put into the dense model, and taken out again.  Samples that no refit
has seen tell how far outputs move.  With the curves through what was measured, widths are chosen
anew, and groups whose widths have moved are measured again.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.curves import Curve
from osscar.allocation.divergence import Measure, Reference
from osscar.allocation.widths import possible_widths
from osscar.base.errors import NonFiniteError, RequestError, warn
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.kinds import Step, room_of
from osscar.network.modules import device_of
from osscar.offload.on_disk import room_for
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest, Widths
from osscar.walk.layer_step import LayerStep
from osscar.walk.walk import walk
from solvers import SubsetProblem
from solvers.closed_forms.elimination import Removals, eliminate, support_after
from solvers.closed_forms.refit import refit

_COMPARED_TOKENS, _COMPARED_SAMPLES = 1024, 100
"""Tokens of a language model, or samples of any other, on which outputs are compared at most."""

_FITTED_TOKENS, _FITTED_SAMPLES = 4096, 128
"""The same, to which a group that is pruned alone is refitted."""

FEWEST = 4
"""One in so many samples is compared at most, so that there are as many at least."""

_ROUNDS = 3
"""How often widths are chosen, and groups measured at them."""

_MATTERS = 0.01
"""Share of the sum of all losses below which ten times the loss of a group is left unmeasured."""

_NEAR = 0.15
"""Share of a group's units: a measurement counts as one at a width that is no farther away."""


def compared_samples(prepared: Prepared) -> int:
    """Return on how many samples, the last ones, outputs are compared; 0: there are too few."""
    length = prepared.inputs.settings.get("seqlen")
    wanted = _COMPARED_SAMPLES if length is None else max(1, _COMPARED_TOKENS // length)
    return min(wanted, prepared.inputs.samples // FEWEST)


def fitted_samples(prepared: Prepared) -> int:
    """Return to how many samples, the first ones, groups are refitted."""
    length = prepared.inputs.settings.get("seqlen")
    wanted = _FITTED_SAMPLES if length is None else max(1, _FITTED_TOKENS // length)
    return min(wanted, prepared.inputs.samples - compared_samples(prepared))


def measured_curves(
    prepared: Prepared,
    request: PruningRequest,
    groups: Sequence[CouplingGroup],
    choose: Callable[[Mapping[str, Curve] | None], Mapping[str, int]],
) -> tuple[dict[str, Curve], Measure]:
    """Return the curve of each group that shares a budget, and what they count.

    That is ``nats``, the divergence of predictions, or ``relative``, the squared error of outputs
    over the squares of the dense ones, where these are no scores.  All ranks take part, and the
    model is as it was afterwards.

    Parameters
    ----------
    choose
        Returns what groups keep by some curves, or in equal shares without any.

    Warns
    -----
    UserWarning
        Of groups that are not measured again since weights or outputs overflow.

    Raises
    ------
    RequestError
        If there are too few samples.
    NonFiniteError
        If a group overflows that was not measured before.
    """
    samples = compared_samples(prepared)
    if not samples:
        raise RequestError(
            f"--allocation measured compares outputs on samples that no weight is fitted to, and "
            f"there are {prepared.inputs.samples} in all; give at least {FEWEST}, or --allocation "
            "uniform"
        )
    size = 1 if prepared.inputs.tokens else prepared.batch_size
    reference = Reference.of_last(prepared, samples, size)
    few = dataclasses.replace(prepared, inputs=prepared.inputs.part(0, fitted_samples(prepared)))
    curves: dict[str, Curve] = {}
    for _ in range(_ROUNDS):
        wanted = widths_to_measure(groups, choose(curves or None), curves, request.widths)
        some = [group for group in groups if group.name in wanted]
        with stage("measuring curves", total=len(some)) as bar:
            for step in _steps(few, some) if some else ():
                _measure(step, wanted[step.group.name], request, few, reference, curves)
                bar.advance()
        for group in groups:  # what has no other width keeps all its units
            curves.setdefault(group.name, Curve(group.name, np.zeros(group.units + 1)))
    return curves, reference.distance.measure


def widths_to_measure(
    groups: Sequence[CouplingGroup],
    keep: Mapping[str, int],
    curves: Mapping[str, Curve],
    widths: Widths,
) -> dict[str, int]:
    """Return at which width each group is to be measured: about what it is to keep.

    One that keeps all its units is measured at the share that all keep.  Left out are groups that
    were measured at about that width, and those whose loss is too small to matter.
    """
    share = sum(keep[group.name] for group in groups) / sum(group.units for group in groups)
    total = sum(float(curve.losses[keep[name]]) for name, curve in curves.items())
    found: dict[str, int] = {}
    for group in groups:
        options = possible_widths(group, widths)
        options = options[options < group.units]
        if not len(options):
            continue
        kept = keep[group.name] if keep[group.name] < group.units else share * group.units
        width = int(options[np.abs(options - kept).argmin()])
        curve = curves.get(group.name)
        if curve is not None:
            matters = 10 * curve.losses[width] > _MATTERS * total
            near = any(abs(width - known) <= _NEAR * group.units for known in curve.measured)
            if not matters or near or keep[group.name] == group.units:
                continue
        found[group.name] = width
    return found


# ---- one group alone ---------------------------------------------------------------------


def _steps(few: Prepared, groups: Sequence[CouplingGroup]) -> Iterator[LayerStep | Step]:
    """Yield groups as the dense stream reaches them, and then those that are routed."""
    units = [group for group in groups if not group.kind.routed]
    if units:
        # Layers of a language model all read as many tokens; others differ in how well they fit.
        held = 0 if few.inputs.tokens else few.inputs.samples // FEWEST
        yield from walk(few, units, in_turn=False, held=held)
    for kind in dict.fromkeys(group.kind for group in groups if group.kind.routed):
        own = [group for group in groups if group.kind is kind]
        yield from room_of(kind).steps(few, own, held=max(1, few.inputs.samples // FEWEST))


def _measure(
    step: LayerStep | Step,
    keep: int,
    request: PruningRequest,
    few: Prepared,
    reference: Reference,
    curves: dict[str, Curve],
) -> None:
    """Put a curve through what the model comes to with one group pruned to a width."""
    name, known = step.group.name, step.group.name in curves
    without = (
        _without_units(step, keep, request.damp, few, shaped=not known)
        if isinstance(step, LayerStep)
        else step.alone(keep, request.damp, shaped=not known)
    )
    try:
        with without as shape, timed(Stage.MEASURED):
            distance = reference.divergence(few.model)
    except NonFiniteError as error:
        alone = f"{name!r} pruned alone cannot be measured: {error}"
        if not known:
            raise NonFiniteError(alone) from error
        warn(f"{alone}; its curve stays as it was")
        return
    curve = curves[name] if known else Curve(name, shape)
    curves[name] = curve.through(keep, distance)


@contextmanager
def _without_units(
    step: LayerStep, keep: int, damp: float | None, few: Prepared, shaped: bool
) -> Iterator[NDArray[np.float64]]:
    """Have the first rank remove units, one by one, and refit what stays, while the block runs.

    Yielded is the shape of the group's curve, if that is asked for.
    """

    def make() -> tuple[list[torch.Tensor], list[int], NDArray[np.float64]]:
        with timed(Stage.MEASURED), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
            problem = step.problem(keep, step.regularization(keep, damp, 0.0)[0])
            gone = problem.units - keep
            removals = eliminate(problem, problem.units - 1 if shaped else gone)
            kept = support_after(removals[:gone], problem)
            weights, _ = refit(problem, kept)
            refits = step.refits(weights, kept.tolist())
            shape = summed_losses(problem, removals) if shaped else np.zeros(0)
        moved = [W if few.ranks.alone else W.cpu() for W in refits.weights]
        return moved, kept.tolist(), shape

    inputs = " and ".join(str(consumer.rows) for consumer in step.consumers)
    what = f"the problem of {step.group.name!r} with {inputs} inputs"
    with memory_for(what, FOR_MATRICES), room_for(few.model, few.matrix_bytes):
        weights, kept, shape = few.ranks.broadcast("a group that was pruned by itself", make)
    with step.tried([W.to(device_of(few.model)) for W in weights], kept):
        yield shape


def summed_losses(problem: SubsetProblem, removals: Removals) -> NDArray[np.float64]:
    """Return the loss with k units left, (units + 1,), given how all but one left.

    It is relative to that without any.
    """
    risen = np.maximum([risen for _, risen in removals], 0.0)
    losses = np.concatenate([[0.0], np.cumsum(risen)])
    whole = max(problem.empty_loss, float(losses[-1]))
    return np.concatenate([[whole], losses[::-1]])
