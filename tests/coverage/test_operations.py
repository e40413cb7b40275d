"""What a budget of operations counts, beside torch's own counter, on models of coverage.csv."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graph
from graph.tracing.preserve import without_cache
from osscar.allocation.costs import CountedCost, operations
from osscar.data.reader import Reader
from osscar.network.operations import _passed_over as passed_over
from osscar.network.operations import count_flops
from osscar.shrinking.slice import slice_units
from tests.zoo import transformers_case
from tests.zoo.case import Inputs
from tests.zoo.images import make_timm

from .measure import half_of


def _by_torch(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Count by torch alone, which passes over experts at once and deformable convolutions.

    Its counter needs gradients, and so do layers that would run as one operator without.
    """
    counter = FlopCounterMode(display=False, custom_mapping=passed_over())
    with without_cache(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
        model(**inputs)
    return counter.get_total_flops()


def _counted(
    model: nn.Module, traced: graph.DependencyGraph, inputs: Inputs
) -> tuple[CountedCost, dict[str, torch.Tensor]]:
    """Return what a model costs, once that is compared with torch, and what it was shown."""
    given = inputs if isinstance(inputs, dict) else Reader.of(model).named(inputs)
    cost = operations(model, traced, traced.groups, given)
    assert cost.dense == pytest.approx(_by_torch(model, given), rel=1e-12)
    assert cost.fixed >= 0
    return cost, given


_SLOW = ("llama-multi-query", "falcon-grouped", "t5", "whisper", "wav2vec2", "swin", "detr")


def _check_before_and_after(model: nn.Module, inputs: Inputs, *kinds: str) -> None:
    dependencies = graph.trace(model, inputs)
    cost, given = _counted(model, dependencies, inputs)
    groups = [group for group in dependencies.prunable if not kinds or group.kind in kinds]
    plan = half_of(groups)
    slice_units(model, plan)
    kept = {group.name: group.units for group in dependencies.prunable}
    kept |= {group.name: len(group.kept) for group in plan.groups}
    assert cost.of(kept) == pytest.approx(count_flops(model, given), rel=1e-12)


@pytest.mark.parametrize(
    "family", ["bert", "mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in _SLOW)]
)
def test_operations_are_those_that_torch_counts_before_and_after(family: str) -> None:
    case = transformers_case(family)
    _check_before_and_after(case.build(), case.make_inputs()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "xcit_nano_12_p16_224"])
def test_tokens_and_biases_of_modules_are_no_matrices_of_experts(name: str) -> None:
    pytest.importorskip("timm", reason="timm is in the extra osscar[benchmarks]")
    made = make_timm(name)
    _check_before_and_after(made.model, made.inputs[0], "neurons")
