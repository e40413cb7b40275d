"""Remove half of every prunable group of an architecture, and prove it on inputs of two sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import graph
from benchmarks.coverage.case import Inputs
from benchmarks.coverage.row import half_of, owned
from graph import DependencyGraph
from osscar.proof.equivalence import masked, proof_outputs
from osscar.shrinking.shrink import Proof, shrink

LEAST_EFFECT = 1e-4
"""How far masking has to move the outputs, as a share of the largest, for the proof to mean
anything."""


@dataclass(frozen=True)
class Coverage:
    """What was found and proved.

    parameters, parameters_after: Before and after half of every prunable group was removed.
    prunable: How many coupling groups may be pruned.
    share: Of the parameters, those that belong to a prunable group.
    effect: How far the outputs moved when the units were masked, as a share of the largest output.
    kinds: How many prunable groups there are of each kind.
    """

    parameters: int
    parameters_after: int
    prunable: int
    share: float
    effect: float
    kinds: Mapping[str, int]


def shrink_by_half(model: nn.Module, inputs: list[Inputs]) -> tuple[DependencyGraph, Proof, float]:
    """Remove half of every prunable group, in place, and prove it.

    Returns the groups, the proof, and how far masking moved the outputs on the first inputs.
    """
    dependencies = graph.trace(model, inputs[0])
    plan = half_of(dependencies.prunable)
    dense = proof_outputs(model, inputs[:1])
    with masked(model, plan):
        pairs = zip(dense, proof_outputs(model, inputs[:1]), strict=True)
    effect = max(_difference(a, b) for a, b in pairs)
    return dependencies, shrink(model, plan, inputs), effect


def measure(model: nn.Module, inputs: list[Inputs]) -> Coverage:
    """Shrink a model by half, in place, prove it, and say what was found."""
    before = _count(model)
    total = sum(math.prod(shape) for shape in before.values())
    dependencies, _, effect = shrink_by_half(model, inputs)
    return Coverage(
        parameters=total,
        parameters_after=sum(math.prod(shape) for shape in _count(model).values()),
        prunable=len(dependencies.prunable),
        share=owned(dependencies.prunable, before) / total,
        effect=effect,
        kinds=dict(Counter(str(group.kind) for group in dependencies.prunable)),
    )


def _count(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())
