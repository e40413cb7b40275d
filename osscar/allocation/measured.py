"""What keeping k of a group's units costs in the outputs of the whole model, for every k.

Widths are chosen in equal shares, or by curves that are known.  A group by itself then loses as
many units: it is refitted on the dense stream, put into the dense model, and taken out again.
Samples that no refit has seen tell how far outputs move, in passes that go on where the group is
read.  The curve goes through what was measured, and has the shape of what the group's own consumers
lose.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.budget import Budget
from osscar.allocation.divergence import Distance, Measure, Reference, picks_predictions
from osscar.allocation.task import PruningTask
from osscar.allocation.widths import possible_widths
from osscar.base.errors import NonFiniteError, RequestError, warn
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.kinds import Step, room_of
from osscar.network.modules import device_of
from osscar.offload.on_disk import room_for
from osscar.preparation.prepare import Prepared
from osscar.request import Widths
from osscar.walk.layer_step import LayerStep
from osscar.walk.walk import Walk
from solvers import SubsetProblem
from solvers.closed_forms.elimination import Removals, eliminate, support_after
from solvers.closed_forms.refit import refit

_COMPARED_TOKENS, _COMPARED_SAMPLES = 2048, 128
"""Tokens of a language model, or samples of any other, on which outputs are compared at most.

Texts differ by a factor of six in what an early layer costs."""

_CLOSE = 0.005
"""In bfloat16 distances come out about 0.001 nats higher (docs/results.md): what comes out closer
than this, or is not finite, is measured once more in float32."""

_WINDOW = 1024
"""Most tokens of a window that are compared."""

_PREDICTIONS = 4
"""One prediction in so many is compared: those of one text say much the same, and the head of a
small language model is a third of it."""

_FITTED_TOKENS, _FITTED_SAMPLES = 4096, 64
"""Tokens, or samples, to which a group that is pruned alone is refitted at most."""

_ONE_IN = 4
"""Of few samples, one in so many is compared, so that at least so many are needed.  Of those to
which groups are refitted, one in so many judges the fits, where layers differ in how well they fit.
"""

LEAST = 1e-7
"""What is measured below this is rounding of logits."""

_MATTERS = 0.01
"""Share of the sum of all losses below which ten times the loss of a group is left unmeasured."""

_NEAR = 0.15
"""Share of a group's units: a measurement counts as one at a width that is no farther away."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The distance from the dense model of one in which a group has lost units."""

    name: str
    shape: NDArray[np.float64] = field(repr=False)
    """What its consumers lose, (units + 1,), with k units left, relative to their own outputs; it
    does not increase, and ends with 0."""
    measured: Mapping[int, float] = field(default_factory=dict)
    """How far the model's outputs are from the dense ones with so many units."""

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """The shape through what was measured, (units + 1,), which does not increase either.

        Between two widths that were measured it is a power of the shape, and beyond them a
        multiple; without any, the shape itself.
        """
        points: dict[float, float] = {}
        least = LEAST
        for kept, distance in sorted(self.measured.items(), reverse=True):
            if self.shape[kept] > 0:  # units that do nothing do nothing
                points[float(self.shape[kept])] = least = max(distance, least)
        losses = self.shape.copy()
        if points:
            known = losses > 0
            x, y = np.log(np.array(sorted(points.items()))).T
            at = np.log(losses[known])
            inside = np.clip(at, x[0], x[-1])
            losses[known] = np.exp(np.interp(inside, x, y) + at - inside)
        return np.maximum.accumulate(losses[::-1])[::-1]  # but for rounding, it is that

    def through(self, kept: int, distance: float) -> Curve:
        """Return a curve that also goes through what was measured with so many units."""
        return dataclasses.replace(self, measured={**self.measured, kept: distance})


