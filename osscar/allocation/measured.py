"""How far predictions move when one group alone loses units: curves, measured by forward passes.

A group is refitted on the dense stream at about the width that it was given, put into the dense
model, and taken out again.  What samples that no refit has seen then tell of the predictions is
what its curve has to go through.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graph import CouplingGroup
from osscar.allocation.curves import LEAST_NATS, MOST, Curve, curve_samples, summed_losses
from osscar.allocation.divergence import Reference
from osscar.allocation.replay import Recording
from osscar.allocation.widths import possible_widths
from osscar.base.errors import NonFiniteError
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.messages import warn
from osscar.base.progress import stage
from osscar.base.ranks import Ranks
from osscar.base.timing import Stage, timed
from osscar.network.modules import device_of
from osscar.offload.on_disk import is_on_disk, room_for
from osscar.preparation.prepare import Prepared
from osscar.request import Widths
from osscar.walk.layer_step import LayerStep
from osscar.walk.walk import walk
from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.refit import refit

_TOKENS = 1024
_SAMPLES = 100
"""Tokens of a language model, or samples of any other, on which predictions are compared."""

_MATTERS = 0.01
"""Share of the sum of all losses below which ten times the loss of a group is left unmeasured."""

_NEAR = 0.15
"""Share of a group's units: a measurement counts as one at a width that is no farther away."""

MOST_BYTES = 1 << 30
"""Memory of what blocks of the dense model put out on these samples."""

FEWEST = 4
"""At most one in so many samples is among them, so that there are as many at least."""


