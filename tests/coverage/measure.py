"""Remove half of every prunable group of an architecture, prove it, and say what was frozen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import graph
from graph import CouplingGroup, DependencyGraph
from osscar.shrinking.equivalence import proof_outputs
from osscar.shrinking.follow import prepare
from osscar.shrinking.mask import masked
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import Proof, shrink

from .zoo import Inputs

TOLERANCE = 1e-4
"""Of the largest output, in float32."""

LEAST_EFFECT = 1e-4
"""How far masking has to move the outputs, as a share of the largest, for the proof to mean
anything."""

_BOUNDARY = ("input of the model", "output of the model")


@dataclass(frozen=True)
class Coverage:
    """What was found and proved.

    Parameters
    ----------
    name
        Of the architecture.
    parameters, parameters_after
        Before and after half of every prunable group was removed.
    groups, prunable
        How many coupling groups there are, and how many of them may be pruned.
    share
        Of the parameters, those that belong to a prunable group.
    error
        Of the proof.
    effect
        How far the outputs moved when the units were masked, as a share of the largest output.
    frozen
        What may not be pruned and why, apart from the inputs and outputs of the model.
    kinds
        How many prunable groups there are of each kind.
    """

    name: str
    parameters: int
    parameters_after: int
    groups: int
    prunable: int
    share: float
    error: float
    effect: float
    frozen: str
    kinds: Mapping[str, int]


def half_of(groups: Iterable[CouplingGroup]) -> PruningPlan:
    """Plan to remove half of the units of each group, every second one."""
    return PruningPlan(
        tuple(
            GroupPlan.of(group, tuple(range(group.units % 2 == 0, group.units, 2)))
            for group in groups
            if group.units > 1
        )
    )


def shrink_by_half(model: nn.Module, inputs: list[Inputs]) -> tuple[DependencyGraph, Proof, float]:
    """Remove half of every prunable group, in place, and prove it.

    Returns
    -------
    tuple
        The groups, the proof, and how far masking moved the outputs on the first inputs.
    """
    prepare(model)
    dependencies = graph.trace(model, inputs[0])
    plan = half_of(dependencies.prunable)
    dense = proof_outputs(model, inputs[:1])
    with masked(model, plan):
        pairs = zip(dense, proof_outputs(model, inputs[:1]), strict=True)
    effect = max(_difference(a, b) for a, b in pairs)
    return dependencies, shrink(model, plan, inputs, tolerance=TOLERANCE), effect


def measure(name: str, model: nn.Module, inputs: list[Inputs]) -> Coverage:
    """Shrink a model by half, in place, prove it, and say what was found."""
    before = _count(model)
    total = sum(math.prod(shape) for shape in before.values())
    dependencies, proof, effect = shrink_by_half(model, inputs)
    return Coverage(
        name=name,
        parameters=total,
        parameters_after=sum(math.prod(shape) for shape in _count(model).values()),
        groups=len(dependencies.groups),
        prunable=len(dependencies.prunable),
        share=_owned(dependencies.prunable, before) / total,
        error=proof.error,
        effect=effect,
        frozen="; ".join((*_frozen(dependencies), *_unread(dependencies, before))),
        kinds=dict(Counter(str(group.kind) for group in dependencies.prunable)),
    )


def _count(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def _owned(groups: Iterable[CouplingGroup], shapes: dict[str, torch.Size]) -> int:
    """Count the parameters that some unit of a prunable group owns."""
    taken: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    places = {(s.tensor, s.dim, s.offset, s.units * s.width) for g in groups for s in g.slots}
    for tensor, dim, _, width in places:
        taken[tensor][dim] += width
    return sum(
        math.prod(shape) - math.prod(n - taken[name][dim] for dim, n in enumerate(shape))
        for name, shape in shapes.items()
    )


def _frozen(dependencies: DependencyGraph) -> list[str]:
    """Describe the frozen groups, those frozen by one operator together."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group in dependencies.groups:
        freeze = next(iter(group.frozen), None)
        if freeze is not None and not freeze.reason.endswith(_BOUNDARY):
            reasons[freeze.reason, freeze.operator].append(group.name)
    return [
        f"{len(names)} x {reason}{f' (`{operator}`)' if operator else ''}, first `{names[0]}`"
        for (reason, operator), names in reasons.items()
    ]


def _unread(dependencies: DependencyGraph, shapes: dict[str, torch.Size]) -> list[str]:
    """Name the parts whose parameters no operator reads in evaluation mode."""
    read = {tensor for operator in dependencies.operators for tensor in operator.tensors}
    parts = dict.fromkeys(name.partition(".")[0] for name in shapes if name not in read)
    return [f"`{part}` does not run in evaluation mode" for part in parts]