def compared_samples(prepared: Prepared) -> int:
    """Return on how many samples, the last ones, outputs are compared."""
    length = prepared.inputs.settings.get("seqlen")
    wanted = _COMPARED_SAMPLES
    if length is not None:
        wanted = max(1, _COMPARED_TOKENS // min(length, _WINDOW))
    return min(wanted, prepared.inputs.samples - fitted_samples(prepared))


def fitted_samples(prepared: Prepared) -> int:
    """Return to how many samples, the first ones, groups are refitted."""
    length = prepared.inputs.settings.get("seqlen")
    wanted = _FITTED_SAMPLES if length is None else max(2, _FITTED_TOKENS // length)
    samples = prepared.inputs.samples
    return min(wanted, samples - samples // _ONE_IN)


def dense_references(prepared: Prepared, samples: int) -> tuple[Reference, Reference | None]:
    """Run a prepared model, which is still dense, on its last samples.

    Returned is what it puts out in float32, and in bfloat16, if most distances are measured in that
    (`Prepared.bfloat16`).
    """
    model, last = prepared.model, prepared.inputs.part(-samples)
    size, step = prepared.batch_size, 1
    if last.tokens:
        windows = {name: tokens[:, :_WINDOW] for name, tokens in last.tensors.items()}
        last, size, step = dataclasses.replace(last, tensors=windows), 1, _PREDICTIONS
        if picks_predictions(model, last):  # several take no more memory for logits than one whole
            size = min(step, prepared.batch_size, -(-samples // prepared.ranks.size))
    distance = Distance.of(model, last, last.batches(model, 1)[0])
    # What torch.cond and the like call cannot be captured in a mode, nor again after it was tried.
    captures = any(hasattr(torch.ops.higher_order, o.target) for o in prepared.traced.operators)
    arguments = distance, model, last.batches(model, size), prepared.ranks, step
    run = partial(Reference.of, *arguments, resumable=not captures)
    half = distance.measure == "nats" and prepared.bfloat16
    return run(), run(bfloat16=True) if half else None


def measured_curves(
    task: PruningTask,
    choose: Callable[[Mapping[str, Curve] | None], Mapping[str, int]],
    before: Budget | None = None,
) -> tuple[dict[str, Curve], Measure]:
    """Return the curve of each group that shares a budget, and what distances are measured in.

    All ranks take part, and the model is as it was afterwards.

    Parameters
    ----------
    choose
        Returns what groups keep by some curves, or in equal shares without any.
    before
        A budget with whose curves to begin; they are measured again where widths have moved.

    A `RequestError` is raised if there are too few samples, and a `NonFiniteError` if a group
    overflows that was not measured before; others keep their curves, with a warning.
    """
    prepared, groups = task.prepared, task.shared
    if prepared.inputs.samples < _ONE_IN:
        raise RequestError(
            f"--allocation measured takes {_ONE_IN} calibration samples or more, of which some are "
            f"held out, and there are {prepared.inputs.samples}; give more, or --allocation uniform"
        )
    reference, rough = dense_references(prepared, compared_samples(prepared))
    few = dataclasses.replace(prepared, inputs=prepared.inputs.part(0, fitted_samples(prepared)))
    curves = {} if before is None else known_curves(before)
    alone = _Alone(dataclasses.replace(task, prepared=few), reference, rough, curves)
    wanted = widths_to_measure(groups, choose(curves or None), curves, task.request.widths)
    some = [group for group in groups if group.name in wanted]
    with stage("measuring curves", total=len(some)) as bar:
        for step in _steps(few, some) if some else ():
            alone.measure(step, wanted[step.group.name])
            bar.advance()
    for group in groups:  # what has no other width keeps all its units
        curves.setdefault(group.name, Curve(group.name, np.zeros(group.units + 1)))
    return curves, reference.distance.measure


def known_curves(budget: Budget) -> dict[str, Curve]:
    """Return the curves by which a budget was shared out."""
    curves = {name: Curve(name, np.array(losses)) for name, losses in budget.curves.items()}
    for name, points in budget.measured.items():
        for point in points if name in curves else ():
            curves[name] = curves[name].through(point.kept, point.distance)
    return curves


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


def _steps(few: Prepared, groups: Sequence[CouplingGroup]) -> Iterator[LayerStep | Step]:
    """Yield groups as the dense stream reaches them, and then those that are routed."""
    units = [group for group in groups if not group.kind.routed]
    if units:
        # Layers of a language model all read as many tokens; others differ in how well they fit.
        held = 0 if few.inputs.tokens else few.inputs.samples // _ONE_IN
        yield from Walk(few, units, in_turn=False, held=held, rough=True)
    for kind in dict.fromkeys(group.kind for group in groups if group.kind.routed):
        own = [group for group in groups if group.kind is kind]
        yield from room_of(kind).steps(few, own, held=max(1, few.inputs.samples // _ONE_IN))


@dataclass(eq=False)
class _Alone:
    """Measures what the model comes to with one group alone pruned to a width."""

    task: PruningTask
    """With the samples to which a group is refitted."""
    reference: Reference
    rough: Reference | None
    """The same in bfloat16."""
    curves: dict[str, Curve]

    def measure(self, step: LayerStep | Step, keep: int) -> None:
        """Put a curve through the distance of the model with this group pruned to a width."""
        group, known = step.group.name, step.group.name in self.curves
        without: AbstractContextManager[NDArray[np.float64]]
        changed = None
        if isinstance(step, LayerStep):
            without = self._without_units(step, keep)
            changed = [getattr(c.module, name) for c in step.consumers for name in c.parameters]
        else:
            without = step.alone(keep, self.task.request.damp, shaped=not known)
        try:
            with without as shape, timed(Stage.MEASURED):
                distance, model = 0.0, self.task.prepared.model
                if self.rough is not None:
                    distance = self.rough.compared(model, changed).distance
                if not _CLOSE <= distance < math.inf:
                    distance = self.reference.divergence(model, changed)
        except NonFiniteError as error:
            alone = f"{group!r} pruned alone cannot be measured: {error}"
            if not known:
                raise NonFiniteError(alone) from error
            warn(f"{alone}; its loss curve keeps the earlier measurements")
            return
        curve = self.curves[group] if known else Curve(group, shape)
        self.curves[group] = curve.through(keep, distance)

    @contextmanager
    def _without_units(self, step: LayerStep, keep: int) -> Iterator[NDArray[np.float64]]:
        """Let the model run with the units that stay refitted, as the first rank chooses them.

        Units are removed one by one.  Yielded is the shape of the group's curve.
        """
        few, damp = self.task.prepared, self.task.request.damp

        def refitted() -> tuple[list[torch.Tensor], list[int], NDArray[np.float64]]:
            with timed(Stage.MEASURED), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
                problem = step.problem(keep, step.regularization(keep, damp, 0.0)[0])
                removals = eliminate(problem, problem.units - 1)
                kept = support_after(removals[: problem.units - keep], problem)
                refits = step.refits(refit(problem, kept)[0], kept.tolist())
                shape = summed_losses(problem, removals)
            moved = [W if few.ranks.alone else W.cpu() for W in refits.weights]
            return moved, kept.tolist(), shape

        inputs = " and ".join(str(consumer.rows) for consumer in step.consumers)
        what = f"the problem of {step.group.name!r} with {inputs} inputs"
        with memory_for(what, FOR_MATRICES), room_for(few.model, self.task.matrix_bytes):
            alone = few.ranks.broadcast("a group that was pruned by itself", refitted)
        weights, kept, shape = alone
        with step.tried([W.to(device_of(few.model)) for W in weights], kept):
            yield shape


def summed_losses(problem: SubsetProblem, removals: Removals) -> NDArray[np.float64]:
    """Return the loss with k units left, (units + 1,), given how all but one left."""
    risen = np.maximum([risen for _, risen in removals], 0.0)
    losses = np.concatenate([[0.0], np.cumsum(risen)])
    whole = max(problem.empty_loss, float(losses[-1]))
    return np.concatenate([[whole], losses[::-1]])
