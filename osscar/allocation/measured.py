"""What keeping k of a group's units costs in the outputs of the whole model, for every k.

Widths are chosen in equal shares, or by curves that are known.  A group by itself then loses as
many units: it is refitted on the dense stream, put into the dense model, and taken out again.
Samples that no refit has seen tell how far outputs move, in passes that are resumed where the group
is read.  The curve goes through what was measured, and has the shape of what the group's own
consumers lose.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.limits import Budget
from osscar.allocation.task import PruningTask, possible_widths
from osscar.base.errors import NonFiniteError, RequestError, warn
from osscar.base.inputs import AnyDistance
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.timing import Stage, progress_bar, timed
from osscar.distance.distance import Distance, Reference, picks_predictions
from osscar.network.modules import device_of
from osscar.offload.on_disk import room_for
from osscar.preparation.prepare import Prepared
from osscar.request import Widths
from osscar.walk.expert_walk import ExpertStep, ExpertWalk
from osscar.walk.layer_step import LayerStep
from osscar.walk.walk import Walk
from solvers import SubsetProblem
from solvers.closed_forms.elimination import Removals, eliminate, support_after
from solvers.closed_forms.refit import refit

_COMPARED_TOKENS, _COMPARED_SAMPLES = 2048, 128
"""Tokens of a language model, or samples of any other, on which outputs are compared at most.

Texts differ by a factor of six in what an early layer costs."""

_CLOSE = 0.005
"""In bfloat16 distances come out about 0.001 nats higher: what comes out closer
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

        Fewer units never count as better: where a measurement contradicts one with more units, the
        larger distance is taken.  What is below `LEAST` counts as zero.

        Where the shape is positive, it becomes a power between two widths that were measured, and a
        multiple beyond them; without any, it stays.  Where it is zero and something was measured,
        units do nothing on the samples that were fitted to, and something on others: in their
        number the distance is linear between what was measured, and adds to that of all the rest.
        """
        points, least = dict[int, float](), 0.0
        for kept, distance in sorted(self.measured.items(), reverse=True):
            points[kept] = least = max(least, distance if distance > LEAST else 0.0)
        idle = self._idle(points)
        losses, fitted = self.shape.copy(), [kept for kept in points if self.shape[kept] > 0]
        if fitted:
            known = losses > 0
            x = np.log(self.shape[fitted])
            y = np.log([max(points[kept] - idle[kept], LEAST) for kept in fitted])
            at = np.log(losses[known])
            inside = np.clip(at, x[0], x[-1])
            losses[known] = np.exp(np.interp(at, x, y) + at - inside)
        low, high = np.zeros(len(losses)), np.full(len(losses), np.inf)
        for kept, distance in points.items():
            low[: kept + 1] = distance
            high[kept:] = np.minimum(high[kept:], max(distance, LEAST))
        losses = np.clip(losses + idle, low, high)
        return np.maximum.accumulate(losses[::-1])[::-1]  # but for rounding, it is that

    @property
    def idle_from(self) -> int:
        """The fewest units with which the shape is zero."""
        return int((self.shape > 0).sum())

    def _idle(self, points: Mapping[int, float]) -> NDArray[np.float64]:
        """Return what units lose of which the shape knows nothing, (units + 1,)."""
        units, first = len(self.shape) - 1, self.idle_from
        known = {kept: distance for kept, distance in points.items() if kept >= first}
        if not known:
            return np.zeros(units + 1)
        narrowest = min(known)
        rise = known[narrowest] * (units - first) / max(1, units - narrowest)
        x, y = np.array(sorted({first: rise, **known, units: 0.0}.items())).T
        return np.asarray(np.interp(np.arange(units + 1), x, y), np.float64)

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
    return samples - prepared.inputs.last(max(samples - wanted, samples // _ONE_IN))


def dense_references(
    prepared: Prepared, samples: int, asked: AnyDistance = None
) -> tuple[Reference, Reference | None]:
    """Run a prepared model, which is still dense, on its last samples.

    Returned is what it returns in float32, and in bfloat16, if most distances are measured in that
    (`Prepared.bfloat16`).  `asked` is the distance of a request.
    """
    model, last = prepared.model, prepared.inputs.part(-samples)
    size, step = prepared.batch_size, 1
    if last.tokens:
        windows = {name: tokens[:, :_WINDOW] for name, tokens in last.tensors.items()}
        last, size, step = dataclasses.replace(last, tensors=windows), 1, _PREDICTIONS
        if picks_predictions(model, last):  # several take no more memory for logits than one whole
            size = min(step, prepared.batch_size, -(-samples // prepared.ranks.size))
    distance = Distance.from_outputs(model, last, last.batches(1)[0], asked)
    # What torch.cond and the like call cannot be captured in a mode, nor again after it was tried;
    # and what passes write on modules is not written where these are not run.
    captures = any(hasattr(torch.ops.higher_order, o.target) for o in prepared.traced.operators)
    arguments = distance, model, last.batches(size), prepared.ranks, step
    run = partial(
        Reference.from_run, *arguments, resumable=not (captures or prepared.untouched.written)
    )
    half = distance.measure == "nats" and prepared.bfloat16
    return run(), run(bfloat16=True) if half else None


def measured_curves(
    task: PruningTask,
    choose: Callable[[Mapping[str, Curve] | None], Mapping[str, int]],
    before: Budget | None = None,
) -> dict[str, Curve]:
    """Return the curve of each group that shares a budget.

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
    curves = {} if before is None else known_curves(before)
    return curves_at(task, [choose(curves or None)], curves)