def compared_samples(prepared: Prepared) -> int:
    """Return on how many samples, the last ones, predictions are compared; 0: there are too few."""
    length = prepared.inputs.settings.get("seqlen")
    wanted = _SAMPLES if length is None else max(1, _TOKENS // length)
    return min(wanted, prepared.inputs.samples // FEWEST)


def widths_to_measure(
    groups: Sequence[CouplingGroup],
    keep: Mapping[str, int],
    curves: Mapping[str, Curve] | None,
    widths: Widths,
) -> dict[str, int]:
    """Return at which width each group is to be measured: about what it is to keep.

    One that keeps all its units is measured at the share that all keep.  Left out are groups that
    were measured at about that width, and those whose loss is too small to matter.
    """
    share = sum(keep[group.name] for group in groups) / sum(group.units for group in groups)
    total = sum(float(curves[name].losses[kept]) for name, kept in keep.items()) if curves else 0.0
    found: dict[str, int] = {}
    for group in groups:
        options = possible_widths(group, widths)
        options = options[options < group.units]
        if not len(options):
            continue
        kept = keep[group.name] if keep[group.name] < group.units else share * group.units
        width = int(options[np.abs(options - kept).argmin()])
        curve = None if curves is None else curves[group.name]
        if curve is not None:
            matters = MOST * curve.losses[width] > _MATTERS * total or not curve.comparable
            near = [abs(width - known) <= _NEAR * group.units for known in curve.measured]
            if not matters or any(near) or (curve.measured and keep[group.name] == group.units):
                continue
        found[group.name] = width
    return found


def scaled(curves: Mapping[str, Curve], found: Mapping[str, Measurement]) -> dict[str, Curve]:
    """Return curves that go through what was measured.

    One that was not there before is the shape that came with the measurement.
    """
    made = dict(curves)
    for name, one in found.items():
        curve = made.get(name)
        if curve is None:
            assert one.losses is not None
            curve = Curve(name, one.losses, comparable=False)
        made[name] = curve.through(one.kept, one.nats)
    return made


@dataclass(frozen=True, eq=False)
class Measurement:
    """What predictions diverged by, in nats, when a group alone kept so many units.

    `losses`, (units + 1,), are those of the group's consumers as units left one by one, relative to
    their own outputs; only where they are asked for.
    """

    kept: int
    nats: float
    losses: NDArray[np.float64] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Compared:
    """The dense model on the samples that predictions are compared on.

    What blocks put out is `recorded`, batch by batch, so that a pass through a model of which a
    late layer has changed starts there.
    """

    prepared: Prepared = field(repr=False)
    reference: Reference
    recorded: Sequence[Recording] = field(repr=False)

    @classmethod
    def of(cls, prepared: Prepared, consumers: Collection[str], samples: int) -> Compared | None:
        """Run the dense model on the last samples; None if it puts out no logits.

        `consumers` are the modules that will change.
        """
        model = prepared.model
        recorded: list[Recording] = []
        size = 1 if prepared.inputs.tokens else prepared.batch_size
        # Weights on disk have all the memory that there is.
        most = 0 if is_on_disk(model) else MOST_BYTES // math.ceil(samples / size)

        def recording(index: int) -> AbstractContextManager[None]:
            recorded.append(Recording(most))
            return recorded[-1].recording(model, consumers)

        reference = Reference.of(prepared, samples, size, recording)
        if reference is None:
            return None
        found = cls(prepared, reference, recorded)
        if found.divergence(()) > LEAST_NATS:  # what blocks put out is not all that they do
            found = cls(prepared, reference, [Recording(0) for _ in recorded])
        return found

    def divergence(self, changed: Collection[str]) -> float:
        """Return by how much predictions diverge now that some modules have changed, in nats."""
        model = self.prepared.model
        return self.reference.divergence(
            model, lambda index: self.recorded[index].replayed(model, changed)
        )


def measured_groups(
    prepared: Prepared,
    compared: Compared,
    keep: Mapping[str, int],
    *,
    damp: float | None,
    shapes: bool = False,
) -> dict[str, Measurement]:
    """Prune each group by itself to what it is to keep, and measure what predictions diverge by.

    The model is as it was afterwards.  All ranks take part.  With `shapes`, the losses of the
    group's consumers are told, too.

    Warns
    -----
    UserWarning
        Of groups that are left out since weights or predictions overflow without some units.

    Raises
    ------
    NonFiniteError
        If one overflows where shapes are asked for, so that nothing else is known of it.
    """
    groups = [group for group in prepared.groups if group.name in keep]
    if not groups:
        return {}
    rest = prepared.inputs.samples - compared.reference.inputs.samples
    inputs = prepared.inputs.part(0, min(rest, curve_samples(prepared)))
    few = dataclasses.replace(prepared, inputs=inputs)
    # As of curvature: layers of a language model all read as many tokens.
    held = 0 if inputs.tokens else inputs.samples // FEWEST
    found: dict[str, Measurement] = {}
    with stage("measuring curves", total=len(groups)) as bar:
        for step in walk(few, groups, in_turn=False, held=held):
            with room_for(prepared.model, prepared.matrix_bytes):
                variant = _variant(step, keep[step.group.name], damp, prepared.ranks, shapes)
            weights = [W.to(device_of(prepared.model)) for W in variant.weights]
            try:
                with timed(Stage.MEASURED), step.tried(weights, variant.kept):
                    nats = compared.divergence({one.name for one in step.consumers})
                found[step.group.name] = Measurement(len(variant.kept), nats, variant.losses)
            except NonFiniteError as error:
                _tell_of_overflow(step.group, error, shapes)
            bar.advance()
    return found


def _tell_of_overflow(group: CouplingGroup, error: NonFiniteError, shapes: bool) -> None:
    """Warn of a group whose curve stays as predicted; raise an error where there is none."""
    alone = f"{group.name!r} pruned alone cannot be measured: {error}"
    if shapes:
        raise NonFiniteError(alone) from error
    warn(f"{alone}; its curve stays as it was")


@dataclass(frozen=True, eq=False)
class _Variant:
    """A group that has lost units: weights, (p, m), of its consumers, and which units stay."""

    weights: Sequence[Tensor] = field(repr=False)
    kept: Sequence[int]
    losses: NDArray[np.float64] | None = field(repr=False)


def _variant(
    step: LayerStep, keep: int, damp: float | None, ranks: Ranks, shapes: bool
) -> _Variant:
    """Have the first rank remove units of a group, one by one, and refit what stays."""

    def make() -> _Variant:
        with timed(Stage.MEASURED), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pruning itself will say so
            chosen, _ = step.regularization(keep, damp, 0.0)
            problem = step.problem(keep, chosen)
            gone = problem.units - keep
            removals = eliminate(problem, problem.units - 1 if shapes else gone)
            support = support_after(removals[:gone], problem)
            weights, _ = refit(problem, support)
            kept = support.tolist()
            refits = step.refits(weights, kept)
        losses = summed_losses(problem, removals) if shapes else None
        return _Variant([W if ranks.alone else W.cpu() for W in refits.weights], kept, losses)

    inputs = " and ".join(str(consumer.rows) for consumer in step.consumers)
    with memory_for(f"the problem of {step.group.name!r} with {inputs} inputs", FOR_MATRICES):
        return ranks.broadcast("a group that was pruned by itself", make)
