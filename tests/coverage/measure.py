"""Remove half of every prunable group of an architecture, and prove it."""

from __future__ import annotations

from torch import nn

import graph
from benchmarks.coverage.row import half_of
from graph import DependencyGraph
from osscar.proof.equivalence import masked, proof_outputs
from osscar.shrinking.shrink import Proof, shrink
from tests.zoo.case import Inputs

LEAST_EFFECT = 1e-4
"""How far masking has to move the outputs, as a share of the largest, for the proof to mean
anything."""


def shrink_by_half(model: nn.Module, inputs: list[Inputs]) -> tuple[DependencyGraph, Proof, float]:
    """Remove half of every prunable group, in place, and prove it.

    Returns the groups, the proof, and how far masking moved the outputs on the first inputs, as a
    share of the largest.
    """
    dependencies = graph.trace(model, inputs[0])
    plan = half_of(dependencies.prunable)
    dense = proof_outputs(model, inputs[:1])
    with masked(model, plan):
        pairs = zip(dense, proof_outputs(model, inputs[:1]), strict=True)
    effect = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    return dependencies, shrink(model, plan, inputs), effect