def curves_at(
    task: PruningTask, choices: Sequence[Mapping[str, int]], curves: dict[str, Curve]
) -> dict[str, Curve]:
    """Return the same, measured at about what groups keep by several choices.

    Each group is refitted once for all of them, and what is known goes through that, too.
    """
    units = {group.name: group.units for group in task.shared}
    wanted: dict[str, list[int]] = {}
    for keep in choices:
        for name, width in widths_to_measure(task.shared, keep, curves, task.widths).items():
            others = wanted.setdefault(name, [])
            if all(abs(width - other) > _NEAR * units[name] for other in others):
                others.append(width)
    prepared, groups = task.prepared, task.shared
    if prepared.inputs.samples < _ONE_IN:
        raise RequestError(
            f"allocation measured takes {_ONE_IN} calibration samples or more, of which some are "
            f"held out, and there are {prepared.inputs.samples}; give more, or allocation "
            f"uniform (`--set allocation=uniform`)"
        )
    reference, rough = dense_references(prepared, compared_samples(prepared), task.request.distance)
    few = dataclasses.replace(prepared, inputs=prepared.inputs.part(0, fitted_samples(prepared)))
    alone = _Alone(dataclasses.replace(task, prepared=few), reference, rough, curves)
    some = [group for group in groups if group.name in wanted]
    with progress_bar("measuring curves", total=len(some)) as bar:
        for step in _steps(few, some) if some else ():
            alone.measure(step, wanted[step.group.name])
            bar.advance()
    for group in groups:  # what has no other width keeps all its units
        curves.setdefault(group.name, Curve(group.name, np.zeros(group.units + 1)))
    return curves


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
    were measured at about that width, and those whose loss is too small to matter; that a shape is
    zero does not say so, but what was measured with fewer units does.
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
            fewer = (distance for known, distance in curve.measured.items() if known <= width)
            loss = curve.losses[width] or min(fewer, default=math.inf)
            matters = 10 * loss > _MATTERS * total
            near = any(abs(width - known) <= _NEAR * group.units for known in curve.measured)
            if not matters or near or keep[group.name] == group.units:
                continue
        found[group.name] = width
    return found


def _steps(few: Prepared, groups: Sequence[CouplingGroup]) -> Iterator[LayerStep | ExpertStep]:
    """Yield groups as the dense stream reaches them, and then experts."""
    samples = few.inputs.samples // _ONE_IN
    units, experts = (
        [group for group in groups if group.kind.routed == routed] for routed in (False, True)
    )
    if units:
        # Layers of a language model all read as many tokens; others differ in how well they fit.
        held_out = 0 if few.inputs.tokens else few.inputs.last(samples)
        yield from Walk(few, units, in_turn=False, held_out=held_out, rough=True)
    if experts:
        yield from ExpertWalk(few, experts, held_out=few.inputs.last(max(1, samples)))


_Refits = list[tuple[list[int], list[torch.Tensor]]]
"""The units that stay, and the refitted weights of each consumer."""


