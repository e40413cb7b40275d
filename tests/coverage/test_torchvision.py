"""Classification models of torchvision: half of every prunable group removed, and proved."""

from __future__ import annotations

import pytest

from tests.zoo import torchvision_case

from .measure import LEAST_EFFECT, measure

pytest.importorskip("torchvision")

_QUICK = (
    *(
        "squeezenet1_1",
        "alexnet",
        "convnext_tiny",
        "efficientnet_b0",
        "googlenet",
        "mnasnet0_5",
        "mobilenet_v2",
    ),
    *("mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
)
"""One or two small models of most families."""

_LONG = ("densenet121", "inception_v3", "vgg11_bn", "vit_b_32")
"""The other families; ``benchmarks/coverage`` measures all models."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name", [*_QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in _LONG)]
)
def test_half_of_every_group_can_go(name: str) -> None:
    case = torchvision_case(name)
    found = measure(case.build(), case.make_inputs())
    assert found.effect > LEAST_EFFECT
    assert found.prunable > 0
    assert found.parameters_after < (1 - found.share / 4) * found.parameters
