"""Classification models of torchvision: half of every prunable group removed, and proved."""

from __future__ import annotations

import pytest

from .measure import LEAST_EFFECT, measure
from .zoo import torchvision_case, torchvision_names

pytest.importorskip("torchvision")

_GIANTS = ("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")
"""The code of smaller ones, and as slow as all of those together."""

_QUICK = (
    *("alexnet", "convnext_tiny", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2"),
    *("mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
    "squeezenet1_1",
)
"""One or two small models of most families; others are as slow as all of these together."""

_OTHERS = [name for name in torchvision_names() if name not in (*_QUICK, *_GIANTS)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", [*_QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS)]
)
def test_half_of_every_group_can_go(name: str) -> None:
    case = torchvision_case(name)
    found = measure(case.build(), case.make_inputs())
    assert found.effect > LEAST_EFFECT
    assert found.prunable > 0
    assert found.parameters_after < (1 - found.share / 4) * found.parameters