@dataclass(eq=False)
class _Alone:
    """Measures what the model comes to with one group alone pruned to a width."""

    task: PruningTask
    """With the samples to which a group is refitted."""
    reference: Reference
    rough: Reference | None
    """The same in bfloat16."""
    curves: dict[str, Curve]

    def measure(self, step: LayerStep | ExpertStep, keeps: Sequence[int]) -> None:
        """Put a curve through the distances of the model with this group pruned to some widths.

        A shape that is zero with more units than these is not believed either: at first, the model
        is measured without these alone, too.
        """
        group, known = step.group.name, step.group.name in self.curves
        try:
            with self.task.prepared.ranks.alike("a group that was measured by itself"):
                if isinstance(step, LayerStep):
                    curve = self._measured_layer(step, keeps)
                else:
                    curve = self._measured_experts(step, keeps)
        except NonFiniteError as error:
            alone = f"{group!r} pruned alone cannot be measured: {error}"
            if not known:
                raise NonFiniteError(alone) from error
            warn(f"{alone}; its loss curve keeps the earlier measurements")
            return
        self.curves[group] = curve

    def _measured_layer(self, step: LayerStep, keeps: Sequence[int]) -> Curve:
        """Return the curve of a layer, through the distances with so many units."""
        name = step.group.name
        shape, refits = self._refits(step, keeps)
        curve = self.curves.get(name) or Curve(name, shape)
        changed = [getattr(c.module, name) for c in step.consumers for name in c.parameters]
        for kept, weights in refits:
            with step.tried([W.to(device_of(self.task.prepared.model)) for W in weights], kept):
                curve = curve.through(len(kept), self._distance(changed))
        return curve

    def _measured_experts(self, step: ExpertStep, keeps: Sequence[int]) -> Curve:
        """Return the curve of experts, through the distances with so many."""
        name, damp = step.group.name, self.task.request.damp
        curve, wanted = self.curves.get(name), [*keeps]
        for width in wanted:
            with step.alone(width, damp, shaped=curve is None) as shape:
                distance = self._distance()
            if curve is None:
                curve = Curve(name, shape)
                if min(keeps) < curve.idle_from < step.group.units:
                    wanted.append(curve.idle_from)
            curve = curve.through(width, distance)
        assert curve is not None
        return curve

    @timed(Stage.MEASURED)
    def _distance(self, changed: Sequence[torch.Tensor] | None = None) -> float:
        """Return how far the model as it is now is from the dense one."""
        distance, model = 0.0, self.task.prepared.model
        if self.rough is not None:
            distance = self.rough.compared(model, changed).distance
        if not _CLOSE <= distance < math.inf:
            distance = self.reference.divergence(model, changed)
        return distance

    def _refits(self, step: LayerStep, keeps: Sequence[int]) -> tuple[NDArray[np.float64], _Refits]:
        """Return the shape of a layer's curve, and refits to be measured, of the first rank.

        Units are removed one by one, with the damping that serves the width in the middle.  The
        refits are of the widths that are asked for, and at first of the layer without those units
        alone that do nothing on the samples that are fitted to.
        """
        few, damp = self.task.prepared, self.task.request.damp
        known = step.group.name in self.curves

        def refitted() -> tuple[NDArray[np.float64], _Refits]:
            with timed(Stage.MEASURED), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
                middle = sorted(keeps)[len(keeps) // 2]
                problem = step.problem(middle, step.regularization(middle, damp, 0.0)[0])
                removals = eliminate(problem, problem.units - 1)
                shape, found = summed_losses(problem, removals), _Refits()
                idle = Curve(step.group.name, shape).idle_from
                unsure = not known and min(keeps) < idle < problem.units and idle not in keeps
                for place, width in enumerate((*keeps, idle) if unsure else keeps, 1):
                    kept = support_after(removals[: problem.units - width], problem)
                    more = place < len(keeps)
                    weights = step.refits(refit(problem, kept)[0], kept.tolist(), more=more).weights
                    moved = [W if few.ranks.alone else W.cpu() for W in weights]
                    found.append((kept.tolist(), moved))
            return shape, found

        inputs = " and ".join(str(consumer.rows) for consumer in step.consumers)
        what = f"the problem of {step.group.name!r} with {inputs} inputs"
        with memory_for(what, FOR_MATRICES), room_for(few.model, self.task.matrix_bytes):
            return few.ranks.broadcast("a group that was pruned by itself", refitted)


def summed_losses(problem: SubsetProblem, removals: Removals) -> NDArray[np.float64]:
    """Return the loss with k units left, (units + 1,), given how all but one left."""
    risen = np.maximum([risen for _, risen in removals], 0.0)
    losses = np.concatenate([[0.0], np.cumsum(risen)])
    whole = max(problem.empty_loss, float(losses[-1]))
    return np.concatenate([[whole], losses[::-1]])
